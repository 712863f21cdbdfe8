"""The task's own texts as queries: unique, and with the rows and fields they came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from openbook.config import CorpusSettings
from openbook.retrieval.passages import lex, sentences
from openbook.types import Example

FILE = "anchors.parquet"
LONGEST_QUERY = 128  # words; a longer text is queried sentence by sentence
FIELDS = {"each": slice(0, 2), "concat": slice(0, 2), "first": slice(0, 1), "second": slice(1, 2)}
COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("key", pa.string()),
        ("weight", pa.int64()),
        ("rows", pa.list_(pa.string())),
        ("fields", pa.list_(pa.string())),
        ("labels", pa.list_(pa.int64())),
    ]
)


@dataclass(frozen=True)
class Anchor:
    """A text of the task that serves as a query. An engine is given its text alone; `labels` serve `balance_labels`."""

    id: str
    text: str
    key: str
    rows: tuple[str, ...]  # ids of the examples that carry it; one that carries it in both fields comes twice
    fields: tuple[str, ...]  # where in each of them: text, text_pair, or both joined
    labels: tuple[int, ...] = ()  # classes of those examples, ascending; none in regression

    @property
    def weight(self) -> int:
        """How many rows carry it."""
        return len(set(self.rows))


def anchors_of(examples: Iterable[Example], settings: CorpusSettings, excluded: AbstractSet[str]) -> list[Anchor]:
    """The task's texts as queries (section 2.4): unique by key, the first occurrence first.

    Texts whose key is `excluded`, because an evaluation text has the same, are no anchors; nor are those of fewer than
    `anchor_min_words`.
    """
    named: dict[str, tuple[str, str]] = {}  # key -> id, text
    carriers: dict[str, dict[tuple[str, str], Example]] = {}  # key -> (row, field) -> row
    for example in examples:
        for number, (field, text, words) in enumerate(_queries(example, settings, excluded)):
            name = " ".join(words)
            if len(words) >= settings.anchor_min_words and name not in excluded:
                named.setdefault(name, (f"{example.id}#{number}", text))
                carriers.setdefault(name, {})[example.id, field] = example
    return [_anchor(*named[name], name, carriers[name]) for name in named]


def _anchor(identity: str, text: str, name: str, carriers: dict[tuple[str, str], Example]) -> Anchor:
    rows, fields = zip(*carriers, strict=True)
    labels = {example.label for example in carriers.values() if isinstance(example.label, int)}
    return Anchor(identity, text, name, rows, fields, tuple(sorted(labels)))


def _queries(
    example: Example, settings: CorpusSettings, excluded: AbstractSet[str]
) -> Iterator[tuple[str, str, list[str]]]:
    """(field, text, words) of every query a row gives."""
    both: tuple[tuple[str, str | None], ...] = (("text", example.text), ("text_pair", example.text_pair))
    texts = [(field, text, lex(text)) for field, text in both[FIELDS[settings.anchor_mode]] if text is not None]
    texts = [(field, text, words) for field, text, words in texts if " ".join(words) not in excluded]
    if settings.anchor_mode == "concat" and len(texts) == 2:
        joined = " ".join(text for _, text, _ in texts)
        texts = [("both", joined, lex(joined))]
    for field, text, words in texts:
        if len(words) > LONGEST_QUERY:
            yield from ((field, sentence, lex(sentence)) for sentence in sentences(text, settings.language))
        else:
            yield field, text, words


def save_anchors(anchors: Sequence[Anchor], folder: Path) -> None:
    """Beside the hit table whose queries they are, in the same order."""
    columns = {name: [getattr(anchor, name) for anchor in anchors] for name in COLUMNS.names}
    pq.write_table(pa.table(columns, schema=COLUMNS), folder / FILE)


def load_anchors(folder: Path) -> list[Anchor]:
    rows = pq.read_table(folder / FILE, schema=COLUMNS).to_pylist()
    return [
        Anchor(row["id"], row["text"], row["key"], *(tuple(row[name]) for name in ("rows", "fields", "labels")))
        for row in rows
    ]
