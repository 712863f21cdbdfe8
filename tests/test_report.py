"""The report says what the numbers say, shows any text as it is, and needs nothing from outside."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from openbook import plots
from openbook.findings import comparison, points
from openbook.provenance import Ingredient
from openbook.report import Report, Shipped, console_table, html, markdown, model_card, verdicts

EVIL = "<script>alert('|`*_[x](y)&amp;')</script> | a || b\n# not a heading $x$"
SHOWN = " ".join(EVIL.split())
VOID = {"meta", "br", "link", "img", "input", "hr"}


def model(name: str, scores: list[float], sd: float, millions: float, p50: float, **more: Any) -> dict[str, Any]:
    size = int(millions * 1e6)
    latency = {"p50": p50, "p95": 2 * p50}
    known = {"parameters": size, "bytes": 4 * size, "latency_ms": latency, "throughput": 1000 / p50, "agreement": 0.9}
    return {"name": name, "scores": scores, "mean": sum(scores) / len(scores), "sd": sd, **known, **more}


def versus(a: str, b: str, difference: float, low: float, high: float) -> dict[str, Any]:
    return {"a": a, "b": b, "difference": difference, "low": low, "high": high}


def tuned(kept: bool, gain: float) -> dict[str, Any]:
    found = {"top_k": 8, "temperature": 0.1, "beta": 0.6 if kept else 1.0, "score": 0.8 + gain, "baseline_score": 0.8}
    return {**found, "gain": gain, "standard_error": 0.01, "kept": kept}


def example(text: str) -> dict[str, Any]:
    neighbour = {"text": text, "label": text, "similarity": 0.9, "weight": 0.75, "contribution": 0.3}
    answer = {"text": text, "gold": text, "prediction": text, "alone": text, "probability": 0.625}
    return {**answer, "decisive": True, "right": False, "neighbours": [neighbour]}


def curve(*stages: str) -> list[dict[str, Any]]:
    return [
        {"stage": stage, "step": step, "loss": 1 / step, "learning_rate": 0.1} for stage in stages for step in (1, 9)
    ]


def report_of(text: str = "plain", **results: Any) -> Report:
    """A whole report in which every text of the data is `text`."""
    models = [
        model("teacher", [0.9], 0.0, 20.0, 8.0, agreement=1.0),
        model("student-labels", [0.8, 0.82], 0.014, 4.0, 2.0),
        model("student-corpus", [0.84, 0.86], 0.014, 4.0, 2.0, agreement=0.912),
        model("student-open-book", [0.85, 0.86], 0.007, 4.0, 2.5, book_bytes=34_000),
    ]
    scored = {"task": text, "kind": "classification", "metric": "accuracy", "split": "test", "rows": 500}
    setting = {
        "labels": [text, "other"],
        "seeds": [0, 1],
        "models": models,
        "timing": {"threads": 2, "processor": text},
    }
    comparisons = [versus("student-corpus", "student-labels", 0.034, 0.019, 0.048)]
    measures = {"distinct_1": 0.1, "distinct_2": 0.5, "distinct_3": 0.9, "overlap": 0.4}
    return Report(
        run=text,
        teacher_model=text,
        results={**scored, **setting, "comparisons": comparisons, **results},
        histories={"teacher": curve("fine-tuning"), "student-corpus": curve("corpus", "task")},
        corpus={
            "anchors": 4906,
            "unique_fraction": 0.41,
            "mean_words": 21.34,
            "bank": {"documents": 11832, "leaked": 87},
            "described": {"sample_words": 9, "corpora": {"corpus": measures, "random": measures, "task": measures}},
            "examples": [{"anchor": text, "hits": [text, text]}],
        },
        tuning=[tuned(True, 0.02), tuned(False, 0.0)],
        examples=[example(text)],
        stages={"teacher": 143.2, "corpus": 8.06},
        environment={"torch": text},
        recipe=yaml.safe_dump({"name": text}),
        data_notes=[text],
    )


class Page(HTMLParser):
    """Tags, attributes and text as a browser reads them; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parsed(text: str) -> list[Any]:
    """Every token of a Markdown text, with tables, as an independent parser reads it."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [inner for token in tokens for inner in (token, *(token.children or ()))]


# What it says


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            versus("student-corpus", "student-labels", 0.034, 0.019, 0.048),
            "student-corpus is 3.4 points above student-labels (95 % interval 1.9 to 4.8). "
            "That is what the teacher together with the retrieved corpus bought.",
        ),
        (
            versus("student-kd", "student-labels", 0.012, 0.0, 0.024),
            "No gain: student-kd is 1.2 points above student-labels, but the 95 % interval (0.0 to 2.4) includes 0: "
            "imitating the teacher on the task's own text has not been shown to help.",
        ),
        (
            versus("student-open-book", "student-corpus", -0.004, -0.008, 0.0),
            "No gain: student-open-book is 0.4 points below student-corpus, and the 95 % interval (-0.8 to 0.0) "
            "includes 0: looking up neighbours in the book has not been shown to help.",
        ),
        (
            versus("student-corpus", "student-kd", -0.02, -0.03, -0.01),
            "student-corpus is 2.0 points below student-kd (95 % interval 1.0 to 3.0 below). "
            "Here the retrieved corpus did harm.",
        ),
        (
            versus("student-corpus", "teacher", -0.02, -0.03, -0.01),
            "student-corpus is 2.0 points below the teacher (95 % interval 1.0 to 3.0 below).",
        ),
        (
            versus("student-corpus", "teacher", 0.001, -0.01, 0.012),
            "No difference shown: student-corpus is 0.1 points above the teacher, "
            "but the 95 % interval (-1.0 to 1.2) includes 0.",
        ),
        (
            versus("student-open-book", "student-corpus", 0.0, 0.0, 0.0),
            "No gain: student-open-book is level with student-corpus, and the 95 % interval (0.0 to 0.0) includes 0: "
            "looking up neighbours in the book has not been shown to help.",
        ),
    ],
)
def test_a_comparison_counts_only_when_its_interval_leaves_out_zero(row: dict[str, Any], sentence: str) -> None:
    assert verdicts(report_of(comparisons=[row]))[1] == sentence


def test_the_first_verdict_says_what_the_student_keeps_at_what_size_and_speed() -> None:
    assert verdicts(report_of())[0] == (
        "The student (student-corpus) keeps 94.4 % of the teacher's accuracy (85.0 against 90.0 points) with 4.0 M "
        "parameters instead of 20.0 M, and answers a single text 4.0 times faster (median 2.0 ms instead of 8.0 ms). "
        "It gives the teacher's answer to 91.2 % of the texts."
    )


def test_a_slower_student_and_a_teacher_without_skill_are_called_so() -> None:
    models = [model("teacher", [-0.1], 0.0, 20.0, 2.0), model("student-labels", [0.2], 0.0, 4.0, 3.0, agreement=None)]
    assert verdicts(report_of(models=models, comparisons=[], metric="matthews_correlation"))[0] == (
        "The student (student-labels) has 20.0 against -10.0 points of Matthews correlation with 4.0 M parameters "
        "instead of 20.0 M, and answers a single text 1.5 times slower (median 3.0 ms instead of 2.0 ms)."
    )


@pytest.mark.parametrize(
    ("tuning", "start"),
    [
        ([tuned(True, 0.02), tuned(True, 0.04)], "The book is open with 2 of 2 seeds: on rows held out of training it "
         "gained 3.0 points on average. It costs 0.034 MB and +0.5 ms a text (median)."),
        ([tuned(True, 0.02), tuned(False, 0.0)], "The book is open with 1 of 2 seeds: on rows held out of training it "
         "gained 1.0 points on average; with the others it did not clearly help"),
        ([tuned(False, 0.004), tuned(False, 0.0)], "No gain: the book stays closed with every seed, since it did not "
         "clearly help (on rows held out of training it gained 0.2 points on average)."),
    ],
)  # fmt: skip
def test_the_last_verdict_says_whether_the_book_was_opened(tuning: list[dict[str, Any]], start: str) -> None:
    assert verdicts(replace(report_of(), tuning=tuning))[-1].startswith(start)


def test_the_table_shows_points_with_deviations_and_what_they_cost() -> None:
    assert comparison(report_of()) == {
        "model": ["teacher", "student-labels", "student-corpus", "student-open-book"],
        "accuracy, points": ["90.0", "81.0 ± 1.4", "85.0 ± 1.4", "85.5 ± 0.7"],
        "gain over student-labels": ["+9.0", "–", "+4.0", "+4.5"],
        "parameters": ["20.0 M", "4.0 M", "4.0 M", "4.0 M"],
        "size, MB": ["80.0", "16.0", "16.0", "16.0 + 0.034 book"],
        "ms a text, p50 / p95": ["8.0 / 16.0", "2.0 / 4.0", "2.0 / 4.0", "2.5 / 5.0"],
        "throughput / teacher's": ["1.0 x", "4.0 x", "4.0 x", "3.2 x"],
        "agrees with teacher": ["100.0 %", "90.0 %", "91.2 %", "90.0 %"],
    }


def test_the_terminal_shows_the_same_table_and_takes_no_name_for_markup() -> None:
    named = model("[red]student[/red]", [0.8], 0.0, 4.0, 2.0)
    report = report_of(models=[model("teacher", [0.9], 0.0, 20.0, 8.0), named], comparisons=[])
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(console_table(report))
    lines = capture.get().splitlines()
    assert "plain, compressed for plain: 20.0 M to 4.0 M parameters" in lines[0]
    assert any("[red]student[/red]" in line and "80.0" in line and "4.0 x" in line for line in lines)


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [(0.8456, "84.6"), (0.0004, "0.04"), (-0.0003, "-0.03"), (-0.00001, "0.0"), (0.0, "0.0"), (-0.0005, "-0.1")],
)
def test_points_never_hide_a_difference_nor_show_a_negative_zero(fraction: float, shown: str) -> None:
    assert points(fraction) == shown


# How it says it


def test_html_shows_every_text_as_it_is() -> None:
    page = Page(html(report_of(EVIL)))
    assert page.tags["script"] == 0
    assert page.tags["section"] == 1
    flat = " ".join(page.text.split())
    shown = flat.count("<script>alert('|`*_[x](y)&amp;')</script> | a || b # not a heading $x$")
    # run, title twice (head, h1), each naming teacher and task; example 4, neighbour 2, anchor 1, hits 2, note,
    # processor, environment
    assert shown == 1 + 4 + 4 + 2 + 1 + 2 + 1 + 1 + 1


def test_html_is_whole_in_itself() -> None:
    text = html(report_of())
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert links
    assert all(value and value.startswith("#") for value in links)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert page.tags["svg"] == 5  # two of scores, two of losses, one of the corpus
    assert "prefers-color-scheme: dark" in text


def test_html_leads_with_the_outcome_then_the_table_then_the_verdicts() -> None:
    text = Page(html(report_of())).text
    order = ["compressed for plain", *verdicts(report_of())[:1], "accuracy, points", *verdicts(report_of())[1:]]
    places = [text.index(part, text.index("openbook report of")) for part in (*order, "Score against cost", "Limits")]
    assert places == sorted(places)


def test_the_same_report_gives_the_same_page() -> None:
    assert html(report_of()) == html(report_of())


def test_markdown_tables_survive_pipes_and_tags() -> None:
    models = [*report_of().results["models"], model(EVIL, [0.8], 0.0, 4.0, 2.0)]
    tokens = parsed(markdown(report_of(EVIL, models=models)))
    kinds = Counter(token.type for token in tokens)
    assert kinds["html_block"] == kinds["html_inline"] == kinds["link_open"] == kinds["code_inline"] == 0
    cells = [inline.content for opened, inline in zip(tokens, tokens[1:], strict=False) if opened.type == "td_open"]
    texts = ["".join(inner.content for inner in token.children) for token in tokens if token.type == "inline"]
    assert len(cells) == 5 * 8 + 2 * 7 + 5 + 2 * 5 + 2 * 2 + 2  # models, tuning, neighbour, corpus, stages, versions
    assert texts.count(f"“{SHOWN}”") == 1 + 1  # the example and its neighbour
    assert texts.count(SHOWN) == 1 + 1 + 1  # the model, the teacher's answer to the neighbour, the version


@settings(max_examples=40, deadline=None)
@given(st.text("ab |\\`*_{}[]()<>#+-.!~&$;:/'\"=\n\té–", max_size=30))
def test_any_text_reads_the_same_in_markdown(text: str) -> None:
    tokens = parsed(markdown(replace(report_of(), data_notes=[text])))
    texts = ["".join(inner.content for inner in token.children) for token in tokens if token.type == "inline"]
    assert " ".join(f"Note: {text}".split()) in texts


def test_a_fence_in_the_recipe_does_not_end_its_code_block() -> None:
    recipe = "name: |\n  ```\n  ````\nlast: line\n"
    fences = [token.content for token in parsed(markdown(replace(report_of(), recipe=recipe))) if token.type == "fence"]
    assert fences == [recipe]


def test_long_texts_are_cut_and_pairs_stay_on_one_line() -> None:
    text = markdown(replace(report_of(), examples=[example("one\ttwo " + 400 * "x")]))
    assert f"“one / two {'x' * 289}…”" in text  # 299 characters of text, then the ellipsis


# The model card


def front_matter(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
    assert found
    loaded = yaml.safe_load(found[1])
    assert isinstance(loaded, dict)
    return loaded


def test_the_card_names_its_base_model_data_and_score() -> None:
    recipe = yaml.safe_dump({"task": {"train": {"kind": "hub", "dataset": "org/questions"}}})
    report = replace(report_of("trec"), run="my_run", teacher_model="org/large-model", recipe=recipe)
    card = model_card(report)
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "base_model": "org/large-model",
        "base_model_relation": "finetune",
        "datasets": ["org/questions"],
        "metrics": ["accuracy"],
        "tags": ["knowledge-distillation", "contextualized-corpus", "retrieval-augmented", "openbook"],
        "model-index": [
            {
                "name": "my_run",
                "results": [
                    {
                        "task": {"type": "text-classification", "name": "Text Classification"},
                        "dataset": {"type": "org/questions", "name": "trec", "split": "test"},
                        "metrics": [{"type": "accuracy", "name": "accuracy", "value": 0.85}],
                    }
                ],
            }
        ],
    }
    code = [token.content for token in parsed(card.split("---\n", maxsplit=2)[2]) if token.type == "fence"]
    assert 'model="runs/my_run/student"' in code[0]
    assert '"runs/my_run"' in code[1]
    for snippet in code[:2]:
        compile(snippet, "card", "exec")


def test_the_card_parses_whatever_the_texts_are_and_claims_no_base_model_that_is_no_hub_id() -> None:
    card = model_card(report_of(EVIL + "\n---\n: - {"))
    metadata = front_matter(card)
    assert "base_model" not in metadata
    assert "base_model_relation" not in metadata
    assert metadata["model-index"][0]["name"] == EVIL + "\n---\n: - {"
    assert re.fullmatch(r"[\w.-]+", metadata["datasets"][0])


def test_the_card_sums_up_the_training() -> None:
    optim = {"epochs": 3.0, "learning_rate": 0.001}
    corpus = {"terms": {"gold": 0.0, "soft_labels": 1.0, "hidden": 0.5, "neighbours_temperature": 2.0}, "optim": optim}
    recipe = {"student": {"layers": 3, "hidden_size": 128, "heads": 4}, "distill": {"corpus": corpus, "task": corpus}}
    card = model_card(replace(report_of(), recipe=yaml.safe_dump(recipe, sort_keys=False)))
    assert "- student: 3 layers of width 128 with 4 attention heads" in card
    assert "- first, on the corpus: 3 epochs, learning rate 0.001, losses: soft labels, hidden\n" in card


def test_no_local_place_gets_into_the_card() -> None:
    files = {"kind": "file", "path": "/home/ann/private/train.csv"}
    recipe = {"task": {"train": files, "max_length": 40}, "teacher": {"model": "/home/ann/models/big"}}
    hub = {**recipe, "task": {"train": {"kind": "hub", "dataset": "/home/ann/sets/mine"}}}
    environment = {"platform": "Linux of ann", "torch": "2"}
    for one in (recipe, hub):
        report = replace(report_of(), recipe=yaml.safe_dump(one), environment=environment)
        card = model_card(replace(report, teacher_model="/home/ann/models/big"))
        assert "ann" not in card
        assert "distilled from big with" in card
    assert front_matter(card)["datasets"] == ["mine"]
    assert "path: train.csv" in model_card(replace(report_of(), recipe=yaml.safe_dump(recipe)))


def test_the_card_says_when_not_to_use_the_student() -> None:
    recipe = yaml.safe_dump({"task": {"name": "trec", "max_length": 40}, "corpus": {"language": "de", "sources": []}})
    card = model_card(replace(report_of("trec"), recipe=recipe))
    asked = card.split("## When not to use it")[1].split("##")[0]
    for told in ("one of its labels to every text", "prepared as “de”", "reads 40 word-pieces", "were not calibrated"):
        assert told in asked
    assert "of the family “question”" in card
    without = model_card(replace(report_of("trec"), recipe=recipe, corpus={}))
    assert "languages" not in without


def test_the_card_of_a_pair_task_shows_pairs() -> None:
    card = model_card(replace(report_of("rte"), recipe=yaml.safe_dump({"task": {"name": "rte"}})))
    assert "gives a pair of texts one of the 2 labels of the task rte" in card
    assert 'classify({"text": "a text", "text_pair": "another"})' in card
    assert 'model.predict(("a text", "another"))' in card


def test_the_card_of_a_packed_folder_names_it_and_claims_only_what_is_there() -> None:
    export = {"parity": {"rows": 99, "onnx": {"largest_difference": 3e-7}}, "timing": {"onnx": {"batch 1": 0.5}}}
    files = {"student/onnx/model.onnx": 5_000_000, "knowledge_base/data/keys.npy": 2_000_000}
    book = {"M": 1234, "d": 8, "form": "sq8", "retrieval": {"beta": 1.0}}
    parts = (Ingredient("teacher", "org/x_y", "mit"),)
    shipped = Shipped("my model_1", ("onnx",), "onnx", export, book, True, 1, "mit", parts, files)
    card = model_card(report_of(), shipped)
    assert front_matter(card)["license"] == "mit"
    assert front_matter(card)["model-index"][0]["name"] == "my model_1"
    assert front_matter(card)["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.86
    code = [token.content for token in parsed(card.split("---\n", maxsplit=2)[2]) if token.type == "fence"]
    assert 'from_pretrained("my-model_1")' in code[1]
    assert "openbook serve --model my-model_1 --backend onnx\n" in code[2]
    assert "compared with torch on 99 real rows" in card
    assert "There are no torch weights in it" in card
    assert "1,234 of them, word for word" in card
    assert "stored as sq8; closed, since it did not help" in card
    assert "`knowledge_base/`: the book, 2.0 MB" in card
    assert "- teacher: org/x\\_y; licence: mit" in card
    plain = model_card(report_of(), Shipped("m"))
    assert "license" not in front_matter(plain)
    assert "onnx" not in plain
    assert "stores" not in plain.split("## Limits")[0]
    assert "`student/`: configuration and tokenizer" in plain


# Other tasks, and parts that are not there


def test_several_labels_are_told_as_a_list() -> None:
    report = report_of(kind="multi_label", metric="micro_f1")
    one = {**example("plain"), "gold": ["joy", "fear"], "prediction": ["fear"], "alone": [], "right": False}
    one |= {"decisive": False, "neighbours": [{**one["neighbours"][0], "label": ["joy", "anger"]}]}
    report = replace(report, examples=[one])
    page = " ".join(Page(html(report)).text.split())
    assert "Predicted fear wrong gold label: joy, fear · without the book: no label" in page
    assert "joy, anger" in page
    assert "Predicted “fear”, wrong; gold “joy, fear”; without the book “no label”." in markdown(report)
    assert "micro F1, points" in markdown(report)
    assert "one of its labels" not in model_card(report)


def test_regression_has_scores_instead_of_labels() -> None:
    models = [model(name, [0.8], 0.0, 4.0, 2.0, agreement=None) for name in ("teacher", "student-labels")]
    report = report_of(kind="regression", metric="pearson", labels=None, models=models, comparisons=[])
    number = {
        **example("plain"),
        "gold": 3.0,
        "prediction": 3.456,
        "alone": 2.5,
        "probability": None,
        "decisive": False,
    }
    number["decisive"] = False
    number["neighbours"] = [{**number["neighbours"][0], "label": 4.25}]
    report = replace(report, examples=[number])
    page = " ".join(Page(html(report)).text.split())
    assert "Predicted 3.46 gold score: 3.00 · without the book: 2.50" in page
    assert "4.25" in page
    assert "Predicted “3.46”; gold “3.00”; without the book “2.50”." in markdown(report)
    assert "agrees with teacher" not in comparison(report)
    assert "Pearson correlation, points" in comparison(report)
    assert "one row is worth" not in page
    card = model_card(report)
    assert front_matter(card)["metrics"] == ["pearsonr"]
    assert "Labels:" not in card


def test_a_run_without_corpus_book_or_times_has_no_empty_sections() -> None:
    models = [model(name, [0.8], 0.0, 4.0, 2.0, latency_ms=None, throughput=None) for name in ("teacher", "student-kd")]
    report = report_of(models=models, comparisons=[], timing={})
    bare = replace(report, corpus={}, tuning=[], examples=[], histories={}, stages={}, data_notes=[])
    for text in (html(bare), markdown(bare), model_card(bare)):
        for heading in (
            "The corpus",
            "How the book was set",
            "A few predictions",
            "Learning curves",
            "Notes on the data",
        ):
            assert heading not in text
    assert Page(html(bare)).tags["svg"] == 1
    assert len(verdicts(bare)) == 1
    assert not {"ms a text, p50 / p95", "throughput / teacher's", "gain over student-labels"} & set(comparison(bare))


# The figures


def texts_of(figure: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(figure).iter("{http://www.w3.org/2000/svg}text")]


def test_figures_name_their_points_and_take_their_colours_from_the_page() -> None:
    named = [model("teacher", [0.9], 0.0, 20.0, 8.0), model("<b>$x$", [0.8, 0.9], 0.05, 4.0, 2.0)]
    figure = plots.score_plot(named, [20.0, 4.0], "parameters, millions", "accuracy")
    texts = [text.strip() for text in texts_of(figure)]
    assert {"teacher", "<b>$x$", "parameters, millions", "accuracy, points"} <= set(texts)
    assert "var(--model-0)" in figure
    assert "var(--ink)" in figure
    assert not re.search(r"(fill|stroke): #", figure)


def test_scores_are_drawn_in_points_with_a_bar_for_their_deviation() -> None:
    alone, varied = ([model("teacher", [0.9], sd, 20.0, 8.0)] for sd in (0.0, 0.01))
    figure = plots.score_plot(varied, [20.0], "parameters, millions", "accuracy")
    heights = [float(text) for text in texts_of(figure) if re.fullmatch(r"[\d.]+", text)]
    assert any(88 <= height <= 92 for height in heights)
    tint = "stroke: var(--model-0)"
    assert figure.count(tint) > plots.score_plot(alone, [20.0], "parameters, millions", "accuracy").count(tint)


def test_a_second_training_starts_where_the_first_ended() -> None:
    figure = plots.learning_curve("student-corpus", curve("corpus", "task"))
    assert {"corpus", "task"} <= set(texts_of(figure))
    drawn = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--model-3\)', figure)
    first, second = ([float(x) for x in re.findall(r"[ML] (\S+)", path)] for path in drawn)
    assert max(first) < min(second)


def test_corpus_bars_take_the_corpora_that_are_there() -> None:
    measures = {"distinct_1": 0.14, "distinct_2": 0.62, "distinct_3": 0.91, "overlap": 0.47}
    texts = texts_of(plots.corpus_bars({"corpus": measures}))
    assert {"14", "62", "91", "47", "retrieved"} <= set(texts)
    assert "random" not in texts


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.floats(0.01, 10))
def test_spread_moves_values_apart_and_keeps_their_order(values: list[float], gap: float) -> None:
    given_places = np.array(values)
    apart = plots.spread(given_places, gap)
    order = np.argsort(given_places, kind="stable")
    assert (np.diff(apart[order]) >= gap - 1e-9).all()
    assert apart.mean() == pytest.approx(given_places.mean(), abs=1e-9)
    if (np.diff(given_places[order]) >= gap).all():
        np.testing.assert_allclose(apart, given_places, atol=1e-9)
