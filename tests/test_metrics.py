from itertools import product
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn

from openbook.config import Kind, UsageError
from openbook.data.tasks import METRICS as METRICS_OF_TASKS
from openbook.metrics import (
    METRICS,
    OF_KIND,
    agreement,
    ece,
    entities,
    entity_f1,
    exact_match,
    hierarchical_difference,
    holm,
    kl_to_teacher,
    mcnemar,
    nll,
    paired_difference,
    score,
    span_f1,
)

seeds = st.integers(0, 10**6)


def answers(seed, examples=40, classes=3):
    random = np.random.default_rng(seed)
    return random.dirichlet(np.ones(classes), size=examples), random.integers(classes, size=examples)


def one_hot(predictions, classes=2):
    return np.eye(classes)[np.asarray(predictions)]


@pytest.mark.filterwarnings("ignore:A single label was found")
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seeds, st.integers(2, 5), st.integers(1, 30))
def test_classification_metrics_are_scikit_learns(seed, classes, examples):
    outputs, gold = answers(seed, examples, classes)
    predicted = outputs.argmax(axis=1)
    average = "binary" if classes == 2 else "macro"
    expected_f1 = sklearn.f1_score(gold, predicted, average=average, zero_division=0)
    assert score("accuracy", outputs, gold) == pytest.approx(sklearn.accuracy_score(gold, predicted))
    assert score("f1", outputs, gold) == pytest.approx(expected_f1)
    expected_mcc = sklearn.matthews_corrcoef(gold, predicted)
    assert score("matthews_correlation", outputs, gold) == pytest.approx(expected_mcc, abs=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seeds)
def test_correlations_are_scipys_also_with_ties(seed):
    random = np.random.default_rng(seed)
    gold = random.integers(6, size=30).astype(float)
    outputs = np.round(gold + random.normal(size=30), 1)[:, None].astype(np.float32)
    assert score("pearson", outputs, gold) == pytest.approx(stats.pearsonr(outputs[:, 0].astype(float), gold).statistic)
    assert score("spearmanr", outputs, gold) == pytest.approx(stats.spearmanr(outputs[:, 0], gold).statistic)


def test_the_table_holds_what_the_tasks_report():
    assert {kind: set(metrics) for kind, metrics in OF_KIND.items()} == {
        kind: set(names) for kind, names in METRICS_OF_TASKS.items()
    }
    assert set(OF_KIND) == set(get_args(Kind))
    one_label = {"accuracy", "f1", "matthews_correlation", "pearson", "spearmanr"}
    assert set(METRICS) == one_label | {"micro_f1", "macro_f1", "subset_accuracy"}


def test_f1_of_two_classes_is_of_class_one():
    assert score("f1", one_hot([1, 1, 0, 0]), np.array([1, 0, 1, 1])) == pytest.approx(2 / 5)
    assert score("f1", one_hot([0, 0]), np.array([0, 0])) == 0


def test_f1_of_three_classes_stays_a_mean_when_a_class_is_absent():
    outputs, gold = one_hot([0, 1, 1, 1], classes=3), np.array([0, 0, 1, 1])
    assert score("f1", outputs, gold) == pytest.approx((2 / 3 + 4 / 5) / 2)


@pytest.mark.parametrize("constant", [0.1, 3.0])
def test_a_constant_correlates_with_nothing(constant):
    scores, gold = np.full((7, 1), constant), np.arange(7.0)
    for name in ("pearson", "spearmanr"):
        assert score(name, scores, gold) == 0.0
        assert score(name, gold[:, None], scores[:, 0]) == 0.0
    assert score("matthews_correlation", one_hot([1, 1, 1]), np.array([0, 1, 0])) == 0.0
    assert score("matthews_correlation", one_hot([0, 1, 0]), np.array([1, 1, 1])) == 0.0


