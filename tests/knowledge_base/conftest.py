"""The worked example of the specification: four keys in the plane."""

from dataclasses import replace

import numpy as np
import pytest

from openbook.types import KnowledgeBase


@pytest.fixture
def base() -> KnowledgeBase:
    return KnowledgeBase(
        keys=np.array([(1, 0), (0, 1), (0.6, 0.8), (-1, 0)], dtype=np.float32),
        values=np.array([(0.9, 0.1), (0.2, 0.8), (0.6, 0.4), (0.5, 0.5)], dtype=np.float32),
        ids=("t/0", "t/1", "t/2", "t/3"),
        texts=("east", "north", "between", "größer\t西"),
        manifest={
            "kind": "classification",
            "labels": ["no", "yes"],
            "key_space": "k1",
            "origin": "train",
            "licence": "CC0",
        },
    )


@pytest.fixture
def empty_base(base: KnowledgeBase) -> KnowledgeBase:
    return replace(base, keys=base.keys[:0], values=base.values[:0], ids=(), texts=())
