"""What a model says about many texts at once, in their order; and what that means: classes, answers, tags."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from openbook.answers import Answers, probabilities_of
from openbook.data.batches import Tokenised, ordered
from openbook.models.encoder import Encoder
from openbook.types import Batch, Example

BATCH_TOKENS = 4096
LONGEST_ANSWER = 30  # word-pieces, as in BERT's code for SQuAD

LogitsOf = Callable[[Batch], Tensor]


def answers_of(model: Encoder, texts: Tokenised) -> Answers:
    """Logits and pooled vectors in evaluation mode, in fp32."""
    model.eval().listen()
    device = next(model.parameters()).device
    rows = {name: row for row, name in enumerate(texts.ids.to_pylist())}
    logits: NDArray[np.float32] | None = None
    embedding: NDArray[np.float32] | None = None
    with torch.inference_mode():
        for batch in ordered(texts, BATCH_TOKENS):
            said = model(batch.to(device))
            if logits is None or embedding is None:
                logits = np.empty((len(rows), said.logits.shape[1]), np.float32)
                embedding = np.empty((len(rows), said.embedding.shape[1]), np.float32)
            here = [rows[name] for name in batch.ids]
            logits[here] = said.logits.float().cpu().numpy()
            embedding[here] = said.embedding.float().cpu().numpy()
    assert logits is not None
    assert embedding is not None
    return Answers(logits, embedding, np.empty(0) if texts.labels is None else texts.labels)


@dataclass(frozen=True)
class Predictions:
    """Row i belongs to example i: what `metrics.score` takes for this kind of task."""

    outputs: NDArray[Any]  # probabilities or scores (n, C); answers (n,); tuples of tags (n,)
    gold: NDArray[Any]  # (n,) classes, options or targets; tuples of accepted answers; tuples of tags


def predictions_of(
    logits_of: LogitsOf,
    texts: Tokenised,
    examples: Sequence[Example],
    labels: Sequence[str] = (),
    null_allowed: bool = False,
) -> Predictions:
    """Predictions for labelled examples, and their gold labels. `texts` are these examples, tokenised for predictions.

    `logits_of` gives the logits of a batch, in evaluation mode: (B, C); of options (B, 1), of spans (B, L, 2), of tags
    (B, L, C). `labels` are the tags in index order; with `null_allowed`, a question may have no answer. Raises
    ValueError if the texts are not these examples.
    """
    told = len(texts.ids) if texts.example is None else len(np.unique(texts.example))
    if told != len(examples):
        raise ValueError(f"{told} tokenised examples are not these {len(examples)}; tokenise with training=False")
    outputs = OUTPUTS[texts.kind](_said(logits_of, texts), texts, examples, Decoding(tuple(labels), null_allowed))
    gold: list[Any] = [example.label for example in examples]
    if texts.kind == "span_extraction":
        return Predictions(outputs, objects([example.answers for example in examples]))
    if texts.kind == "token_classification":
        return Predictions(outputs, objects([tuple(labels[index] for index in tags) for tags in gold]))
    return Predictions(outputs, np.array(gold))


def best_span(
    start: NDArray[Any],
    end: NDArray[Any],
    first: int,
    last: int,
    longest: int = LONGEST_ANSWER,
    null_allowed: bool = False,
) -> tuple[int, int, float]:
    """First and last token of the best answer in a window, and its score; (0, 0, score) if there is none.

    start, end (L,) are logits; `first` to `last` is the passage, and position 0 is [CLS]. The score is that of start i
    and of end j, i <= j < i + longest, both in the passage (MITKD specification, 2.1 and F13); of equals, the first and
    shortest wins. With `null_allowed`, there is no answer if [CLS] scores higher. Without a passage, the score is -inf.
    """
    null = float(start[0]) + float(end[0])
    size = last - first + 1
    if size < 1:
        return (0, 0, null) if null_allowed else (0, 0, -np.inf)
    padded = np.full(size + longest - 1, -np.inf)
    padded[:size] = end[first : last + 1]
    scores = start[first : last + 1, None] + sliding_window_view(padded, longest)  # (size, longest) by start and length
    i, more = divmod(int(scores.argmax()), longest)
    score = float(scores[i, more])
    return (0, 0, null) if null_allowed and null > score else (first + i, first + i + more, score)


def best_window(scores: NDArray[Any], nulls: NDArray[Any], null_allowed: bool = False) -> int | None:
    """Which of a question's windows has the answer: the best span of all, by scores (k,); None if there is no answer.

    Against it stands the lowest score of [CLS] (k,): in windows without the answer a model is right to point there.
    """
    best = int(np.argmax(scores))
    return None if null_allowed and np.min(nulls) > scores[best] else best


def answer_text(passage: str, starts: NDArray[np.int32], ends: NDArray[np.int32], i: int, j: int) -> str:
    """The passage's own characters from token i to token j, given where tokens (L,) begin and end in it."""
    return passage[int(starts[i]) : int(ends[j])].strip()


