"""What a score on a task says of a teacher of several tasks: where its rows come from, and what was seen of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from openbook.config import TaskSettings
from openbook.types import Example

Role = Literal["in-domain", "leaky", "out-domain near", "out-domain far", "low-resource", "low-resource, seen"]

LONG_TEXT = 8  # words from which one text alone, without its pair, makes a row known
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Provenance:
    """What a task is about, and the sources that its texts or annotations were taken from."""

    family: str
    groups: frozenset[str]


def _from(family: str, *groups: str) -> Provenance:
    return Provenance(family, frozenset(groups))


# Two sets are of one group if they share texts or annotations. Shares of equal sentences (at least six words, without
# case and punctuation) that were counted stand beside the rows; translations and the rest are as published.
PROVENANCE: dict[str, Provenance] = {
    "cola": _from("acceptability", "cola"),
    # snippets from rottentomatoes.com (Pang and Lee, 2004 and 2005): 68 % of mr is in sst2, 42 % of subj in mr
    "sst2": _from("sentiment", "rotten-tomatoes"),
    "sst5": _from("sentiment", "rotten-tomatoes"),
    "mr": _from("sentiment", "rotten-tomatoes"),
    "subj": _from("subjectivity", "rotten-tomatoes"),
    # the multi-domain data set of Blitzer et al. (2007)
    "reviews_books": _from("sentiment", "amazon"),
    "reviews_dvd": _from("sentiment", "amazon"),
    "reviews_electronics": _from("sentiment", "amazon"),
    "reviews_kitchen": _from("sentiment", "amazon"),
    "emotion": _from("emotion", "emotion"),
    "ag_news": _from("topic", "ag-news"),
    "trec": _from("question", "trec"),
    "clinc150": _from("intent", "clinc150"),
    # stsb holds MSRpar (27 % of mrpc) and captions of Flickr30k (171 sentences even in 10,000 rows of snli)
    "mrpc": _from("similarity", "msr-paraphrase"),
    "stsb": _from("similarity", "msr-paraphrase", "flickr30k"),
    "qqp": _from("similarity", "quora"),
    "snli": _from("nli", "flickr30k"),
    "mnli": _from("nli", "mnli"),
    "cmnli": _from("nli", "mnli", "flickr30k"),  # both, translated into Chinese
    "rte": _from("nli", "rte"),  # of GLUE and of SuperGLUE
    "scitail": _from("nli", "scitail"),
    # qnli is made of SQuAD's questions and sentences
    "qnli": _from("nli", "squad"),
    "squad_v1": _from("span", "squad"),
    "squad_v2": _from("span", "squad"),
    "wnli": _from("coreference", "winograd"),
    "wsc": _from("coreference", "winograd"),
    "zh_afqmc": _from("similarity", "afqmc"),
    "zh_fewclue_bustm": _from("similarity", "bustm"),
    "zh_fewclue_eprstmt": _from("sentiment", "eprstmt"),
    "zh_tnews": _from("topic", "toutiao"),
}


def provenance(task: TaskSettings) -> Provenance:
    """What the recipe says of a task, else what the table says.

    A task that neither knows is its own group under its name, and of the family `own`, which all such tasks share:
    give `task.family` and `task.group`, or its role may be better than it deserves.
    """
    known = PROVENANCE.get(task.name, _from("own", task.name))
    groups = frozenset([task.group]) if task.group else known.groups
    return Provenance(task.family or known.family, groups)


def role_of(task: TaskSettings, trained: Sequence[TaskSettings], shots: int | None = None) -> Role:
    """What a score on `task` shows, given the teacher's training sets (multi-task infused distillation, 2.9).

    `shots` is the number of examples a class that the student is fine-tuned on; None is all of them. A few-shot draw
    counts as seen if any training set shares a group with it, so that one role never mixes few-shot and full scores.
    """
    own, sources = provenance(task), [provenance(one) for one in trained]
    is_trained = any(task.name == one.name for one in trained)
    is_seen = is_trained or any(own.groups & source.groups for source in sources)
    if shots is not None:
        return "low-resource, seen" if is_seen else "low-resource"
    if is_seen:
        return "in-domain" if is_trained else "leaky"
    return "out-domain near" if any(own.family == source.family for source in sources) else "out-domain far"


@dataclass(frozen=True)
class Duplicates:
    """Training rows that an evaluation row repeats."""

    ids: frozenset[str]
    counts: Mapping[str, int]  # training task -> how many of its rows


def near_duplicates(training: Mapping[str, Iterable[Example]], evaluation: Iterable[Example]) -> Duplicates:
    """The rows of the teacher's training sets (by task) to drop, since they equal an evaluation row, or nearly.

    Two rows are the same if their texts (and options) agree in letters and digits, whatever the case, punctuation,
    spaces, and order of the two texts; or if the longer text of each has at least 8 words and these two agree. The
    work is linear in the number of rows; rows that differ by a word are not found.
    """
    known = {key for example in evaluation for key in _keys(example)}
    found = {
        task: [example.id for example in examples if any(key in known for key in _keys(example))]
        for task, examples in training.items()
    }
    return Duplicates(frozenset().union(*found.values()), {task: len(ids) for task, ids in found.items()})


def _keys(example: Example) -> Iterator[str | tuple[str, ...]]:
    """Rows that have one of these in common are near duplicates."""
    words = {text: WORD.findall(text.casefold()) for text in (example.text, example.text_pair or "", *example.options)}
    bare = {text: "".join(found) or text.strip() for text, found in words.items()}
    texts = (example.text, example.text_pair or "")
    yield (*sorted(bare[text] for text in texts), *sorted(bare[text] for text in example.options))
    longer = max(texts, key=lambda text: (len(words[text]), bare[text]))
    if len(words[longer]) >= LONG_TEXT:
        yield bare[longer]
