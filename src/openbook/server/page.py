"""The page at `/`: one file that asks nothing of any other place."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.responses import Response


@cache
def page() -> tuple[bytes, str]:
    """The page, and the policy that lets its own script and style run, nothing else, and no other site frame it."""
    text = files("openbook.server").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {tag: digest(re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[0]) for tag in ("script", "style")}
    policy = (
        f"default-src 'none'; script-src '{hashes['script']}'; style-src '{hashes['style']}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


def page_response() -> Response:
    text, policy = page()
    return Response(text, media_type="text/html", headers={"content-security-policy": policy})


def digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
