"""The objective: which terms it adds up, what they read, and what it refuses before any training."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from openbook.config import Terms, UsageError
from openbook.distillation import losses
from openbook.distillation.neighbours import Neighbours
from openbook.distillation.objective import TERMS, Objective, Widths
from openbook.distillation.teachers import LiveTeacher
from openbook.models.encoder import Encoder
from openbook.types import Batch, Outputs

BERT = Widths(hidden=8, layers=4, heads=2, embedding=8)
SMALL = Widths(hidden=4, layers=2, heads=2, embedding=4)
KEYS = (torch.eye(4, 8), torch.zeros(4))


def batch_of(mask: list[list[int]], labels: Tensor | None = None) -> Batch:
    attention_mask = torch.tensor(mask)
    ids = tuple(f"toy/train/{row}" for row in range(len(mask)))
    blank = torch.zeros_like(attention_mask)
    return Batch(ids=ids, input_ids=blank, attention_mask=attention_mask, token_type_ids=blank, labels=labels)


BATCH = batch_of([[1, 1, 1], [1, 1, 0]], torch.tensor([1, 0]))


def speak(widths: Widths, seed: int, *, learned: bool = False) -> Outputs:
    """What a model of these widths might say about BATCH, all of it."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_(learned)

    states = [random(2, 3, widths.hidden) for _ in range(4 * widths.layers + 1)]
    taps = {1 + i // 3: (states[i], states[i + 1], states[i + 2]) for i in range(0, 3 * widths.layers, 3)}
    return Outputs(
        logits=random(2, 2),
        embedding=random(2, widths.embedding),
        hidden=tuple(states[3 * widths.layers :]),
        relations=taps,
    )


def said(outputs: Outputs) -> dict[str, Tensor]:
    """Every tensor of what a model said, by name."""
    taps = {f"{'qkv'[i]}{layer}": part for layer, parts in outputs.relations.items() for i, part in enumerate(parts)}
    hidden = {f"hidden{layer}": state for layer, state in enumerate(outputs.hidden)}
    return {"logits": outputs.logits, "embedding": outputs.embedding, **hidden, **taps}


def values(objective: Objective, student: Outputs, teacher: Outputs, batch: Batch = BATCH) -> dict[str, float]:
    loss, parts = objective(student, teacher, batch)
    return {"loss": loss.item()} | {name: part.item() for name, part in parts.items()}


def test_hidden_states_and_attention_as_worked_out() -> None:
    def scoring(scores: list[list[float]]) -> tuple[Tensor, Tensor, Tensor]:
        """q and k whose raw scores, at one head of width 2, are these."""
        one = torch.eye(2)[None]
        return math.sqrt(2) * torch.tensor([scores]), one, one

    nines = torch.full((1, 2, 2), 9.0)
    blank = {"logits": torch.zeros(1, 2), "embedding": torch.zeros(1, 1)}
    student = Outputs(
        **blank,
        hidden=(torch.tensor([[[1.0], [2]]]), torch.tensor([[[0.0], [1]]])),
        relations={1: scoring([[1, 2], [3, 4]])},
    )
    teacher = Outputs(
        **blank,
        hidden=(torch.tensor([[[1.0, 0], [0, 1]]]), nines, torch.tensor([[[2.0, 1], [1, 2]]])),
        relations={1: (nines, nines, nines), 2: scoring([[1, 0], [3, 1]])},
    )
    objective = Objective(Terms(hidden=1, attention=1), Widths(1, 1, 1, 1), Widths(2, 2, 1, 2), "classification")
    objective.get_parameter("projections.hidden.weight").data = torch.ones(2, 1)
    objective.get_parameter("projections.hidden.bias").data = torch.tensor([0.0, -1])
    batch = batch_of([[1, 1]])
    assert values(objective, student, teacher, batch) == pytest.approx({"loss": 7.25, "hidden": 4.0, "attention": 3.25})


def test_the_official_arithmetic_counts_padding_and_divides_by_classes() -> None:
    """The padded cases of the specification, with F of the states, and its soft labels."""

    def taps(scores: list[list[float]]) -> tuple[Tensor, Tensor, Tensor]:
        eye = torch.eye(3)[None]
        return math.sqrt(3) * torch.tensor([scores]), eye, eye

    states = torch.tensor([[[1.0, 0], [0, 2], [1, 1]]])
    aims = torch.tensor([[[1.0, 1, 3], [0, 0, 1], [0, 0, 0]]])
    student = Outputs(
        torch.tensor([[math.log(2), 0]]),
        torch.zeros(1, 1),
        (states, states),
        {1: taps([[1, 2, 0], [3, 4, 0], [1, 1, 0]])},
    )
    teacher = Outputs(
        torch.tensor([[0, math.log(3)]]), torch.zeros(1, 1), (aims, aims), {1: taps([[1, 0, 0], [3, 1, 0], [0, 1, 0]])}
    )
    batch = batch_of([[1, 1, 0]])

    def told(**terms: Any) -> dict[str, float]:
        settings = Terms(hidden=1, attention=1, soft_labels=1, **terms)
        objective = Objective(settings, Widths(2, 1, 1, 2), Widths(3, 1, 1, 3), "classification")
        objective.get_parameter("projections.hidden.weight").data = torch.tensor([[1.0, 0], [2, 1], [3, 0]])
        return values(objective, student, teacher, batch)

    masked, official = told(), told(official=True)
    assert masked == pytest.approx(
        {"loss": 5.612990, "hidden": 2.0, "attention": 3.25, "soft_labels": 0.362990}, abs=1e-6
    )
    parts = {"hidden": 50 / 9, "attention": 14 / 9, "soft_labels": 0.462663}
    assert official == pytest.approx({"loss": sum(parts.values()), **parts}, abs=1e-6)
    assert told(official=True, temperature=2)["soft_labels"] == pytest.approx(0.754519 / 2, abs=1e-6)
    assert told(temperature=2)["soft_labels"] == pytest.approx(4 * 0.097712, abs=4e-6)
    blank = torch.zeros(2, 1)
    rows = [torch.tensor(rows) for rows in ([[0.0, 0, 0], [1, 1, 0]], [[1.0, 0, -1], [0, 2, 0]])]
    labels = Objective(Terms(soft_labels=1, official=True), SMALL, BERT, "classification")
    two = values(labels, Outputs(rows[0], blank), Outputs(rows[1], blank), batch_of([[1], [1]]))
    assert two["loss"] == pytest.approx(0.344519, abs=1e-6)


def test_official_scores_of_regression_are_compared_as_ever() -> None:
    student, teacher = (Outputs(torch.tensor([[score]]), torch.zeros(1, 1)) for score in (1.0, 3.0))
    objective = Objective(Terms(soft_labels=1, official=True, temperature=2), SMALL, BERT, "regression")
    assert values(objective, student, teacher, batch_of([[1]]))["loss"] == 4.0


FITS: dict[str, tuple[str, ...]] = {  # the projection of each state
    "shared": ("hidden", "hidden", "hidden"),
    "two": ("hidden_embeddings", "hidden_layers", "hidden_layers"),
    "per_layer": ("hidden_0", "hidden_1", "hidden_2"),
}


@pytest.mark.parametrize("fit", FITS)
def test_every_state_has_the_projection_that_the_fit_gives_it(fit: Any) -> None:
    objective = Objective(Terms(hidden=1, embedding=1, fit=fit), SMALL, BERT, "classification")
    names = dict.fromkeys((*FITS[fit], "embedding"))
    assert list(objective.projections.state_dict()) == [
        f"{name}.{part}" for name in names for part in ("weight", "bias")
    ]
    student, teacher = speak(SMALL, 0), speak(BERT, 1)
    expected = 0.0
    for layer, (name, imitated) in enumerate(zip(FITS[fit], (0, 2, 4), strict=True)):
        errors = objective.projections[name](student.hidden[layer]) - teacher.hidden[imitated]
        real = BATCH.attention_mask[..., None]
        expected += ((errors.square() * real).sum() / (8 * real.sum())).item()
    assert values(objective, student, teacher)["hidden"] == pytest.approx(expected)


def test_a_shared_projection_draws_the_same_numbers_as_before_there_was_a_choice() -> None:
    torch.manual_seed(4)
    objective = Objective(Terms(hidden=1, embedding=1), SMALL, BERT, "classification")
    torch.manual_seed(4)
    for name in ("hidden", "embedding"):
        torch.nn.Linear(4, 8)
        weight = torch.nn.init.normal_(torch.empty(8, 4), std=0.02)
        assert torch.equal(objective.get_parameter(f"projections.{name}.weight"), weight)


def test_without_a_fit_states_are_compared_as_they_are() -> None:
    objective = Objective(Terms(hidden=1, fit="none"), BERT, BERT, "classification")
    assert list(objective.parameters()) == []
    student, teacher = speak(BERT, 0), speak(BERT, 1)
    shared = Objective(Terms(hidden=1), BERT, BERT, "classification")  # starts as the identity
    assert values(objective, student, teacher) == pytest.approx(values(shared, student, teacher))
    with pytest.raises(UsageError, match=r"terms\.fit=none .*student\.hidden_size=4 and the teacher's width is 8"):
        Objective(Terms(hidden=1, fit="none"), SMALL, BERT, "classification")
    Objective(Terms(soft_labels=1, fit="none"), SMALL, BERT, "classification")  # no states, no question of widths


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ({"hidden": 1, "official": True}, True),
        ({"attention": 1, "official": True}, True),
        ({"soft_labels": 1, "official": True}, False),
        ({"hidden": 1, "attention": 1}, False),
    ],
)
def test_an_objective_says_whether_it_reads_padding(terms: dict[str, Any], expected: bool) -> None:
    assert Objective(Terms.model_validate(terms), SMALL, BERT, "classification").reads_padding is expected