def test_large_counts_do_not_overflow():
    predicted = np.tile([0, 0, 0, 1, 1], 40_000)
    gold = np.tile([0, 0, 1, 1, 1], 40_000)
    assert score("matthews_correlation", one_hot(predicted), gold) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("name", "outputs", "gold", "message"),
    [
        ("acuracy", np.ones((2, 2)), np.array([0, 1]), "'acuracy' is unknown; choose one of accuracy, f1"),
        ("accuracy", np.ones((2, 2)), np.array([0, 1, 1]), r"\(2, 2\).*\(3,\)"),
        ("accuracy", np.ones((0, 2)), np.array([], int), r"\(0, 2\)"),
        ("accuracy", np.ones((2, 1)), np.array([0, 1]), "one column"),
        ("accuracy", np.ones((2, 2)), np.array([0, 2]), r"0\.\.1.*0 to 2"),
        ("accuracy", np.ones((2, 2)), np.array([-1, 1]), r"0\.\.1.*-1 to 1"),
        ("accuracy", np.ones((2, 2)), np.array([0.0, 1.0]), "float64"),
        ("accuracy", np.array([(np.nan, 1), (0, 1)]), np.array([0, 1]), "not finite"),
        ("pearson", np.ones((2, 2)), np.array([0.0, 1.0]), "one column, but they have 2"),
        ("pearson", np.ones((2, 1)), np.array([0.0, np.nan]), "not finite"),
    ],
)
def test_what_cannot_be_judged_is_refused(name, outputs, gold, message):
    with pytest.raises(UsageError, match=message):
        score(name, outputs, gold)


def test_agreement_and_divergence_from_the_teacher():
    student = np.array([(0.3, 0.7), (0.5, 0.5), (1, 0)])
    teacher = np.array([(0.4, 0.6), (0.1, 0.9), (1, 0)])
    assert agreement(student, teacher) == pytest.approx(2 / 3)
    expected = np.mean([stats.entropy(t, s) for s, t in zip(student, teacher, strict=True)])
    assert kl_to_teacher(student, teacher) == pytest.approx(expected)
    assert kl_to_teacher(teacher, teacher) == 0
    assert np.isfinite(kl_to_teacher(student[[2]], teacher[[0]]))
    with pytest.raises(UsageError, match=r"\(3, 2\).*\(2, 2\)"):
        agreement(student, teacher[:2])


