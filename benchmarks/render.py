"""Writes the results in README.md from benchmarks/quickstart.json (`python benchmarks/render.py`); --check compares."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openbook.findings import Report, comparison, verdicts

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "quickstart.json"
START, END = "<!-- results:start -->", "<!-- results:end -->"


def rendered(readme: str, results: Mapping[str, Any]) -> str:
    """README with the text between the two markers replaced."""
    before, _, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"README.md needs {START} and, below it, {END}")
    return f"{before}{START}\n\n{findings(results)}\n\n{END}{after}"


def findings(results: Mapping[str, Any]) -> str:
    """The comparison as a table, under which conditions it was made, and what it shows in sentences."""
    report = Report("quickstart", "", results, {}, {}, [], [], {}, {}, "")
    columns, timing = comparison(report), results["timing"]
    rows = [list(columns), ["---", *["---:"] * (len(columns) - 1)], *zip(*columns.values(), strict=True)]
    conditions = (
        f"Task `{results['task']}`, {results['split']} split, {results['rows']:,} rows; ± is the standard deviation "
        f"over {len(results['seeds'])} seeds. Times: {timing['processor']}, threads: {timing['threads']}."
    )
    table = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*table, "", conditions, "", *(f"- {verdict}" for verdict in verdicts(report))])


if __name__ == "__main__":
    found = README.read_text(encoding="utf-8")
    wanted = rendered(found, json.loads(RESULTS.read_text(encoding="utf-8")))
    if sys.argv[1:] == ["--check"]:
        sys.exit(found != wanted and "README.md differs from benchmarks/quickstart.json; run benchmarks/render.py")
    README.write_text(wanted, encoding="utf-8")
