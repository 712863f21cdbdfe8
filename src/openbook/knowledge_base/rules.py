"""How the recipe had a book tuned, kept with the book so that whoever tunes it again keeps to the same rules."""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter

from openbook.config import UsageError, WholeKind
from openbook.knowledge_base.adaptive import Metric
from openbook.knowledge_base.answering import Mode, Skip
from openbook.knowledge_base.interpolate import normalised
from openbook.knowledge_base.search import search_of
from openbook.knowledge_base.tuning import Choices, HeldOut, Tuned, collect, tune
from openbook.types import KnowledgeBase

RULES = "tuning"  # the entry of a manifest
DIGEST_BYTES = 5  # of a reported text: of 25,000, one in 40 million others is taken for one of them


@dataclass(frozen=True)
class Rules:
    """What is judged by, what may be chosen, and which texts are reported and so not to be tuned on."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    metric: str | None = None  # None: not known
    mode: Mode = "constant"
    skip: Skip = "none"
    reported: frozenset[bytes] = frozenset()  # digests

    @classmethod
    def of(cls, metric: str, mode: Mode, skip: Skip, reported: Iterable[str]) -> Self:
        """`reported` are texts as a base stores them."""
        return cls(metric, mode, skip, frozenset(map(digest, reported)))

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> Self:
        """What `to_manifest` wrote; of a base without it, what its settings of retrieval tell.

        Raises UsageError for what cannot be read.
        """
        known = manifest.get("retrieval") or {}
        written = manifest.get(RULES, {name: known[name] for name in ("mode", "skip") if name in known})
        try:
            digests = b64decode(written.get("reported", ""), validate=True)
            cut = frozenset(digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES))
            return TypeAdapter(cls).validate_python({**written, "reported": cut})
        except (AttributeError, TypeError, ValueError) as error:
            raise UsageError(
                f"{RULES} in the manifest of the knowledge base cannot be used ({error}); build it again"
            ) from error

    def to_manifest(self) -> dict[str, Any]:
        """JSON; the digests are joined, as thousands of short strings would be long."""
        joined = b64encode(b"".join(sorted(self.reported))).decode()
        return {"metric": self.metric, "mode": self.mode, "skip": self.skip, "reported": joined}

    def tuned(
        self,
        texts: Sequence[str],
        gold: NDArray[Any],
        outputs: NDArray[Any],
        queries: NDArray[Any],
        base: KnowledgeBase,
        metric: Metric,
        kind: WholeKind,
        reported_split: bool = False,
    ) -> Tuned:
        """Choose anew on texts as a base stores them, their gold labels (n,), the student's outputs and its queries.

        How often entries of the corpus count was settled when the base was built. Raises UsageError as `tune` does.
        """
        ids = tuple(f"text {place}" for place in range(len(texts)))
        caches = collect(HeldOut(ids, tuple(texts), gold), outputs, queries, base, search_of)
        reported = [id for id, text in zip(ids, texts, strict=True) if digest(text) in self.reported]
        choices = Choices(modes=(self.mode,), skips=(self.skip,), reported_split=reported_split)
        return tune({1.0: caches[1.0]}, metric, kind, reported, choices)


def digest(text: str) -> bytes:
    """Short; equal for texts that differ in case or spacing only."""
    return hashlib.sha256(normalised(text).encode("utf-8", "surrogatepass")).digest()[:DIGEST_BYTES]