def test_log_likelihood_is_scikit_learns():
    outputs, gold = answers(0)
    assert nll(outputs, gold) == pytest.approx(sklearn.log_loss(gold, outputs, labels=[0, 1, 2]))
    assert nll(one_hot([0, 1]), np.array([1, 1])) == pytest.approx(-np.log(1e-12) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_calibration_error_with_bins_of_equal_mass(seed):
    random = np.random.default_rng(seed)
    confidence = random.permutation(np.linspace(0.55, 0.99, 60))
    outputs, gold = np.stack([1 - confidence, confidence], axis=1), (random.random(60) < confidence).astype(int)
    bins = np.split(np.argsort(confidence), 15)  # four examples each
    expected = np.mean([abs(gold[rows].mean() - confidence[rows].mean()) for rows in bins])
    assert ece(outputs, gold) == pytest.approx(expected)
    order = random.permutation(60)
    assert ece(outputs[order], gold[order]) == pytest.approx(ece(outputs, gold))


def test_equal_confidences_share_a_bin():
    outputs, gold = np.tile([0.2, 0.8], (10, 1)), np.array([1] * 8 + [0] * 2)
    assert ece(outputs, gold) == pytest.approx(0)
    assert ece(outputs, np.ones(10, int)) == pytest.approx(0.2)
    assert ece(outputs[:1], gold[:1]) == pytest.approx(0.2)


def test_exact_mcnemar():
    gold = np.ones(100, dtype=int)
    ours, rivals = np.ones(100, dtype=int), np.ones(100, dtype=int)
    rivals[:9] = 0
    ours[9:13] = 0
    assert mcnemar(one_hot(ours), one_hot(rivals), gold) == pytest.approx(0.266846, abs=1e-6)
    assert mcnemar(one_hot(rivals), one_hot(ours), gold) == pytest.approx(0.266846, abs=1e-6)
    assert mcnemar(one_hot(ours), one_hot(ours), gold) == 1


def wrong_at(rows, examples=400):
    """Predictions that miss these rows; gold is class 1 everywhere."""
    predictions = np.ones(examples, dtype=int)
    predictions[list(rows)] = 0
    return one_hot(predictions)


GOLD = np.ones(400, dtype=int)


def test_the_interval_over_examples_is_the_textbook_one():
    difference = paired_difference("accuracy", [wrong_at(range(20))], [wrong_at(range(10, 70))], GOLD, draws=4000)
    gains = np.zeros(400)
    gains[20:70], gains[:10] = 1, -1
    error = gains.std() / np.sqrt(400)
    assert difference.mean == pytest.approx(0.1)
    assert difference.low == pytest.approx(0.1 - 1.96 * error, abs=0.25 * error)
    assert difference.high == pytest.approx(0.1 + 1.96 * error, abs=0.25 * error)


def test_the_interval_covers_the_spread_of_seeds_too():
    """One seed of four gains 1 on every example: 0.4 % of draws hold it four times, 5 % three times or more."""
    good, bad = wrong_at(()), wrong_at(range(400))
    difference = paired_difference("accuracy", [good, bad, bad, bad], [bad], GOLD)
    assert (difference.mean, difference.low, difference.high) == (0.25, 0, 0.75)


def test_seeds_are_paired_and_a_single_one_meets_all():
    good, bad = wrong_at(()), wrong_at(range(400))
    same = paired_difference("accuracy", [good, bad], [good, bad], GOLD, draws=200)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert paired_difference("accuracy", [good], [good, bad, bad, bad], GOLD, draws=9).mean == 0.75
    assert paired_difference("accuracy", [good, bad, bad, bad], [good], GOLD, draws=9).mean == -0.75
    with pytest.raises(UsageError, match="2 seeds.*3"):
        paired_difference("accuracy", [good] * 2, [good] * 3, GOLD)
    with pytest.raises(UsageError, match="0 seeds"):
        paired_difference("accuracy", [], [good], GOLD)


def test_the_same_rows_are_drawn_for_both_models():
    outputs = [wrong_at(range(100, 250))]
    difference = paired_difference("f1", outputs, outputs, GOLD)
    assert (difference.low, difference.high) == (0, 0)


def test_an_interval_is_repeatable_and_its_seed_matters():
    models = [wrong_at(range(20))], [wrong_at(range(10, 70))]
    drawn = [paired_difference("matthews_correlation", *models, GOLD - (GOLD.cumsum() > 200), 50, s) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_correlations_have_intervals_too():
    random = np.random.default_rng(0)
    gold = random.normal(size=100)
    near, far = ((gold + scale * random.normal(size=100))[:, None] for scale in (0.1, 3))
    difference = paired_difference("spearmanr", [near], [far], gold, draws=200)
    assert 0 < difference.low < difference.mean < difference.high < 1.2


def test_a_misspelt_metric_is_refused_before_anything_is_drawn():
    with pytest.raises(UsageError, match="unknown"):
        paired_difference("acc", [wrong_at(())], [wrong_at(())], GOLD)


def every_draw(groups):
    """All equally likely means of the hierarchical bootstrap of two tasks with two seeds each."""
    of_task = [[np.mean(seeds) for seeds in product(group, repeat=2)] for group in groups]
    slots = [mean for task in of_task for mean in task]
    return np.array([(first + second) / 2 for first, second in product(slots, slots)])


def test_the_hierarchical_interval_is_that_of_all_possible_draws():
    groups = [[0.0, 1.0], [2.0, 4.0]]
    means = every_draw(groups)
    difference, p = hierarchical_difference(groups, null=0.5, draws=40_000)
    assert difference.mean == 1.75
    assert (difference.low, difference.high) == (np.quantile(means, 0.025), np.quantile(means, 0.975))
    tail = np.mean(means - 1.75 >= 1.25)
    assert p == pytest.approx(2 * tail, abs=0.01)
    assert 0.125 < 2 * tail < 0.5  # so that no floor is at work


def test_tasks_are_drawn_before_seeds():
    """A quarter of the draws takes the same task twice, which no draw of ten pooled seeds would do."""
    difference, p = hierarchical_difference([[0.0] * 5, [1.0] * 5])
    assert (difference.mean, difference.low, difference.high) == (0.5, 0, 1)
    assert p == pytest.approx(0.5, abs=0.03)


def test_every_task_counts_the_same_however_many_seeds_it_has():
    assert hierarchical_difference([[1.0, 1.0], [0.0] * 8])[0].mean == 0.5


def test_with_one_task_seeds_alone_are_drawn():
    """As above: 0.4 % of the draws hold the one four times, 5 % three times or more."""
    difference, _ = hierarchical_difference([[1.0, 0.0, 0.0, 0.0]])
    assert (difference.mean, difference.low, difference.high) == (0.25, 0, 0.75)


def test_the_null_is_what_p_is_about():
    groups = [[-0.006, -0.004, -0.005, -0.003, -0.007, -0.005, -0.004, -0.006]]
    assert hierarchical_difference(groups, null=-0.01)[1] < 0.05
    assert hierarchical_difference(groups, null=0.0)[1] < 0.05
    assert hierarchical_difference(groups, null=-0.005)[1] > 0.9


def test_p_is_two_sided_and_with_many_seeds_that_of_a_t_test():
    values = list(np.random.default_rng(3).normal(0.25, 1, size=60))
    above = hierarchical_difference([values], draws=20_000)[1]
    below = hierarchical_difference([[-value for value in values]], draws=20_000)[1]
    assert above == pytest.approx(below, abs=0.01)
    expected = stats.ttest_1samp(values, 0).pvalue
    assert 0.02 < expected < 0.5
    assert above == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("count", "smallest"), [(2, 0.5), (5, 0.0625), (6, 0.03125), (30, 1 / 101)])
def test_few_differences_cannot_make_p_small(count, smallest):
    assert hierarchical_difference([[1.0] * count], draws=100)[1] == pytest.approx(smallest)


def test_no_difference_at_all_has_a_p_of_one():
    difference, p = hierarchical_difference([[0.0] * 5, [0.0] * 5], draws=50)
    assert (difference.mean, difference.low, difference.high, p) == (0, 0, 0, 1)


def test_a_hierarchical_interval_is_repeatable_and_its_seed_matters():
    groups = [list(np.linspace(-0.01, 0.02, 10)), list(np.linspace(0, 0.03, 10))]
    drawn = [hierarchical_difference(groups, draws=50, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("groups", [[], [[0.1]], [[0.1, 0.2], []], [[0.1, float("nan")]]])
def test_what_has_no_interval_is_refused(groups):
    with pytest.raises(UsageError, match="no interval|not finite"):
        hierarchical_difference(groups)


def test_five_seeds_of_one_task_cover_less_than_they_say():
    """The page of results says 84 %."""
    random = np.random.default_rng(0)
    found = [hierarchical_difference([random.normal(size=5)], draws=400)[0] for _ in range(600)]
    assert np.mean([one.low <= 0 <= one.high for one in found]) == pytest.approx(0.84, abs=0.035)


def test_holm_corrects_as_rs_p_adjust_does():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.2))
def test_holm_rejects_what_the_step_down_procedure_rejects(p, level):
    rejected, order = set(), sorted(range(len(p)), key=lambda place: p[place])
    for done, place in enumerate(order):
        if p[place] * (len(p) - done) > level:
            break
        rejected.add(place)
    assert {place for place, corrected in enumerate(holm(p)) if corrected <= level} == rejected


def objects(values):
    array = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        array[place] = value
    return array


words = st.lists(st.sampled_from(["The", "cat", "cat,", "a", "sat", "SAT!", "--", "on"]), max_size=5).map(" ".join)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.tuples(words, st.lists(words.map("x ".__add__), min_size=1, max_size=3)), min_size=1, max_size=5))
def test_answers_are_judged_as_torchmetrics_does(rows):
    from torchmetrics.functional.text import squad

    answers, accepted = zip(*rows, strict=True)
    names = [str(place) for place in range(len(rows))]
    said = [{"id": name, "prediction_text": answer} for name, answer in zip(names, answers, strict=True)]
    gold = [
        {"id": name, "answers": {"text": texts, "answer_start": [0] * len(texts)}}
        for name, texts in zip(names, accepted, strict=True)
    ]
    expected = squad(said, gold)
    assert 100 * exact_match(answers, accepted) == pytest.approx(float(expected["exact_match"]), rel=1e-5)
    assert 100 * span_f1(answers, accepted) == pytest.approx(float(expected["f1"]), rel=1e-5)