UNIT_KEYS, UNIT_QUERIES = [[1, 0], [0, 1], [0.6, 0.8]], [[0.8, 0.6], [0, 1], [1, 0]]
SOFT_LABELS = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ({"soft_labels": 1, "neighbours": 1}, 0.751997 - 0.499499),
        ({"soft_labels": 1, "neighbours": 0.5}, 0.648222 - 0.499499),
        ({"gold": 0.1, "soft_labels": 0.9, "temperature": 2}, 0.100099),
        ({"gold": 0.1, "soft_labels": 0.9, "temperature": 2, "neighbours": 1}, 0.307650),
        ({"gold": 0.01, "soft_labels": 0.99, "temperature": 2, "neighbours": 1}, 0.279882),
    ],
)
def test_labels_and_neighbours_add_up_as_worked_out(terms: dict[str, float], expected: float) -> None:
    student = Outputs(torch.tensor([[1, 0], [0, 2], [0.5, 0.5]]), embedding=2 * torch.tensor(UNIT_QUERIES))
    # the keys are a quarter turn of the embeddings, moved by the bias
    turn, bias = torch.tensor([[0.0, -1], [1, 0]]), torch.tensor([0.5, 0.25])
    teacher = Outputs(SOFT_LABELS.log(), embedding=(3 * torch.tensor(UNIT_KEYS) - bias) @ turn)
    widths = Widths(hidden=2, layers=1, heads=1, embedding=2)
    settings = Terms.model_validate({**terms, "neighbours_temperature": 0.5})
    objective = Objective(settings, widths, widths, "classification", (turn, bias))
    batch = batch_of([[1]] * 3, torch.tensor([0, 1, 0]))
    assert values(objective, student, teacher, batch)["loss"] == pytest.approx(expected, abs=2e-6)


