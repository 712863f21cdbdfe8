"""openbook: teach a small text model from the right textbook, then let it sit the exam with the book open."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openbook.knowledge_base.store import KnowledgeBase
    from openbook.predictor import OpenBook

__all__ = ["KnowledgeBase", "OpenBook"]


def __getattr__(name: str) -> Any:
    """`openbook.OpenBook` on first use, so that reading a recipe or a help text does not wait for torch."""
    if name == "OpenBook":
        from openbook.predictor import OpenBook

        return OpenBook
    if name == "KnowledgeBase":
        from openbook.knowledge_base.store import KnowledgeBase

        return KnowledgeBase
    raise AttributeError(f"module 'openbook' has no attribute {name!r}")