@pytest.mark.parametrize(
    ("answer", "accepted", "exact", "f1"),
    [
        ("the Cat,  sat", ("Cat sat",), 1, 1),
        ("cat sat down", ("a cat", "cat sat"), 0, 0.8),
        ("cat cat", ("cat",), 0, 2 / 3),  # a word counts as often as both have it
        ("", (), 1, 1),
        ("cat", (), 0, 0),
        ("", ("cat",), 0, 0),
        ("The", ("the",), 1, 1),  # nothing is left of either
        ("cat", ("the", "cat"), 1, 1),
        ("", ("the", "cat"), 0, 0),  # what nothing is left of is no answer beside others
    ],
)
def test_an_answer_by_hand(answer, accepted, exact, f1):
    outputs, gold = objects([answer]), objects([accepted])
    assert score("exact_match", outputs, gold, "span_extraction") == exact_match([answer], [accepted]) == exact
    assert score("f1", outputs, gold, "span_extraction") == span_f1([answer], [accepted]) == pytest.approx(f1)


tags = st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"]), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(tags.flatmap(lambda gold: st.tuples(st.permutations(gold), st.just(gold))), min_size=1, max_size=5))
@pytest.mark.filterwarnings("ignore:.*ill-defined")
def test_entities_are_seqevals(sentences):
    from seqeval import metrics as seqeval
    from seqeval.metrics.sequence_labeling import get_entities

    said, gold = zip(*sentences, strict=True)
    for sentence in [*said, *gold]:
        assert entities(sentence) == {(kind, first, last + 1) for kind, first, last in get_entities(list(sentence))}
    rows = [list(sentence) for sentence in said], [list(sentence) for sentence in gold]
    assert entity_f1(said, gold) == pytest.approx(seqeval.f1_score(rows[1], rows[0], zero_division=0))
    expected = seqeval.accuracy_score(rows[1], rows[0])
    outputs, true = (objects([tuple(row) for row in side]) for side in rows)
    assert score("accuracy", outputs, true, "token_classification") == pytest.approx(expected)
    assert score("entity_f1", outputs, true, "token_classification") == entity_f1(said, gold)