NAMES = ("toy/train/0", "toy/train/1", "toy/train/2")
BOOK = (torch.tensor([*UNIT_KEYS, [-1.0, 0.0]]), (*NAMES, "toy/train/3"))


def related(settings: dict[str, Any]) -> Neighbours:
    """The relational loss of the specification's fixtures, whose teacher says the keys themselves."""
    terms = Terms.model_validate({"neighbours": 1, "neighbours_temperature": 0.5, **settings})
    return Neighbours(terms, (torch.eye(2), torch.zeros(2)), BOOK)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0.207552),
        ({"neighbours_own": False}, 0.224322),
        ({"neighbours_student_temperature": 0.25}, 0.499724),
        ({"neighbours_scope": "knowledge_base"}, 0.204857),
        ({"neighbours_scope": "knowledge_base", "neighbours_own": False}, 0.220301),
        ({"neighbours_scope": "queue", "neighbours_queue": 5}, 0.207552),
        ({"neighbours_scope": "queue", "neighbours_queue": 3, "neighbours_own": False}, 0.224322),
    ],
)
def test_neighbours_of_every_scope_as_worked_out(settings: dict[str, Any], expected: float) -> None:
    loss = related(settings)(torch.tensor(UNIT_QUERIES), torch.tensor(UNIT_KEYS, dtype=torch.float32), NAMES)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_a_text_that_the_book_does_not_hold_has_no_own_key_there() -> None:
    said = torch.tensor(UNIT_QUERIES), torch.tensor(UNIT_KEYS, dtype=torch.float32)
    loss = related({"neighbours_scope": "knowledge_base", "neighbours_own": False})(*said, ("a", "b", "c"))
    assert loss.item() == pytest.approx(0.204857, abs=1e-6)


