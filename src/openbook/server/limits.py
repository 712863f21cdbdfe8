"""What the server takes before it says no, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass, fields

from openbook.config import UsageError

SHORTEST_KEY = 16  # characters
RETRY_AFTER = "1"  # seconds, of 429 and 503


@dataclass(frozen=True)
class Limits:
    """Each is an option of `openbook serve`. Raises UsageError for one that is not above 0."""

    max_body: int = 1 << 20  # bytes of a request
    max_texts: int = 128  # texts, pairs or ids of a request
    max_characters: int = 100_000  # of a text, or of both texts of a pair
    max_waiting: int = 512  # requests that were read and are not answered
    max_waiting_bytes: int = 1 << 26  # of all requests that are being read or answered
    max_connections: int = 1024
    batch_tokens: int = 4096  # rows times the longest of them, padding included; a longer row runs alone
    timeout: float = 30.0  # seconds from a request that was read to its answer
    read_timeout: float = 10.0  # seconds for the head of a request, and again for its body
    grace: float = 30.0  # seconds for what was accepted when SIGTERM came

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                option = "--" + field.name.replace("_", "-")
                raise UsageError(f"{option} is {getattr(self, field.name)}; it must be above 0")
        if self.max_waiting_bytes < self.max_body:
            raise UsageError(
                f"--max-waiting-bytes is {self.max_waiting_bytes}, less than --max-body ({self.max_body}): no request "
                f"of that size would be taken; give at least {self.max_body}"
            )


def checked_key(key: str | None) -> str | None:
    """The key that edits need; None without one. Raises UsageError for a key that is short or cannot be in a header."""
    if not key:
        return None
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            f"OPENBOOK_API_KEY has {len(key)} characters; a key needs at least {SHORTEST_KEY}, printable ASCII without "
            "spaces; unset it to serve without edits"
        )
    return key