def test_entities_by_hand():
    assert entities(["B-x", "I-x", "O", "I-x", "I-y", "B-y"]) == {("x", 0, 2), ("x", 3, 4), ("y", 4, 5), ("y", 5, 6)}
    assert entities([]) == entities(["O"]) == set()
    assert entity_f1([["B-x", "I-x"], ["O"]], [["B-x", "O"], ["B-y"]]) == 0
    assert entity_f1([["B-x", "I-x"], ["B-y"]], [["B-x", "I-x"], ["O"]]) == pytest.approx(2 / 3)
    assert entity_f1([["O"]], [["O"]]) == 0


def test_a_choice_is_right_if_the_most_probable_option_is():
    outputs = np.array([(0.2, 0.8, 0), (0.4, 0.3, 0.3)])
    assert score("accuracy", outputs, np.array([1, 2]), "multiple_choice") == 0.5


@pytest.mark.parametrize(
    ("name", "kind", "outputs", "gold", "message"),
    [
        ("f1", "multiple_choice", np.ones((1, 2)), np.array([0]), "'f1' is unknown; choose one of accuracy"),
        ("accuracy", "span_extraction", objects(["a"]), objects([("a",)]), "choose one of f1, exact_match"),
        ("f1", "span_extraction", objects(["a"]), objects([("a",), ("b",)]), "1 answers .* 2 gold"),
        ("f1", "span_extraction", objects([]), objects([]), "0 answers"),
        ("entity_f1", "token_classification", objects([("O",)]), objects([("O", "O")]), "row 1 has 1 tags where 2"),
    ],
)
def test_answers_that_cannot_be_judged_are_refused(name, kind, outputs, gold, message):
    with pytest.raises(UsageError, match=message):
        score(name, outputs, gold, kind)