@pytest.mark.parametrize("own", [True, False])
def test_a_queue_holds_the_last_keys_the_batchs_own_included(own: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    batches = [(torch.randn(2, 2, generator=generator), torch.randn(2, 2, generator=generator)) for _ in range(4)]
    names = [("a", "b"), ("c", "d"), ("e", "f"), ("a", "g")]  # a text comes again while its old key is still there
    remembering = related({"neighbours_scope": "queue", "neighbours_queue": 5, "neighbours_own": own})
    for step, (student, teacher) in enumerate(batches):
        found = remembering(student, teacher, names[step])
        held = torch.cat([F.normalize(keys) for _, keys in batches[: step + 1]])[-5:]
        whose = [name for pair in names[: step + 1] for name in pair][-5:]
        masked = None if own else torch.tensor([[one == other for other in whose] for one in names[step]])
        expected = losses.neighbour_relations(student, F.normalize(teacher), held, 0.5, 0.5, masked)
        assert found.item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_queue_goes_on_from_a_checkpoint() -> None:
    batch = (torch.randn(2, 2), torch.randn(2, 2), ("a", "b"))
    first, second = (related({"neighbours_scope": "queue", "neighbours_queue": 5}) for _ in range(2))
    for _ in range(3):
        first(torch.randn(2, 2), torch.randn(2, 2), ("c", "d"))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(*batch), first(*batch))
    assert not related({"neighbours_scope": "knowledge_base"}).state_dict()  # which is read from disk anew


def test_a_step_leaves_the_keys_as_they_were() -> None:
    relational = related({"neighbours_scope": "knowledge_base"})
    student = torch.tensor(UNIT_QUERIES, requires_grad=True)
    before = {name: buffer.clone() for name, buffer in relational.named_buffers()}
    relational(student, torch.tensor(UNIT_KEYS, dtype=torch.float32), NAMES).backward()
    assert student.grad is not None
    assert {*before} == {"weight", "bias", "keys", "names"}
    assert all(torch.equal(buffer, before[name]) for name, buffer in relational.named_buffers())
    assert list(relational.parameters()) == []


@pytest.mark.parametrize("book", [None, (torch.zeros(2, 3), ("a", "b")), (torch.zeros(2, 4), ("a",))])
def test_a_scope_of_all_keys_needs_them(book: Any) -> None:
    terms = Terms(neighbours=1, neighbours_scope="knowledge_base")
    with pytest.raises(UsageError, match=r"neighbours_scope=knowledge_base needs a key of width 4 for every"):
        Objective(terms, SMALL, BERT, "classification", KEYS, book)


def test_regression_compares_scores() -> None:
    student, teacher = (
        Outputs(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 4)),
        Outputs(torch.tensor([[2.0], [4.0]]), torch.zeros(2, 8)),
    )
    objective = Objective(Terms(gold=1, soft_labels=10, temperature=3), SMALL, BERT, "regression")
    batch = batch_of([[1], [1]], torch.tensor([1.5, 3.0]))
    assert values(objective, student, teacher, batch) == pytest.approx(
        {"loss": 25.625, "gold": 0.625, "soft_labels": 2.5}
    )


def test_the_pooled_vector_is_projected() -> None:
    objective = Objective(Terms(embedding=2), SMALL, BERT, "classification")
    student, teacher = speak(SMALL, 0), speak(BERT, 1)
    weight = objective.get_parameter("projections.embedding.weight")
    expected = (student.embedding @ weight.T - teacher.embedding).square().mean().item()
    assert values(objective, student, teacher) == pytest.approx({"loss": 2 * expected, "embedding": expected})


def test_relations_are_those_of_the_last_layers() -> None:
    objective = Objective(Terms(relations=1, relation_heads=2), SMALL, BERT, "classification")
    student, teacher = speak(SMALL, 0), speak(BERT, 1)
    both = values(objective, student, teacher)
    last = [Outputs(o.logits, o.embedding, relations={n: o.relations[n]}) for o, n in ((student, 2), (teacher, 4))]
    assert values(objective, last[0], last[1]) == both
    first = Outputs(teacher.logits, teacher.embedding, relations={1: teacher.relations[1]})
    assert values(objective, student, first) != both


