"""Pages from templates; in Markdown, any text on one line that is shown as it is, and tables of columns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

LONGEST_TEXT = 300  # characters shown of a text

Columns = Mapping[str, Sequence[Any]]  # header -> cells


def environment(html: bool = False) -> Environment:
    """The templates of pages, with the filters `table` and `clip`; what they are given is escaped."""
    made = Environment(
        loader=PackageLoader("openbook"),
        autoescape=html,  # Markdown has an escape of its own
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    if not html:
        made.finalize = escape
    made.filters.update(table=table, clip=clip)
    return made


def escape(value: Any) -> str:
    """Any text as one line that Markdown shows as it is; markup made here passes."""
    if isinstance(value, Markup):
        return value
    line = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|~$])", r"\\\1", line)


def table(columns: Columns) -> Markup:
    header, *rows = [map(escape, row) for row in (columns, *zip(*columns.values(), strict=True))]
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return Markup("\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)))


def clip(text: str) -> str:
    """One line of bounded length; the tab between the two texts of a pair becomes a slash."""
    line = " ".join(str(text).replace("\t", " / ").split())
    return line if len(line) <= LONGEST_TEXT else line[: LONGEST_TEXT - 1].rstrip() + "…"
