"""What a key loses in each form is bounded, its cost known to the byte, and prototypes stand for all entries."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openbook.config import UsageError
from openbook.knowledge_base.forms import decode, encode, fit, prototypes, size_of
from openbook.knowledge_base.search import normalise
from openbook.types import KnowledgeBase

X = normalise(np.random.default_rng(9).normal(size=(20, 24)))


def units(entries: int, dimensions: int = 24, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(3, dimensions))[random.integers(3, size=entries)]
    return normalise(centres + 0.4 * random.normal(size=(entries, dimensions))).astype(np.float32)


def through(keys: np.ndarray, form: str) -> np.ndarray:
    constants = fit(keys, form)
    return decode(encode(keys, form, constants), form, constants)


def answer(base: KnowledgeBase, query: np.ndarray, temperature: float) -> np.ndarray:
    """The weighted mean over all entries, by its formula in float64."""
    scores = np.exp(base.keys.astype(np.float64) @ query / temperature)
    scores *= 1 if base.weights is None else base.weights
    return scores @ base.values / scores.sum()


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("fp32", 26_405_488),
        ("fp16", 13_271_152),
        ("pca-64", 1_427_952),
        ("sq8", 6_710_128),
        ("pq-64", 1_470_512),
    ],
)
def test_the_bytes_of_the_worked_example(form: str, expected: int) -> None:
    assert size_of(8551, 768, 2, form) == expected
    assert size_of(8551, 768, 2, form, weighted=True) == expected + 4 * 8551


@pytest.mark.parametrize("form", ["fp32", "fp16", "pca-5", "sq8", "pq-6", "opq-6"])
@pytest.mark.parametrize("entries", [300, 1, 0])
def test_the_size_is_that_of_the_arrays(form: str, entries: int) -> None:
    keys = units(entries)
    constants = fit(keys, form)
    codes = encode(keys, form, constants)
    assert len(codes) == entries
    assert decode(codes, form, constants).dtype == np.float32
    others = entries * (8 + 4 * 3)
    assert codes.nbytes + sum(array.nbytes for array in constants.values()) + others == size_of(entries, 24, 3, form)


def test_uncentred_projection_of_the_worked_example(base: KnowledgeBase) -> None:
    constants = fit(base.keys, "pca-1")
    np.testing.assert_allclose(constants["basis"][:, 0], [0.894427, 0.447214], atol=1e-6)
    projected = np.array([(0.8, 0.6)]) @ constants["basis"]
    similarities = projected @ decode(encode(base.keys, "pca-1", constants), "pca-1", constants).T
    np.testing.assert_allclose(similarities, [[0.88, 0.44, 0.88, -0.88]], atol=5e-4)


def test_full_precision_keeps_every_bit_and_half_keeps_its_bound() -> None:
    keys = units(200)
    assert through(keys, "fp32").tobytes() == keys.tobytes()
    error = np.abs(X @ (through(keys, "fp16") - keys).T)
    assert 0 < error.max() <= 2**-11


def test_a_basis_of_full_rank_reproduces_similarities_and_its_signs_are_fixed() -> None:
    keys = units(200)
    basis = fit(keys, "pca-24")["basis"]
    np.testing.assert_allclose((X @ basis) @ (keys @ basis).T, X @ keys.T, atol=1e-5)
    assert (np.take_along_axis(basis, np.abs(basis).argmax(axis=0)[None], 0) > 0).all()
    flipped = fit(-keys, "pca-24")["basis"]
    assert flipped.tobytes() == basis.tobytes()
    energy = ((keys @ basis) ** 2).sum(axis=0)
    assert (np.diff(energy) <= 1e-3).all(), "the first directions are those that hold most"


def test_blocks_of_keys_change_the_basis_by_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = units(200)
    whole = fit(keys, "pca-3")["basis"]
    monkeypatch.setattr("openbook.knowledge_base.forms.BLOCK", 7)
    np.testing.assert_allclose(fit(keys, "pca-3")["basis"], whole, atol=1e-6)
    constants = fit(units(300), "pq-6")
    in_blocks = encode(keys, "pq-6", constants)
    monkeypatch.undo()
    assert in_blocks.tolist() == encode(keys, "pq-6", constants).tolist()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 60), st.booleans())
def test_bytes_of_a_range_keep_their_bound(seed: int, entries: int, constant: bool) -> None:
    keys = units(entries, seed=seed)
    if constant:
        keys[:, 3] = 0.25
    constants = fit(keys, "sq8")
    moved = through(keys, "sq8") - keys
    assert (np.abs(moved) <= constants["step"] / 2 + 1e-6).all()
    error = np.abs(X @ moved.T.astype(np.float64))  # (20, M)
    bound = np.abs(X) @ constants["step"].astype(np.float64) / 2  # (20,)
    assert (error <= bound[:, None] + 1e-6).all()
    beyond = decode(encode(keys * 100, "sq8", constants), "sq8", constants)
    assert (np.abs(beyond) <= np.abs(keys).max() + 1e-5).all(), "what lies outside moves to the border"


def test_products_of_centroids() -> None:
    few = units(256)
    assert through(few, "pq-6").tobytes() == few.tobytes(), "few keys are their own centroids"
    keys = units(2000)
    constants = fit(keys, "pq-6")
    codes = encode(keys, "pq-6", constants)
    assert codes.shape == (2000, 6)
    by_hand = [
        ((keys[7, 4 * part : 4 * part + 4] - constants["codebooks"][part]) ** 2).sum(axis=1).argmin()
        for part in range(6)
    ]
    assert codes[7].tolist() == by_hand
    found = decode(codes, "pq-6", constants)
    assert found[7, 4:8].tolist() == constants["codebooks"][1, codes[7, 1]].tolist()
    error = np.linalg.norm(found - keys, axis=1)
    assert error.mean() < 0.5 * np.linalg.norm(found - np.roll(keys, 1, axis=0), axis=1).mean()
    assert fit(keys, "pq-6")["codebooks"].tobytes() == constants["codebooks"].tobytes()


def test_turned_keys_share_their_variance_out_over_the_parts() -> None:
    """Where energies fall as 1 / rank, parts side by side leave the first with nearly all (Ge et al., 2013)."""
    spread_out = np.random.default_rng(0).normal(size=(4000, 24)) / np.sqrt(np.arange(1, 25))
    keys = normalise(spread_out + 3 * np.eye(24)[23]).astype(np.float32)  # a mean is no variance
    constants = fit(keys, "opq-6")
    rotation = constants["rotation"]
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(24), atol=1e-5)

    def spread(turned: np.ndarray) -> float:
        products = np.log(turned.var(axis=0)).reshape(6, 4).sum(axis=1)
        return float(products.max() - products.min())

    assert spread(keys @ rotation) < 1 < 5 < spread(keys)
    codes = encode(keys, "opq-6", constants)
    found = decode(codes, "opq-6", constants)
    turned = constants["codebooks"][np.arange(6), codes].reshape(4000, 24)
    np.testing.assert_allclose(found, turned @ rotation.T, atol=1e-6)
    lost = [np.square(through(keys, form) - keys).sum(axis=1).mean() for form in ("opq-6", "pq-6")]
    assert lost[0] < 0.9 * lost[1]
    assert encode(found, "opq-6", constants).tolist() == codes.tolist(), "what was lost is not lost again"


def test_keys_that_do_not_vary_are_turned_too() -> None:
    keys = np.zeros((300, 24), np.float32)
    keys[:, :2] = normalise(np.random.default_rng(0).normal(size=(300, 2)))
    np.testing.assert_allclose(through(keys, "opq-12"), keys, atol=0.1)


@pytest.mark.parametrize(
    "form", ["fp8", "pca", "pca-0", "pca-25", "pq-5", "opq-5", "pq-0", "opq-999999999", "sq8-2", "", "PQ-6"]
)
def test_a_form_that_does_not_exist_or_fit_is_refused(form: str) -> None:
    with pytest.raises(UsageError, match=f"form={form!r}.*give"):
        fit(units(3), form)
    with pytest.raises(UsageError, match=f"form={form!r}"):
        size_of(3, 24, 2, form)


def test_a_prototype_of_the_worked_example(base: KnowledgeBase) -> None:
    small = prototypes(base, 3, 0, "classification")  # entries 0, 2 and 3 are of the first class, 1 of the second
    assert sorted(small.weights.tolist()) == [1, 1, 2]
    pair = int(small.weights.argmax())
    np.testing.assert_allclose(small.keys[pair], (0.8, 0.4), atol=1e-6)
    np.testing.assert_allclose(small.values[pair], (0.75, 0.25), atol=1e-6)
    assert small.texts[pair] in ("east", "between")
    assert small.manifest["prototypes_of"] == 4


def test_weights_of_prototypes_of_the_worked_example(base: KnowledgeBase) -> None:
    small = KnowledgeBase(
        keys=np.float32([(0.8, 0.4), (0, 1), (-1, 0)]),
        values=np.float32([(0.75, 0.25), (0.2, 0.8), (0.5, 0.5)]),
        ids=("a", "b", "c"),
        texts=("", "", ""),
        manifest={},
        weights=np.float32([2, 1, 1]),
    )
    made = prototypes(base, 3, 0, "classification")
    query = np.array([0.8, 0.6])
    np.testing.assert_allclose(answer(small, query, 0.5), (0.626111, 0.373889), atol=1e-6)
    np.testing.assert_allclose(answer(made, query, 0.5), (0.626111, 0.373889), atol=1e-6)
    np.testing.assert_allclose(answer(base, query, 0.5), (0.609001, 0.390999), atol=1e-6)


def many(entries: int, kind: str, seed: int = 0) -> KnowledgeBase:
    random = np.random.default_rng(seed)
    values = random.dirichlet([0.3] * 3, size=entries) if kind == "classification" else random.normal(size=(entries, 1))
    return KnowledgeBase(
        keys=units(entries, seed=seed),
        values=values.astype(np.float32),
        ids=tuple(f"t/{place}" for place in range(entries)),
        texts=tuple(f"text {place}" for place in range(entries)),
        manifest={},
        weights=random.choice([0, 0.5, 1, 3], size=entries).astype(np.float32),
        origins=tuple(random.choice(["train", "corpus"], size=entries).tolist()),
    )


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_as_many_prototypes_as_entries_are_the_entries(kind: str) -> None:
    base = many(80, kind)
    small = prototypes(base, 80, 0, kind)
    present = np.flatnonzero(base.weights > 0)
    assert small.keys.tobytes() == base.keys[present].tobytes()
    for query in X[:5]:
        np.testing.assert_allclose(answer(small, query, 0.1), answer(base, query, 0.1), atol=1e-6)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_prototypes_keep_weight_and_means_and_repeat_themselves(kind: str) -> None:
    base = many(400, kind)
    small = prototypes(base, 50, 3, kind)
    assert 40 <= len(small.ids) <= 50
    assert small.weights.sum() == pytest.approx(base.weights.sum())
    np.testing.assert_allclose(small.weights @ small.keys, base.weights @ base.keys, atol=1e-3)
    np.testing.assert_allclose(small.weights @ small.values, base.weights @ base.values, atol=1e-3)
    assert len(set(small.ids)) == len(small.ids)
    for origin in ("train", "corpus"):
        own = np.array(small.origins) == origin
        assert small.weights[own].sum() == pytest.approx(base.weights[np.array(base.origins) == origin].sum())
    again = prototypes(base, 50, 3, kind)
    assert (again.keys.tobytes(), again.ids) == (small.keys.tobytes(), small.ids)
    distance = np.linalg.norm(base.keys[:, None] - small.keys[None], axis=2).min(axis=1)
    assert distance.mean() < 0.7 * np.linalg.norm(base.keys - base.keys.mean(axis=0), axis=1).mean()


def test_too_few_prototypes_are_refused_and_no_entries_have_none(empty_base: KnowledgeBase) -> None:
    with pytest.raises(UsageError, match="prototypes=2.*6 groups"):
        prototypes(many(80, "classification"), 2, 0, "classification")
    assert prototypes(empty_base, 5, 0, "classification").keys.shape == (0, 2)
    identical = replace(many(80, "classification"), keys=np.repeat(units(1), 80, axis=0))
    assert 6 <= len(prototypes(identical, 30, 0, "classification").ids) <= 30