@pytest.mark.parametrize(("norm", "ratio"), [("token", 1.0), ("paddle", 2 / 3)])
def test_the_norm_of_the_relations_is_the_one_asked_for(norm: Any, ratio: float) -> None:
    """Two real tokens of three, with a padded query whose relations agree."""
    tap = torch.tensor([[[1.0], [0], [0]]])
    student, teacher = (Outputs(torch.zeros(1, 2), torch.zeros(1, 1), relations={1: (t, t, t)}) for t in (0 * tap, tap))
    widths = Widths(1, 1, 1, 1)
    objective = Objective(Terms(relations=1, relation_norm=norm), widths, widths, "classification")
    assert values(objective, student, teacher, batch_of([[1, 1, 0]]))["loss"] == pytest.approx(
        0.166416 * ratio, abs=1e-6
    )


EVERYTHING = Terms.model_validate({name: weight for weight, name in enumerate(TERMS, start=1)})


def test_the_loss_is_the_weighted_sum_of_its_named_parts() -> None:
    objective = Objective(EVERYTHING, SMALL, BERT, "classification", KEYS)
    loss, parts = objective(speak(SMALL, 0, learned=True), speak(BERT, 1), BATCH)
    assert tuple(parts) == TERMS
    assert loss.item() == pytest.approx(sum(weight * parts[name].item() for weight, name in enumerate(TERMS, start=1)))
    assert loss.requires_grad
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize("name", TERMS)
def test_each_term_stands_alone_and_is_the_same_in_company(name: str) -> None:
    torch.manual_seed(0)
    everything = Objective(EVERYTHING, SMALL, BERT, "classification", KEYS)
    alone = Objective(Terms.model_validate({name: 1}), SMALL, BERT, "classification", KEYS)
    shared = {key: value for key, value in everything.state_dict().items() if key in alone.state_dict()}
    alone.load_state_dict(shared)
    student, teacher = speak(SMALL, 0), speak(BERT, 1)
    value = values(everything, student, teacher)[name]
    assert value > 0
    assert values(alone, student, teacher) == pytest.approx({"loss": value, name: value})


