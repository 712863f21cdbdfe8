"""What a predictor found, as it goes over the wire."""

from __future__ import annotations

from typing import Any

import numpy as np

from openbook.answers import Encoded
from openbook.knowledge_base.interpolate import Evidence, Neighbour
from openbook.server import messages as wire
from openbook.server.service import Predictor


def answered(model: Predictor, answer: Any, encoded: Encoded) -> wire.Answer:
    return wire.Answer(**told(model, answer, encoded))


def told(model: Predictor, answer: Any, encoded: Encoded) -> dict[str, Any]:
    """The fields of an answer. Raises ValueError for one that is no number."""
    if not np.isfinite(answer).all():
        raise ValueError("the model answered with something that is no number")
    chances = None if model.labels is None else dict(zip(model.labels, map(float, answer), strict=True))
    prediction = model.name(answer)
    return {
        "prediction": prediction,
        "probability": None if chances is None or isinstance(prediction, list) else float(answer.max()),
        "probabilities": chances,
        "tokens": len(encoded),
        "truncated": encoded.cut,
    }


def explained(model: Predictor, found: Evidence, encoded: Encoded) -> wire.Explained:
    return wire.Explained(
        **told(model, found.result, encoded),
        alone=model.name(found.student),
        student_contribution=found.student_contribution,
        decisive=found.decisive,
        neighbours=[neighbour_told(model, one) for one in found.neighbours],
        reason=found.reason,
    )


def neighbour_told(model: Predictor, one: Neighbour) -> wire.NeighbourTold:
    return wire.NeighbourTold(
        id=one.id, text=one.text, origin=one.origin, prediction=model.name(one.value), similarity=one.similarity,
        weight=one.weight, contribution=one.contribution,
    )  # fmt: skip


def book_told(book: Any) -> wire.BookTold | None:
    if book is None:
        return None
    return wire.BookTold(
        entries=len(book.base.ids),
        generation=book.base.manifest.get("generation"),
        open=book.retrieval.opens_book and bool(book.base.ids),
    )