def test_differences_of_answers_are_bootstrapped_by_question():
    """The slow part, comparing words, is done once; the interval is that of the mean of its values."""
    random = np.random.default_rng(0)
    accepted = objects([("cat",)] * 40)
    good, bad = (objects(random.choice(["cat", "a dog"], 40, p=p)) for p in ((0.9, 0.1), (0.4, 0.6)))
    found = paired_difference("f1", [good], [bad], accepted, draws=300, kind="span_extraction")
    as_classes = [one_hot([int(answer == "cat") for answer in side]) for side in (good, bad)]
    assert found == paired_difference("accuracy", as_classes[:1], as_classes[1:], np.ones(40, int), draws=300)
    assert found.low > 0
    gold = objects([("B-x", "O"), ("O", "O"), ("B-x", "I-x")] * 20)
    said = objects([("B-x", "O"), ("B-x", "O"), ("O", "O")] * 20)
    of_tags = paired_difference("entity_f1", [gold], [said], gold, draws=100, kind="token_classification")
    assert of_tags.mean == pytest.approx(1 - 2 * 20 / 80)
    assert of_tags.low < of_tags.mean < of_tags.high


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_several_labels_are_those_of_scikit_learn(seed):
    random = np.random.default_rng(seed)
    outputs, gold = random.random((40, 5)), random.integers(0, 2, (40, 5))
    outputs[:, 4], gold[:, 4] = 0.1, 0  # a label that is neither told nor gold
    told = outputs > 0.5
    assert score("micro_f1", outputs, gold) == pytest.approx(sklearn.f1_score(gold, told, average="micro"))
    wanted = sklearn.f1_score(gold, told, average="macro", zero_division=np.nan)
    assert score("macro_f1", outputs, gold) == pytest.approx(wanted)
    assert score("subset_accuracy", outputs, gold) == pytest.approx(sklearn.accuracy_score(gold, told))
    assert agreement(outputs, gold.astype(float), "multi_label") == score("subset_accuracy", outputs, gold)


def test_metrics_of_several_labels_by_hand():
    outputs = np.array([[0.9, 0.4, 0.5], [0.6, 0.7, 0.1]])  # one half is not above it
    gold = np.array([[1, 1, 0], [1, 0, 0]])
    assert score("micro_f1", outputs, gold) == pytest.approx(2 * 2 / (3 + 3))
    assert score("macro_f1", outputs, gold) == pytest.approx((1 + 0) / 2)
    assert score("subset_accuracy", outputs, gold) == 0
    nothing = np.zeros((2, 3))
    assert [score(name, nothing, nothing.astype(int)) for name in ("micro_f1", "macro_f1", "subset_accuracy")] == [
        0,
        0,
        1,
    ]


@pytest.mark.parametrize("gold", [np.array([0, 1]), np.array([[0, 2, 0], [1, 1, 1]]), np.zeros((2, 2), int)], ids=str)
def test_gold_that_is_no_set_of_labels_is_refused(gold):
    with pytest.raises(UsageError, match="a metric of several labels needs outputs and gold of 0 and 1 of one shape"):
        score("micro_f1", np.full((2, 3), 0.5), gold)