READS = {
    "gold": ({"logits"}, set()),
    "soft_labels": ({"logits"}, {"logits"}),
    "embedding": ({"embedding"}, {"embedding"}),
    "neighbours": ({"embedding"}, {"embedding"}),
    "hidden": ({"hidden0", "hidden1", "hidden2"}, {"hidden0", "hidden2", "hidden4"}),
    "attention": ({"q1", "k1", "q2", "k2"}, {"q2", "k2", "q4", "k4"}),
    "relations": ({"q2", "k2", "v2"}, {"q4", "k4", "v4"}),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_reads_what_it_should_and_teaches_the_student_alone(name: str) -> None:
    objective = Objective(Terms.model_validate({name: 1}), SMALL, BERT, "classification", KEYS)
    student, teacher = speak(SMALL, 0, learned=True), speak(BERT, 1, learned=True)
    before = values(objective, student, teacher)["loss"]
    objective(student, teacher, BATCH)[0].backward()
    of_student, of_teacher = READS[name]
    assert {key for key, part in said(student).items() if part.grad is not None} == of_student
    assert all(part.grad is None for part in said(teacher).values())
    for key, part in said(teacher).items():
        kept = part.detach().clone()
        part.data.square_()
        assert (values(objective, student, teacher)["loss"] != before) == (key in of_teacher), key
        part.data.copy_(kept)


def test_padding_does_not_matter_to_any_term() -> None:
    objective = Objective(EVERYTHING, SMALL, BERT, "classification", KEYS)
    student, teacher = speak(SMALL, 0), speak(BERT, 1)
    before = values(objective, student, teacher)
    for outputs in (student, teacher):
        for part in said(outputs).values():
            if part.dim() == 3:
                part[1, 2] = 50.0
    assert values(objective, student, teacher) == before


@pytest.mark.parametrize(
    ("terms", "layers", "student_layers", "teacher_layers", "reads_hidden"),
    [
        ({"gold": 1, "soft_labels": 1, "embedding": 1, "neighbours": 1}, 2, (), (), False),
        ({"hidden": 1}, 2, (), (), True),
        ({"attention": 1}, 2, (1, 2), (2, 4), False),
        ({"relations": 1}, 3, (3,), (4,), False),
        ({"attention": 1, "relations": 1, "layer_mapping": "bottom"}, 2, (1, 2), (1, 2, 4), False),
        ({"attention": 1, "relations": 1, "hidden": 1, "layer_mapping": (3, 1)}, 2, (1, 2), (1, 3, 4), True),
    ],
)
def test_an_objective_says_what_must_be_tapped(
    terms: dict[str, Any],
    layers: int,
    student_layers: tuple[int, ...],
    teacher_layers: tuple[int, ...],
    reads_hidden: bool,
) -> None:
    student = Widths(hidden=4, layers=layers, heads=2, embedding=4)
    objective = Objective(Terms.model_validate(terms), student, BERT, "classification", KEYS)
    assert objective.student_layers == student_layers
    assert objective.teacher_layers == teacher_layers
    assert objective.reads_hidden == reads_hidden


def test_projections_are_learned_and_nothing_else_is() -> None:
    objective = Objective(EVERYTHING, SMALL, BERT, "classification", KEYS)
    parameters = dict(objective.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    assert shapes == {
        "projections.hidden.weight": (8, 4),
        "projections.hidden.bias": (8,),
        "projections.embedding.weight": (8, 4),
        "projections.embedding.bias": (8,),
    }
    objective(speak(SMALL, 0), speak(BERT, 1), BATCH)[0].backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in parameters.values())
    assert torch.equal(objective.neighbours.weight, KEYS[0])
    only_labels = Objective(Terms(soft_labels=1), SMALL, BERT, "classification", KEYS)
    assert list(only_labels.parameters()) == []


def test_a_student_that_equals_its_teacher_starts_at_zero() -> None:
    terms = Terms(soft_labels=1, embedding=1, hidden=1, attention=1, relations=1)
    same = speak(BERT, 0)
    assert values(Objective(terms, BERT, BERT, "classification"), same, same)["loss"] == pytest.approx(0, abs=1e-6)


def test_autocast_does_not_change_neighbours_relations_or_attention() -> None:
    terms = Terms(attention=1, relations=1, neighbours=1)
    objective = Objective(terms, SMALL, BERT, "classification", KEYS)
    student, teacher = speak(SMALL, 0), speak(BERT, 1)
    expected = values(objective, student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert values(objective, student, teacher) == expected


def test_an_objective_can_be_copied() -> None:
    objective = Objective(EVERYTHING, SMALL, BERT, "classification", KEYS)
    twin = copy.deepcopy(objective)
    student, teacher = speak(SMALL, 0), speak(BERT, 1)
    assert values(twin, student, teacher) == values(objective, student, teacher)


@pytest.mark.parametrize(
    ("terms", "student", "keys", "message"),
    [
        ({}, SMALL, None, r"distill terms weighs 0; give one of \['gold', 'soft_labels'"),
        ({"attention": 1}, Widths(4, 2, 4, 4), None, r"student\.heads=4, the teacher has 2"),
        ({"hidden": 1}, Widths(4, 3, 2, 4), None, r"student\.layers=3 does not divide the teacher's 4 layers"),
        ({"attention": 1}, Widths(4, 3, 2, 4), None, r"student\.layers=3 does not divide the teacher's 4 layers"),
        ({"relations": 1, "relation_heads": 8}, SMALL, None, r"relation_heads=8 .*; these do: \[1, 2, 4\]"),
        ({"neighbours": 1}, SMALL, None, r"terms\.neighbours needs the teacher's key projection"),
        ({"neighbours": 1}, Widths(4, 2, 2, 5), KEYS, r"width 5 .* need a key projection \(5, 8\), and it is \(4, 8\)"),
        ({"neighbours": 1}, SMALL, (torch.eye(4), KEYS[1]), r"need a key projection \(4, 8\), and it is \(4, 4\)"),
        ({"neighbours": 1}, SMALL, (KEYS[0], torch.zeros(1)), r"with bias \(1,\)"),
    ],
)
def test_impossible_pairs_are_refused_at_once(
    terms: dict[str, Any], student: Widths, keys: tuple[Tensor, Tensor] | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Objective(Terms.model_validate(terms), student, BERT, "classification", keys)


def test_a_term_of_weight_zero_refuses_nothing() -> None:
    odd = Widths(hidden=5, layers=3, heads=5, embedding=7)
    objective = Objective(Terms(soft_labels=1), odd, BERT, "classification", KEYS)
    empty = Outputs(torch.zeros(2, 2), torch.zeros(2, 7))
    assert values(objective, empty, speak(BERT, 1), batch_of([[1], [1]])).keys() == {"loss", "soft_labels"}


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"gold": 0.5}, r"terms\.gold=0\.5 needs labels, and toy/train/0 has none"),
        ({"hidden": 1}, r"terms\.hidden reads state 0 of the teacher, which gave 0"),
        ({"attention": 1}, r"terms\.attention reads layer 2 of the teacher, which gave \[\]"),
        ({"relations": 1}, r"terms\.relations reads q, k and v"),
    ],
)
def test_a_term_without_its_input_says_which(terms: dict[str, Any], message: str) -> None:
    objective = Objective(Terms.model_validate(terms), SMALL, BERT, "classification")
    with pytest.raises(ValueError, match=message):
        objective(speak(SMALL, 0), Outputs(torch.zeros(2, 2), torch.zeros(2, 8)), batch_of([[1, 1, 1], [1, 1, 0]]))


