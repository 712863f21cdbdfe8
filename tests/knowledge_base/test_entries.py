"""What an entry says, in words."""

import pytest

from openbook.knowledge_base.entries import in_words


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        ("classification", {"bad": 0.2, "good": 0.8}, "good 0.80"),
        ("regression", {"score": 3.14159}, "3.14"),
        ("multi_label", {"film": 0.6, "music": 0.4, "art": 0.9}, "art 0.90, film 0.60"),
        ("multi_label", {"film": 0.5, "music": 0.1}, ""),
    ],
)
def test_an_entry_tells_its_label_its_score_or_every_label_above_one_half(
    kind: str, value: dict[str, float], told: str
) -> None:
    assert in_words(value, kind) == told