@dataclass(frozen=True)
class Decoding:
    """What turns logits into predictions, besides the texts."""

    labels: tuple[str, ...]
    null_allowed: bool


Said = Iterator[tuple[int, NDArray[np.float64]]]


def _said(logits_of: LogitsOf, texts: Tokenised) -> Said:
    """Every row and its logits: (C,), or (L, C) without padding. In the order of batches."""
    rows = {name: row for row, name in enumerate(texts.ids.to_pylist())}
    with torch.inference_mode():
        for batch in ordered(texts, BATCH_TOKENS):
            lengths = batch.attention_mask.sum(1).tolist()
            logits = logits_of(batch).double().cpu().numpy()
            for name, length, one in zip(batch.ids, lengths, logits, strict=True):
                yield rows[name], one if one.ndim == 1 else one[:length]


def _in_order(said: Said) -> NDArray[np.float64]:
    """Logits (R, C) of rows that have one vector each."""
    return np.stack([logits for _, logits in sorted(said, key=lambda one: one[0])])


def _scores(said: Said, texts: Tokenised, examples: Sequence[Example], how: Decoding) -> NDArray[Any]:
    return _in_order(said)


def _classes(said: Said, texts: Tokenised, examples: Sequence[Example], how: Decoding) -> NDArray[Any]:
    return probabilities_of(_in_order(said))


def _options(said: Said, texts: Tokenised, examples: Sequence[Example], how: Decoding) -> NDArray[Any]:
    counts = [len(example.options) for example in examples]
    logits = np.full((len(examples), max(counts)), -np.inf)
    logits[np.arange(max(counts)) < np.array(counts)[:, None]] = _in_order(said)[:, 0]
    return probabilities_of(logits)


def _answers(said: Said, texts: Tokenised, examples: Sequence[Example], how: Decoding) -> NDArray[Any]:
    assert texts.example is not None
    assert texts.labels is not None
    assert texts.start is not None
    assert texts.end is not None
    scores, nulls = np.empty(len(texts.ids)), np.empty(len(texts.ids))
    answers = [""] * len(texts.ids)
    for row, logits in said:
        first, last = map(int, texts.labels[row, 2:])
        i, j, scores[row] = best_span(logits[:, 0], logits[:, 1], first, last)
        nulls[row] = logits[0].sum()
        tokens = slice(texts.offsets[row], texts.offsets[row + 1])
        passage = examples[texts.example[row]].text_pair or ""
        answers[row] = answer_text(passage, texts.start[tokens], texts.end[tokens], i, j)
    bounds = np.searchsorted(texts.example, np.arange(len(examples) + 1))
    found = np.full(len(examples), "", dtype=object)
    for place, (begin, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        window = best_window(scores[begin:stop], nulls[begin:stop], how.null_allowed)
        found[place] = "" if window is None else answers[begin + window]
    return found


def _tags(said: Said, texts: Tokenised, examples: Sequence[Example], how: Decoding) -> NDArray[Any]:
    """A tag of every word; one that was cut off, or has no word-piece, gets `O` (without one, the first label)."""
    assert texts.word is not None
    other = "O" if "O" in how.labels else how.labels[0]
    found = [[other] * len(example.words) for example in examples]
    for row, logits in said:
        words = texts.word[texts.offsets[row] : texts.offsets[row + 1]]
        for word, label in zip(words[words >= 0], logits[words >= 0].argmax(1), strict=True):
            found[row][word] = how.labels[label]
    return objects([tuple(tags) for tags in found])


def objects(values: Sequence[Any]) -> NDArray[Any]:
    """An array (n,) of things that numpy would take for rows."""
    array = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        array[place] = value
    return array


OUTPUTS: dict[str, Callable[[Said, Tokenised, Sequence[Example], Decoding], NDArray[Any]]] = {
    "classification": _classes,
    "regression": _scores,
    "multiple_choice": _options,
    "span_extraction": _answers,
    "token_classification": _tags,
}
