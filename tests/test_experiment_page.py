"""The page says what the numbers say, in any state of the grid, and shows any text as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt

from openbook import plots
from openbook.comparison import summarise
from openbook.experiment_page import figures, markdown, publish, render
from openbook.metrics import METRICS
from openbook.results import rows_file
from openbook.row_answers import RowAnswers

EVIL = "<script>alert('|`*_[x](y)&amp;')</script> | a || b\n# not a heading $x$"
SHOWN = " ".join(EVIL.split())
SEEDS = [0, 1, 2, 3, 4]
GAINS = {"A0": -0.05, "A2": 0.0, "A5": 0.02, "S5-0.5": 0.01, "S2-0.5": -0.01}
BASES = {"cola": 0.3, "stsb": 0.8}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def grid_of(text: str) -> dict[str, Any]:
    arms = {name: {"title": f"{text} {name}"} for name in GAINS}
    for name in ("S5-0.5", "S2-0.5"):
        arms[name]["tasks"] = ["cola"]  # type: ignore[assignment]
    rows = {"train": 7696, "holdout": 855, "test": 1043}
    tasks = {
        "cola": {"metric": "matthews_correlation", "metrics": ["matthews_correlation"], "rows": rows},
        "stsb": {"metric": "spearmanr", "metrics": ["spearmanr", "pearson"]},
    }
    series = {f"{text} own": {"0.5": "S5-0.5", "1.0": "A5"}, f"{text} random": {"0.5": "S2-0.5", "1.0": "A2"}}
    return {
        "name": "corpus",
        "title": f"{text} title",
        "scale": "reduced",
        "baseline": "A2",
        "arms": arms,
        "tasks": {name: {"title": f"{text} {name}", "seeds": SEEDS, **task} for name, task in tasks.items()},
        "hypotheses": [
            {"name": "H1", "claim": f"{text} relevance", "pairs": [["A5", "A2"]], "test": "greater", "margin": 0.0},
            {"name": "H3", "claim": "no loss", "pairs": [["A0", "A2"]], "test": "not_worse", "margin": 1.0},
        ],
        "curves": [{"title": f"{text} curve", "task": "cola", "series": series}],
        "tune": [{"name": "stage1", "values": [3e-4, 1e-3, 3e-3]}],
        "budget": {"tokens": 500_000, "training_tokens": 1_500_000},
        "bank": {"sentences": 812_345, "sources": [text]},
        "machine": {"processor": text},
    }


def run_of(task: str, arm: str, seed: int, score: float) -> dict[str, Any]:
    steps = {"task": 330} if arm == "A0" else {"corpus": 366, "task": 330}
    score += 0.001 * (seed - 2) * (1 + (arm == "A5"))
    return {
        "task": task,
        "arm": arm,
        "seed": seed,
        "status": "ok",
        "error": None,
        "rates": {"stage1": None if arm == "A0" else 3e-3 if arm == "A5" else 1e-3},
        "holdout": score,
        "scores": {"matthews_correlation": score} if task == "cola" else {"spearmanr": score, "pearson": score + 0.05},
        "agreement": 0.875 if task == "cola" else None,
        "steps": steps,
        "tokens": {name: 4096 * count for name, count in steps.items()},
        "final_terms": {} if arm == "A0" else {"corpus": {"loss": 1.0, "hidden": 0.3125}, "task": {"soft_labels": 1.0}},
        "seconds": 210.0,
    }


def corpus_of(text: str) -> dict[str, Any]:
    examples = [{"anchor": f"{text} anchor", "hits": [f"{text} hit", "another"]}]
    described = {"distinct_1": 0.123, "overlap": 0.456}
    return {"sentences": 21_034, "mean_words": 19.34, "described": described, "examples": examples}


def folder_of(folder: Path, text: str = "plain", plan_only: bool = False) -> Path:
    """A whole grid in which every text of the data is `text`."""
    grid = grid_of(text)
    write(folder / "grid.json", grid)
    for task in () if plan_only else BASES:
        write(
            folder / task / "teacher.json", {"task": task, "scores": {grid["tasks"][task]["metric"]: BASES[task] + 0.1}}
        )
        for arm in GAINS:
            if task in grid["arms"][arm].get("tasks", BASES):
                for seed in SEEDS:
                    write(folder / task / arm / f"seed-{seed}.json", run_of(task, arm, seed, BASES[task] + GAINS[arm]))
                write(folder / task / arm / "corpus.json", corpus_of(text))
                runs = [
                    {"rates": {"stage1": 1e-3}, "holdout": 0.3, "status": "ok"},
                    {"rates": {"stage1": 3e-3}, "holdout": None, "status": "failed", "error": text},
                ]
                write(folder / task / arm / "tuning.json", {"runs": runs, "chosen": {"stage1": 1e-3}})
    return folder


def change(folder: Path, name: str, **more: Any) -> None:
    write(folder / name, json.loads((folder / name).read_text()) | more)


def tables_of(page: str) -> list[list[list[str]]]:
    """Every table as rows of cells, as a reader of Markdown sees them."""
    tables: list[list[list[str]]] = []
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(page)
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type == "inline" and before is not None and before.type in ("th_open", "td_open"):
            tables[-1][-1].append(text_of(token))
    return tables


def text_of(token: Any) -> str:
    return "".join(child.content for child in token.children or ())


def table(page: str, header: str) -> dict[str, dict[str, str]]:
    """First cell -> header -> cell, of the first table that has this header."""
    found = next(rows for rows in tables_of(page) if header in rows[0])
    return {row[0]: dict(zip(found[0], row, strict=True)) for row in found[1:]}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "results")


def test_verdicts_come_first_with_their_numbers(whole: Path) -> None:
    page = render(whole)
    first = page[: page.index("## Scores")]
    assert "- **H1 holds.** Plain relevance. A5 (plain A5) is 2.0 points above A2 (plain A2): 95 % interval" in first
    assert "10 pairs. Every interval lies above 0, and p is 0.0039 after correction." in first
    assert "- **H3 does not hold.** No loss. A0 (plain A0) is 5.0 points below A2 (plain A2)" in first
    assert "An interval lies below the margin of -1.0." in first
    assert (
        "Of 40 final trainings 40 are done, 0 failed and 0 are still to come; 16 served to choose rates (8 failed)"
        in first
    )
    assert "812,345 sentences" in first
    assert "500,000 tokens" in first
    assert "unfinished" not in first


def test_a_pair_that_is_not_run_on_every_task_says_on_which(whole: Path) -> None:
    pairs = [["A5", "A2"], ["A5", "S2-0.5"]]
    change(
        whole,
        "grid.json",
        hypotheses=[{"name": "H1", "claim": "both", "pairs": pairs, "test": "greater", "margin": 0.0}],
    )
    page = render(whole)
    assert "10 pairs; A5 (plain A5) is 3.0 points above S2-0.5 (plain S2-0.5): 95 % interval" in page
    assert "5 pairs (of plain cola only). " in page
    assert page.count(" only)") == 1
    assert table(page, "claim")["H1"]["tasks"] == "1 of 1"


def test_the_page_says_where_rows_are_drawn_and_where_not(whole: Path) -> None:
    page = render(whole)
    assert "Rows are not drawn, since what was said of each was not kept" in page
    assert "McNemar" not in page
    gold = np.arange(1000) % 2
    for arm in ("A5", "A2", "A0"):
        for seed in SEEDS:
            said = gold.copy()
            said[: 100 + 10 * seed] ^= 1
            answers = RowAnswers.of(np.eye(2)[said], gold)
            answers.save(rows_file(whole, ("cola", arm, seed)))
            score = METRICS["matthews_correlation"].function(answers.outputs, answers.labels)
            change(whole, f"cola/{arm}/seed-{seed}.json", scores={"matthews_correlation": score})
    page = render(whole)
    assert "but not where what was said of each was not kept: A5 − A2 (plain stsb), A0 − A2 (plain stsb)." in page
    assert "McNemar's exact test asks" in page
    assert "| A5 − A2 | plain cola |" in page
    assert "| 1, 1, 1, 1, 1 |" in page


def test_scores_are_means_and_deviations_in_points_beside_the_teacher(whole: Path) -> None:
    scores = table(render(whole), "average")
    assert scores["teacher"] == {"arm": "teacher", "plain cola": "40.0", "plain stsb": "90.0", "average": "65.0"}
    assert scores["A5: plain A5"]["plain cola"] == "32.0 ± 0.3"
    assert scores["A5: plain A5"]["average"] == "57.0"
    assert scores["A0: plain A0"]["plain stsb"] == "75.0 ± 0.2"


def test_arms_that_are_only_points_of_a_curve_stay_out_of_the_main_table(whole: Path) -> None:
    assert list(table(render(whole), "average")) == ["teacher", "A0: plain A0", "A2: plain A2", "A5: plain A5"]


def test_only_what_is_clearly_best_is_bold(whole: Path) -> None:
    """Five seeds of a task are never enough; ten pairs over two tasks can be."""
    page = render(whole)
    assert "| **57.0** |" in page
    assert page.count("**57.0**") == 1
    assert "**32.0" not in page
    for task in BASES:
        for seed in SEEDS:
            write(whole / task / "A5" / f"seed-{seed}.json", run_of(task, "A5", seed, BASES[task]))
    assert not re.search(r"\| \*\*[\d.]+", render(whole))


def test_differences_stand_pair_by_pair_and_task_by_task(whole: Path) -> None:
    page = render(whole)
    pairs = table(page, "tested value")
    assert pairs["H1"]["difference"] == "+2.0"
    assert (pairs["H1"]["pairs"], pairs["H1"]["tasks"], pairs["H1"]["tested value"]) == ("10 of 10", "2 of 2", "0")
    assert (pairs["H3"]["pair"], pairs["H3"]["tested value"]) == ("A0 − A2", "-1.0")
    (by_task,) = [rows for rows in tables_of(page) if "smallest" in rows[0]]
    assert by_task[1] == ["A5 − A2", "plain cola", "+2.0", "+1.9 to +2.1", "+1.8", "+2.2", "5 of 5"]
    assert len(by_task) == 1 + 2 * 2


def test_an_empty_grid_renders_and_says_so(tmp_path: Path) -> None:
    page = render(folder_of(tmp_path, plan_only=True))
    assert "Of 40 final trainings 0 are done, 0 failed and 40 are still to come; 0 served" in page
    assert "The grid is unfinished" in page
    assert "**H1 is unfinished.** Plain relevance. So far A5" in page
    assert "A5 (plain A5) and A2 (plain A2) cannot be compared: 0 of 10 pairs" in page
    assert table(page, "average")["A5: plain A5"] == {
        "arm": "A5: plain A5",
        "plain cola": "0 of 5",
        "plain stsb": "0 of 5",
        "average": "0 of 10",
    }
    assert "![" not in page
    assert figures(summarise(tmp_path)) == {}
    for said in ("No agreement", "No corpus has been built", "No rate is known", "is not known."):
        assert said in page


def test_half_a_grid_marks_every_mean_of_fewer_seeds(whole: Path) -> None:
    for seed in (3, 4):
        (whole / "cola" / "A5" / f"seed-{seed}.json").unlink()
    page = render(whole)
    scores = table(page, "average")["A5: plain A5"]
    assert scores["plain cola"].endswith(" (3 of 5)")
    assert scores["plain stsb"] == "82.0 ± 0.3"
    assert scores["average"].endswith(" (8 of 10)")
    assert "**H1 is unfinished.** Plain relevance. So far A5" in page
    assert "8 of 10 pairs. Trainings of these arms are still to come, so there is no verdict." in page
    assert "- Still to come: plain cola, A5, seeds 3, 4" in page
    assert table(page, "1")["plain own"]["1"].endswith(" (3 of 5)")
    assert "87.5 (3 of 5)" in page


def test_failures_are_listed_and_the_verdict_counts_what_is_left(whole: Path) -> None:
    change(whole, "cola/A5/seed-1.json", status="failed", error="the loss is nan at step 40")
    page = render(whole)
    assert "39 are done, 1 failed and 0 are still to come" in page
    assert "- Failed: plain cola, A5, seed 1: the loss is nan at step 40" in page
    assert "**H1 holds.**" in page
    assert "9 of 10 pairs" in page
    (seeds,) = [rows for rows in tables_of(page) if "seed 4" in rows[0]]
    assert seeds[3][:4] == ["plain cola", "A5", "31.6", "failed"]


def test_a_tie_is_not_shown(whole: Path) -> None:
    for task in BASES:
        for seed in SEEDS:
            change(
                whole,
                f"{task}/A5/seed-{seed}.json",
                scores=json.loads((whole / task / "A2" / f"seed-{seed}.json").read_text())["scores"],
            )
    page = render(whole)
    assert "**H1 is not shown.**" in page
    assert "A5 (plain A5) is level with A2 (plain A2): 95 % interval +0.0 to +0.0" in page
    assert "No interval above 0: A5 − A2." in page


def test_unequal_cost_is_a_warning(whole: Path) -> None:
    assert "plain cola: largest deviation from A2 in tokens 0.00 % (A5), in steps 0.00 % (A5)." in render(whole)
    assert "so not compared: A0." in render(whole)
    assert "Warning" not in render(whole)
    for seed in SEEDS:
        change(whole, f"cola/A5/seed-{seed}.json", steps={"corpus": 380, "task": 330})
    page = render(whole)
    assert "in steps 3.83 % (A5)" in page
    assert "Warning: more than 1 % apart, so not at equal cost: A5." in page


def test_rates_show_edges_and_mixtures(whole: Path) -> None:
    page = render(whole)
    (rates,) = [rows for rows in tables_of(page) if rows[0] == ["task", "arm", "stage1"]]
    assert rates[1:4] == [["plain cola", "A0", "–"], ["plain cola", "A2", "0.001"], ["plain cola", "A5", "0.003 †"]]
    (tried,) = [rows for rows in tables_of(page) if "held-out score" in rows[0]]
    assert tried[1] == ["plain cola", "A0", "0.001", "30.0", "chosen"]
    assert tried[2] == ["plain cola", "A0", "0.003", "–", "failed"]
    change(whole, "cola/A2/seed-3.json", rates={"stage1": 3e-4})
    assert "- Warning: the seeds of A2 on plain cola were trained with different rates" in render(whole)


def test_corpora_and_terms_are_shown_where_known(whole: Path) -> None:
    page = render(whole)
    corpora = next(rows for rows in tables_of(page) if "words a sentence" in rows[0])
    assert corpora[0] == ["task", "arm", "sentences", "words a sentence", "distinct words, %", "overlap with task, %"]
    assert corpora[1] == ["plain cola", "A0", "21,034", "19.3", "12.3", "45.6"]
    assert "“plain anchor” found “plain hit”, “another”" in page
    assert "Loss term `hidden`" in page
    assert "`soft_labels`" not in page
    assert "0.3125" in page


def test_described_corpora_may_be_several_of_one_measurement(whole: Path) -> None:
    several = {"sample_words": 1000, "corpora": {"corpus": {"distinct_1": 0.25}, "random": {"distinct_1": 0.5}}}
    change(whole, "cola/A0/corpus.json", described=several)
    corpora = next(rows for rows in tables_of(render(whole)) if "words a sentence" in rows[0])
    assert dict(zip(corpora[0], corpora[1], strict=True)) | {
        "distinct words, %": "25.0",
        "measured on words": "1,000",
    } == dict(zip(corpora[0], corpora[1], strict=True))


def test_a_file_outside_the_plan_is_named(whole: Path) -> None:
    write(whole / "cola" / "A5" / "seed-9.json", {})
    assert "In no number here, since the plan does not hold it: cola/A5/seed-9.json" in render(whole)


def test_how_to_do_it_again(whole: Path) -> None:
    assert "openbook experiment experiments/corpus.yaml --scale reduced" in render(whole)


def test_any_text_is_shown_as_it_is(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, EVIL)
    change(folder, "cola/A5/seed-1.json", status="failed", error=EVIL)
    page = render(folder)
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(page)
    html = "".join(token.content for token in tokens if token.type == "html_block")
    inline = [child for token in tokens for child in token.children or ()]
    assert {re.sub(r"<(/?\w+).*", r"\1", tag) for tag in re.findall(r"<[^>]*>", html)} <= {
        "details",
        "/details",
        "summary",
        "/summary",
    }
    assert not [child for child in inline if child.type == "html_inline"]
    assert {child.attrs["href"] for child in inline if child.type == "link_open"} == {"#how-the-numbers-are-made"}
    text = "\n".join(text_of(token) for token in tokens if token.type == "inline")
    for ending in ("title", "relevance", "A5", "cola", "own", "anchor", "hit"):
        assert f"{SHOWN} {ending}" in text
    assert f"seed 1: {SHOWN}" in text
    assert all(len({len(row) for row in rows}) == 1 for rows in tables_of(page))
    assert "<script" not in page
    assert "{{" not in page


def test_publish_writes_the_page_and_every_figure_it_shows(whole: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "results" / "corpus.md"
    publish(whole, page)
    written = {path.name: path.read_bytes() for path in page.parent.iterdir()}
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())
    assert shown == ["corpus-curve-1.svg"]
    assert set(written) == {"corpus.md", *shown}
    publish(whole, page)
    assert {path.name: path.read_bytes() for path in page.parent.iterdir()} == written
    assert page.read_text() == render(whole) == markdown(summarise(whole))


def luminance(color: str) -> float:
    shares = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_figure_stands_alone_and_is_legible_on_white_and_on_black(whole: Path) -> None:
    (drawing,) = figures(summarise(whole)).values()
    root = ElementTree.fromstring(drawing)
    assert root.attrib["aria-label"] == "plain cola: Matthews correlation, points"
    assert not re.search(r"var\(|url\(http|<script|<image|@import|#0101", drawing)
    used = set(re.findall(r"#[0-9a-f]{6}", drawing)) - {"#000000", "#ffffff"}
    assert used <= set(plots.ANYWHERE.values())
    assert len(used) >= 3
    for color in plots.ANYWHERE.values():
        for page in ("#ffffff", "#0d1117"):
            low, high = sorted((luminance(color), luminance(page)))
            assert (high + 0.05) / (low + 0.05) > (4 if color == plots.ANYWHERE["ink"] else 3)


def test_a_figure_shows_every_point_of_every_series(whole: Path) -> None:
    (drawing,) = figures(summarise(whole)).values()
    texts = [element.text for element in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")]
    assert {"plain own", "plain random", "share of the corpus"} <= set(texts)
    (whole / "cola" / "S2-0.5" / "seed-0.json").unlink()
    assert figures(summarise(whole)) != {"corpus-curve-1.svg": drawing}
    for seed in SEEDS:
        (whole / "cola" / "S5-0.5" / f"seed-{seed}.json").unlink()
        (whole / "cola" / "A5" / f"seed-{seed}.json").unlink()
    assert "plain own" not in figures(summarise(whole))["corpus-curve-1.svg"]


def test_the_curve_says_which_share_was_best(whole: Path) -> None:
    assert "plain own: best on held-out rows (first seed) is the largest share, 1." in render(whole)
    change(whole, "cola/S5-0.5/seed-0.json", holdout=0.9)
    page = render(whole)
    assert "plain own: best on held-out rows (first seed) is the share 0.5. On the reported rows S5-0.5" in page
    assert "S5-0.5 (plain S5-0.5) is 1.0 points below A5 (plain A5)" in page
    (whole / "cola" / "S5-0.5" / "seed-0.json").unlink()
    assert "plain own: which share is best is known when the first seed of each is done." in render(whole)