def test_relations_need_values_which_a_recording_has_not() -> None:
    objective = Objective(Terms(relations=1, relation_heads=2), SMALL, BERT, "classification")
    teacher = speak(BERT, 1)
    query, key, _ = teacher.relations[4]
    recorded = Outputs(teacher.logits, teacher.embedding, relations={4: (query, key, torch.empty(0))})
    with pytest.raises(ValueError, match=r"terms\.relations reads values"):
        objective(speak(SMALL, 0), recorded, BATCH)


# --- with models ------------------------------------------------------------------------------------------------------

STAGE_ONE, STAGE_TWO = Terms(hidden=1, attention=1), Terms(soft_labels=1)


def model_of(layers: int, seed: int, width: int = 32) -> Encoder:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, num_hidden_layers=layers, hidden_size=width, num_attention_heads=4, intermediate_size=24
    )  # with dropout
    encoder = Encoder(BertForSequenceClassification(config))
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return encoder


def widths_of(encoder: Encoder) -> Widths:
    return Widths(encoder.width, encoder.layers, encoder.heads, encoder.embedding_width)


def heard(objective: Objective, student: Encoder, teacher: Encoder, batch: Batch) -> dict[str, float]:
    student.listen(objective.reads_hidden, objective.student_layers)
    teacher.listen(objective.reads_hidden, objective.teacher_layers)
    return values(objective, student(batch), LiveTeacher(teacher)(batch), batch)


def rows_of(batch: Batch, rows: slice, padding: int = 0) -> Batch:
    """Some rows, with as much padding as told beyond their longest."""
    width = int(batch.attention_mask[rows].sum(1).max())
    names = ("input_ids", "attention_mask", "token_type_ids")
    tensors = {name: F.pad(getattr(batch, name)[rows, :width], (0, padding)) for name in names}
    return replace(batch, ids=batch.ids[rows], labels=None, **tensors)


@pytest.mark.parametrize("fit", ["shared", "two", "per_layer", "none"])
def test_a_copy_of_the_teacher_has_nothing_to_learn_in_stage_one(batch: Batch, fit: Any) -> None:
    teacher = model_of(2, seed=0)
    student = copy.deepcopy(teacher).eval()
    objective = Objective(
        STAGE_ONE.model_copy(update={"fit": fit}), widths_of(student), widths_of(teacher), "classification"
    )
    assert heard(objective, student, teacher, batch) == pytest.approx(
        {"loss": 0, "hidden": 0, "attention": 0}, abs=1e-9
    )
    assert heard(objective, model_of(2, seed=1).eval(), teacher, batch)["loss"] > 1


def test_stage_one_ignores_padding_unless_official_and_weighs_sequences_by_their_length(batch: Batch) -> None:
    student, teacher = model_of(2, seed=0, width=16).eval(), model_of(4, seed=1)
    for official in (False, True):
        terms = STAGE_ONE.model_copy(update={"official": official})
        objective = Objective(terms, widths_of(student), widths_of(teacher), "classification")
        whole = heard(objective, student, teacher, batch)
        wide = heard(objective, student, teacher, rows_of(batch, slice(0, 3), padding=4))
        for name in ("hidden", "attention"):
            assert (wide[name] == pytest.approx(whole[name], rel=1e-4)) is not official
    masked = Objective(STAGE_ONE, widths_of(student), widths_of(teacher), "classification")
    masked.load_state_dict(objective.state_dict())
    whole = heard(masked, student, teacher, batch)
    alone = [heard(masked, student, teacher, rows_of(batch, slice(row, row + 1))) for row in range(3)]
    tokens = batch.attention_mask.sum(1)
    for name, weights in (("hidden", tokens), ("attention", tokens.square())):
        parts = torch.tensor([parts[name] for parts in alone])
        assert whole[name] == pytest.approx(((parts * weights).sum() / weights.sum()).item(), rel=1e-4)


