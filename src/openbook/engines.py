"""What a run searches its bank with: words, sentence embeddings, or both."""

from __future__ import annotations

from openbook.data.sources import locate_model
from openbook.models.sentence import sentence_encoder
from openbook.retrieval.bm25 import Index
from openbook.retrieval.dense import DenseIndex
from openbook.retrieval.fusion import Hybrid
from openbook.retrieval.hits import Engine
from openbook.workspace import Run

WORDS, VECTORS = "words", "vectors"  # folders of the two indexes


def encoder_name(run: Run) -> str | None:
    """Where the sentence encoder comes from; none if words alone are searched."""
    settings = run.recipe.corpus
    return None if settings.engine == "bm25" else locate_model(settings.encoder or run.recipe.teacher.model)


def open_engine(run: Run) -> Engine:
    """What the recipe searches with."""
    settings, folder = run.recipe.corpus, run.folder / "index"
    engines: list[Engine] = []
    if settings.engine != "dense":
        engines.append(Index.load(folder / WORDS, settings.k1, settings.b))
    if settings.engine != "bm25":
        name = encoder_name(run)
        assert name is not None
        engines.append(DenseIndex.load(folder / VECTORS, sentence_encoder(name), name))
    return engines[0] if len(engines) == 1 else Hybrid(tuple(engines))
