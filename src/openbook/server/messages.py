"""What goes over the wire: requests that refuse what they do not know, and replies."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, FiniteFloat, Tag
from pydantic_core import PydanticCustomError

NO_NUL = {"pattern": "^[^\\u0000]*$"}


def readable(text: str) -> str:
    """Raises for what no tokenizer should be given."""
    if "\0" in text:
        raise PydanticCustomError("nul", "a text must not hold a NUL character")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PydanticCustomError("surrogate", "a text must be valid Unicode, without lone surrogates")
    return text


def kind_of(rows: Any) -> str:
    """Whether a list begins as one of pairs; then all have to be."""
    return "pairs" if isinstance(rows, list) and rows and isinstance(rows[0], list) else "texts"


def kind_of_label(label: Any) -> str:
    return "name" if isinstance(label, str) else "names" if isinstance(label, list) else "score"


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Readable = Annotated[str, AfterValidator(readable), Field(json_schema_extra=NO_NUL)]
Name = Annotated[Readable, Field(min_length=1, max_length=1000)]
Pair = Annotated[list[Readable], Field(min_length=2, max_length=2)]
Rows = Annotated[
    Annotated[list[Readable], Field(min_length=1), Tag("texts")]
    | Annotated[list[Pair], Field(min_length=1), Tag("pairs")],
    Discriminator(kind_of),
]


Label = Annotated[
    Annotated[Name, Tag("name")] | Annotated[list[Name], Tag("names")] | Annotated[FiniteFloat, Tag("score")],
    Discriminator(kind_of_label),
]
Said = str | float | list[str]


class Asked(Message):
    """Texts, or pairs of texts; an empty string is a text."""

    texts: Rows = Field(examples=[["Who wrote Hamlet?", "How far is the moon?"], [["a text", "and its second"]]])


class Remembered(Message):
    """Texts for the book. Without labels, what the teacher says of them is kept."""

    texts: Rows
    labels: list[Label] | None = Field(
        None, description="One for each text: names, lists of names where several may apply, or scores in regression."
    )
    ids: list[Name] | None = Field(None, description="One for each text; made from the texts if absent.")


class Forgotten(Message):
    ids: Annotated[list[Name], Field(min_length=1)]


class Answer(Message):
    prediction: Said = Field(description="The label; the list of those above 0.5 of several; in regression the score.")
    probability: float | None = Field(description="Of the prediction; null in regression, and of several labels.")
    probabilities: dict[str, float] | None = Field(description="Of every label; null in regression.")
    tokens: int = Field(description="Word-pieces that were read, special ones included.")
    truncated: bool = Field(description="Whether the text was longer than the model reads: its end was left out.")


class NeighbourTold(Message):
    id: str
    text: str = Field(description="A pair is stored as its two texts joined by a tab.")
    origin: str
    prediction: Said = Field(description="What the book says of this text.")
    similarity: float
    weight: float = Field(description="Its share among the neighbours; they sum to 1.")
    contribution: float = Field(description="What it adds to the answer's probability.")


class Explained(Answer):
    alone: Said = Field(description="What the student says without its book.")
    student_contribution: float = Field(description="With the neighbours' contributions, the answer's probability.")
    decisive: bool = Field(description="Whether the book changed the label.")
    neighbours: list[NeighbourTold] = Field(description="Best first.")
    reason: str | None = Field(description="Why there was nothing to look up, such as an empty book; else null.")


class Predictions(Message):
    answers: list[Answer] = Field(description="In the order of the texts.")


class Explanations(Message):
    answers: list[Explained] = Field(description="In the order of the texts.")


class Edited(Message):
    added: int
    removed: int
    entries: int = Field(description="That the book has now.")
    generation: int
    stale: bool = Field(description="So much has changed that the book should be tuned again.")


class BookTold(Message):
    entries: int
    generation: int | None
    open: bool = Field(description="False where the student answers alone: tuning found no gain, or the book is empty.")


class ModelTold(Message):
    name: str
    kind: str
    labels: list[str] | None
    book: BookTold | None
    edits: bool = Field(description="Whether /remember and /forget are on.")
    max_texts: int
    max_characters: int
    max_body: int


class Status(Message):
    status: str


class Problem(Message):
    """Every reply that is no answer."""

    error: str = Field(description="One word for programs, such as invalid or busy.")
    message: str = Field(description="One sentence for people.")
    field: str | None = Field(description="Where in the request, such as texts[3].")
    request_id: str