def test_teaching_leaves_the_teacher_as_it_was_and_trains_the_projection_in_stage_one_alone(batch: Batch) -> None:
    student, model = model_of(2, seed=0, width=16), model_of(4, seed=1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    teacher = LiveTeacher(model.train())
    one, two = (
        Objective(terms, widths_of(student), widths_of(model), "classification") for terms in (STAGE_ONE, STAGE_TWO)
    )
    projected = [weight.clone() for weight in one.parameters()]
    optimizer = torch.optim.SGD([*student.parameters(), *one.parameters()], lr=0.1)
    for objective in (one, two):
        student.listen(objective.reads_hidden, objective.student_layers)
        model.listen(objective.reads_hidden, objective.teacher_layers)
        said, again = teacher(batch), teacher(batch)
        assert torch.equal(said.logits, again.logits)
        assert all(torch.equal(state, other) for state, other in zip(said.hidden, again.hidden, strict=True))
        optimizer.zero_grad()
        objective(student(batch), said, batch)[0].backward()
        optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())
    assert not any(torch.equal(weight, old) for weight, old in zip(one.parameters(), projected, strict=True))
    assert list(two.parameters()) == []


@pytest.mark.parametrize("terms", [STAGE_ONE, STAGE_TWO])
def test_only_pairs_train_the_embedding_of_the_second_segment(batch: Batch, terms: Terms) -> None:
    teacher = model_of(4, seed=1)
    for pairs in (False, True):
        student = model_of(2, seed=0, width=16)
        objective = Objective(terms, widths_of(student), widths_of(teacher), "classification")
        student.listen(objective.reads_hidden, objective.student_layers)
        teacher.listen(objective.reads_hidden, objective.teacher_layers)
        given = batch if pairs else replace(batch, token_type_ids=torch.zeros_like(batch.token_type_ids))
        objective(student(given), LiveTeacher(teacher)(given), given)[0].backward()
        segments = student.model.bert.embeddings.token_type_embeddings.weight.grad
        assert segments[0].abs().sum() > 0
        assert bool((segments[1] != 0).any()) is pairs


def test_several_labels_are_learned_each_by_itself() -> None:
    student, teacher = speak(SMALL, 1), speak(BERT, 2)
    batch = replace(BATCH, labels=torch.tensor([[1, 1], [0, 1]]))
    objective = Objective(Terms(gold=1, soft_labels=10, temperature=3), SMALL, BERT, "multi_label")
    found = values(objective, student, teacher, batch)
    assert found["gold"] == pytest.approx(losses.gold_label_sets(student.logits, batch.labels).item())
    assert found["soft_labels"] == pytest.approx(losses.soft_label_sets_kl(student.logits, teacher.logits, 3).item())
    assert found["loss"] == pytest.approx(found["gold"] + 10 * found["soft_labels"])


def test_the_students_own_projection_is_read_by_the_relational_loss_alone() -> None:
    student, teacher = speak(SMALL, 1, learned=True), speak(BERT, 2)
    terms = Terms(neighbours=1, embedding=1, gold=1)
    plain = Objective(terms, SMALL, BERT, "classification", KEYS)
    own = Objective(terms, SMALL, BERT, "classification", KEYS, projected=True)
    own.projections["embedding"].load_state_dict(plain.projections["embedding"].state_dict())
    assert values(own, student, teacher) == values(plain, student, teacher)  # it begins as the identity
    turned = torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    shift = torch.tensor([0.1, 0, -0.2, 0])
    own.projections["query"].load_state_dict({"weight": turned, "bias": shift})
    found = values(own, student, teacher)
    keys = losses.project_keys(teacher.embedding, *KEYS)
    wanted = losses.neighbour_relations(student.embedding @ turned.T + shift, keys, keys, 0.1, 0.1)
    assert found["neighbours"] == pytest.approx(wanted.item(), rel=1e-5)
    assert {name: found[name] for name in ("gold", "embedding")} == {
        name: values(plain, student, teacher)[name] for name in ("gold", "embedding")
    }
    own(student, teacher, BATCH)[0].backward()
    assert own.projections["query"].weight.grad.abs().max() > 0
    assert "query" not in Objective(Terms(gold=1), SMALL, BERT, "classification", KEYS, projected=True).projections
