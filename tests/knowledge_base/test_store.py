import hashlib
import json
import pickle
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

import openbook.knowledge_base.generations as generations
import openbook.knowledge_base.store as store
from openbook.config import UsageError
from openbook.knowledge_base import editing
from openbook.knowledge_base.store import KnowledgeBase, Reader, check_fits, load, save

FIELDS = ("keys", "values", "ids", "texts", "weights", "origins")
FORMS = ("fp32", "fp16", "pca-1", "sq8", "pq-1", "opq-1")


@pytest.fixture
def rich(base):
    """Every field is given."""
    return replace(base, weights=np.float32([1, 2, 1, 0.5]), origins=("train", "train", "corpus", "corpus"))


@pytest.fixture
def folder(rich, tmp_path) -> Path:
    save(rich, tmp_path / "kb")
    return tmp_path / "kb"


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def edit_manifest(folder: Path, **changes) -> None:
    (folder / "manifest.json").write_text(json.dumps({**manifest_of(folder), **changes}), encoding="utf-8")


def file_of(folder: Path, field: str) -> str:
    return manifest_of(folder)["segments"][0][field]


def forge(folder: Path, field: str, data: bytes) -> None:
    """Put a file in place of another and vouch for it in the manifest, as somebody with bad intentions would."""
    old, digest = file_of(folder, field), hashlib.sha256(data).hexdigest()
    name = f"data/{field}-{digest[:16]}{Path(old).suffix}"
    (folder / name).write_bytes(data)
    manifest = manifest_of(folder)
    manifest["files"].pop(old)
    manifest["files"][name] = {"bytes": len(data), "sha256": digest}
    manifest["segments"][0][field] = name
    edit_manifest(folder, **manifest)


def forge_array(folder: Path, field: str, array: np.ndarray) -> None:
    np.save(folder / "forged.npy", array)
    forge(folder, field, (folder / "forged.npy").read_bytes())


def write_version_1(base, folder: Path) -> None:
    """The flat folder that openbook wrote before a base could be edited."""
    folder.mkdir()
    np.save(folder / "keys.npy", base.keys)
    np.save(folder / "values.npy", base.values)
    for name in ("ids", "texts"):
        (folder / f"{name}.json").write_text(json.dumps(getattr(base, name), ensure_ascii=False), encoding="utf-8")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
    }
    sizes = {"schema_version": 1, "M": len(base.ids), "d": 2, "C": 2, "contains_text": True, "files": files}
    (folder / "manifest.json").write_text(json.dumps({**base.manifest, **sizes}), encoding="utf-8")


def same(one, two) -> None:
    """Every entry is the same, bit for bit."""
    assert (one.ids, one.texts, one.origins) == (two.ids, two.texts, two.origins)
    for name in ("keys", "values", "weights", "basis"):
        first, second = getattr(one, name), getattr(two, name)
        assert (first is None) == (second is None), name
        assert first is None or (first.dtype, first.shape, first.tobytes()) == (
            second.dtype,
            second.shape,
            second.tobytes(),
        )


def test_what_was_saved_is_loaded(base, rich, folder, tmp_path):
    loaded = load(folder)
    same(loaded, rich)
    assert loaded.manifest["origin"] == "train"
    save(base, tmp_path / "plain")
    same(load(tmp_path / "plain"), base)


def test_the_manifest_says_what_is_inside(folder):
    manifest = manifest_of(folder)
    assert (manifest["schema_version"], manifest["M"], manifest["d"], manifest["C"]) == (2, 4, 2, 2)
    assert (manifest["kind"], manifest["labels"], manifest["key_space"]) == ("classification", ["no", "yes"], "k1")
    assert (manifest["form"], manifest["dtype"], manifest["contains_text"]) == ("fp32", "float32", True)
    assert (manifest["generation"], manifest["parent"], manifest["stale"]) == (0, None, False)
    assert manifest["origins"] == {"corpus": 2, "train": 2}
    assert sorted(manifest["files"]) == sorted(name for name in contents(folder) if name != "manifest.json")
    for name, promised in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert promised == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("form", FORMS)
def test_save_load_save_is_identical_in_every_byte(rich, tmp_path, form):
    save(rich, tmp_path / "one", form)
    save(load(tmp_path / "one"), tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert manifest_of(tmp_path / "two")["form"] == form
    same(load(tmp_path / "two"), load(tmp_path / "one"))


def test_the_layout_in_memory_is_irrelevant(rich, folder, tmp_path):
    reversed_manifest = dict(reversed(rich.manifest.items()))
    save(replace(rich, keys=np.asfortranarray(rich.keys), manifest=reversed_manifest), tmp_path / "columns")
    assert contents(tmp_path / "columns") == contents(folder)


def test_a_projected_base_has_its_basis_and_the_queries_dimension(base, tmp_path):
    save(base, tmp_path / "kb", "pca-1")
    loaded = load(tmp_path / "kb")
    assert (loaded.keys.shape, loaded.basis.shape, loaded.manifest["d"]) == ((4, 1), (2, 1), 2)
    np.testing.assert_allclose(loaded.keys, base.keys @ loaded.basis, atol=1e-3)


@pytest.mark.parametrize("form", ["sq8", "pca-1", "pq-1", "opq-1"])
def test_what_a_form_has_lost_is_not_made_up_again(base, tmp_path, form):
    save(base, tmp_path / "kb", form)
    with pytest.raises(UsageError, match=f"form='fp32'.*{form}.*build"):
        save(load(tmp_path / "kb"), tmp_path / "other", "fp32")
    assert not (tmp_path / "other").exists()


def test_an_unknown_form_is_refused(base, tmp_path):
    with pytest.raises(UsageError, match="form='int4'"):
        save(base, tmp_path / "kb", "int4")


def test_an_empty_base_and_one_without_texts_are_legal(base, empty_base, tmp_path):
    save(empty_base, tmp_path / "empty")
    assert load(tmp_path / "empty").keys.shape == (0, 2)
    save(replace(base, texts=("",) * 4), tmp_path / "secret")
    secret = load(tmp_path / "secret")
    assert (secret.manifest["contains_text"], secret.texts) == (False, ("",) * 4)


def test_any_string_is_a_text(base, tmp_path):
    strange = replace(base, texts=("\ud800", "\x00", '"\n', "\u2028"), ids=("\udfff", "", " ", "'"))
    save(strange, tmp_path / "kb")
    same(load(tmp_path / "kb"), strange)


def test_prototypes_need_no_unit_keys(base, tmp_path):
    keys = base.keys * np.float32(0.5)
    with pytest.raises(UsageError, match=r"length of row 0 is 0\.5"):
        save(replace(base, keys=keys), tmp_path / "kb")
    save(replace(base, keys=keys, manifest={**base.manifest, "prototypes_of": 9}), tmp_path / "kb")
    assert load(tmp_path / "kb").keys.tobytes() == keys.tobytes()


def test_a_regression_base_holds_one_score_an_entry(base, tmp_path):
    manifest = {"kind": "regression", "labels": None, "key_space": "k1"}
    scores = replace(base, values=np.float32([[4.5], [-1], [3.2], [0]]), manifest=manifest)
    save(scores, tmp_path / "kb")
    assert load(tmp_path / "kb").values.tolist() == scores.values.tolist()
    with pytest.raises(UsageError, match=r"score of row 0 is inf.*finite"):
        save(replace(scores, values=np.float32([[np.inf], [1], [1], [1]])), tmp_path / "kb")
    with pytest.raises(UsageError, match="C=1.*C=2"):
        save(replace(base, manifest=manifest), tmp_path / "kb")


@pytest.mark.parametrize("field", FIELDS)
def test_a_changed_truncated_or_missing_file_is_refused(folder, field):
    name = file_of(folder, field)
    path, data = folder / name, (folder / name).read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UsageError, match=f"{name}: sha256.*[0-9a-f]{{64}}.*[0-9a-f]{{64}}"):
        load(folder)
    path.write_bytes(data[:-1])
    with pytest.raises(UsageError, match=f"{name}: bytes.*{len(data)}.*{len(data) - 1}"):
        load(folder)
    path.unlink()
    with pytest.raises(UsageError, match=f"{name} is missing"):
        load(folder)


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("code ran while a knowledge base was read",))


@pytest.mark.parametrize("field", [*FIELDS, "removed", "low", "manifest", "changes"])
def test_a_pickle_is_refused_under_any_name_even_with_a_matching_digest(rich, tmp_path, field):
    folder, bad = tmp_path / "kb", pickle.dumps(Malicious())
    save(rich, folder, "sq8")
    editing.remove(folder, ["t/1"])
    if field in FIELDS:
        forge(folder, field, bad)
    elif field in ("manifest", "changes"):
        (folder / f"{field}.json{'l' * (field == 'changes')}").write_bytes(bad)
    else:
        manifest, digest = manifest_of(folder), hashlib.sha256(bad).hexdigest()
        name = f"data/{field}-{digest[:16]}.npy"
        (folder / name).write_bytes(bad)
        manifest["files"].pop(manifest["removed"] if field == "removed" else manifest["constants"]["low"])
        manifest["files"][name] = {"bytes": len(bad), "sha256": digest}
        edit_manifest(
            folder,
            files=manifest["files"],
            **({"removed": name} if field == "removed" else {"constants": {**manifest["constants"], "low": name}}),
        )
    with pytest.raises(UsageError, match=field):
        (editing.changes if field == "changes" else load)(folder)


def test_arrays_of_objects_and_archives_are_refused(folder):
    np.save(folder / "keys.npy", np.array([Malicious()], dtype=object), allow_pickle=True)
    forge(folder, "keys", (folder / "keys.npy").read_bytes())
    with pytest.raises(UsageError, match="keys-.*is not a plain array"):
        load(folder)
    np.savez(folder / "archive.npz", keys=np.ones((4, 2), np.float32))
    forge(folder, "keys", (folder / "archive.npz").read_bytes())
    with pytest.raises(UsageError, match="keys-.*is not a plain array"):
        load(folder)


def test_an_array_shorter_than_its_header_says_is_refused(folder):
    forge(folder, "values", (folder / file_of(folder, "values")).read_bytes()[:-4])
    with pytest.raises(UsageError, match="values-.*is not a plain array"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 3}, r"schema_version \(found 3\).*2"),
        ({"kind": "ranking"}, r"kind \(found 'ranking'\)"),
        ({"key_space": None}, r"key_space \(found None\)"),
        ({"labels": ["no"]}, r"labels \('no',\).*C=2"),
        ({"M": 5}, "ids.*5.*4"),
        ({"d": 3}, r"keys.*\(4, 3\).*\(4, 2\)"),
        ({"form": "fp8"}, "form 'fp8'"),
        ({"form": "fp16"}, "form 'fp16'.*float32"),
        ({"form": "fp16", "dtype": "float16"}, "keys.*float16.*float32"),
        ({"contains_text": False}, "contains_text.*False.*True"),
        ({"files": {}}, r"files are \[\].*data/ids"),
        ({"constants": {"low": "../low.npy"}}, r"files are.*\.\./low.npy"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_by_field(folder, changes, message):
    edit_manifest(folder, **changes)
    with pytest.raises(UsageError, match=message):
        load(folder)


@pytest.mark.parametrize("name", ["../keys.npy", "data/../../keys-{}.npy", "/etc/keys-{}.npy", "data/keys-00.npy"])
def test_a_file_elsewhere_is_never_read(folder, name):
    manifest = manifest_of(folder)
    file = manifest["files"].pop(file_of(folder, "keys"))
    name = name.format(file["sha256"][:16])
    manifest["files"][name], manifest["segments"][0]["keys"] = file, name
    edit_manifest(folder, **manifest)
    with pytest.raises(UsageError, match="no names of data files"):
        load(folder)


def test_labels_that_grew_with_the_manifest_do_not_fit_the_values(folder):
    edit_manifest(folder, C=3, labels=["no", "yes", "maybe"])
    with pytest.raises(UsageError, match=r"values.*\(4, 3\).*\(4, 2\)"):
        load(folder)


@pytest.mark.parametrize(
    ("field", "array", "message"),
    [
        ("keys", np.float64([(1, 0)] * 4), "float32.*float64"),
        ("keys", np.float32([1, 0, 1, 0]), r"keys.*4"),
        ("keys", np.float32([(1, 0), (1, 0), (0.6, 0.6), (1, 0)]), "keys: the length of row 2 is 0.848"),
        ("keys", np.float32([(1, 0), (np.nan, 0), (1, 0), (1, 0)]), "keys: the length of row 1 is nan"),
        ("keys", np.float32([(1, 0), (1, 0), (1, 0), (0, 0)]), "keys: the length of row 3 is 0"),
        ("values", np.float32([(1, 0), (0.5, 0.6), (1, 0), (1, 0)]), "values: the sum of row 1 is 1.1"),
        ("values", np.float32([(1, 0), (1.5, -0.5), (1, 0), (1, 0)]), "values: a probability of row 1 is -0.5"),
        ("values", np.float32([(1, 0)] * 3), r"values.*\(4, 2\).*\(3, 2\)"),
        ("weights", np.float32([1, 1, -1, 1]), "weight of row 2 is -1"),
        ("weights", np.float32([1, 1, 1]), r"weights.*\(4,\).*\(3,\)"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused_on_load_and_on_save(rich, folder, tmp_path, field, array, message):
    with pytest.raises(UsageError, match=message):
        save(replace(rich, **{field: array}), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    forge_array(folder, field, array)
    with pytest.raises(UsageError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("field", "content", "message"),
    [
        ("ids", '["a", "b", "c", "a"]', "'a' is the id of 2 entries"),
        ("ids", '["a", "b", "c"]', "ids.*4.*3"),
        ("texts", '["a", "b", "c"]', "texts.*4.*3"),
        ("texts", '["a", "b", "c", 4]', "texts-.*is not a list of strings"),
        ("texts", '"abcd"', "texts-.*is not a list of strings"),
        ("texts", "[" * 100_000, "texts-.*is not JSON"),
        ("origins", '["train"]', "origins.*4.*1"),
    ],
)
def test_strings_that_cannot_be_used_are_refused(folder, field, content, message):
    forge(folder, field, content.encode())
    with pytest.raises(UsageError, match=message):
        load(folder)


@pytest.mark.parametrize("form", ["sq8", "pca-1", "pq-1", "opq-1"])
def test_constants_of_another_shape_or_beyond_numbers_are_refused(base, tmp_path, form):
    for number, change in enumerate((lambda array: array[:0], lambda array: array * np.float32(np.nan))):
        folder = tmp_path / str(number)
        save(base, folder, form)
        manifest = manifest_of(folder)
        field, name = next(iter(manifest["constants"].items()))
        np.save(folder / "forged.npy", change(np.load(folder / name)))
        data = (folder / "forged.npy").read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        forged = f"data/{field}-{digest[:16]}.npy"
        (folder / forged).write_bytes(data)
        manifest["files"].pop(name)
        manifest["files"][forged] = {"bytes": len(data), "sha256": digest}
        edit_manifest(folder, files=manifest["files"], constants={**manifest["constants"], field: forged})
        with pytest.raises(UsageError, match="constants|keys"):
            load(folder)


def test_a_base_without_a_key_space_is_not_saved(base, tmp_path):
    with pytest.raises(UsageError, match=r"key_space \(found nothing\)"):
        save(replace(base, manifest={"kind": "classification", "labels": ["no", "yes"]}), tmp_path / "kb")
    assert not (tmp_path / "kb").exists()


def test_a_folder_that_is_no_knowledge_base_is_refused(tmp_path):
    with pytest.raises(UsageError, match="manifest.json is missing"):
        load(tmp_path)
    with pytest.raises(UsageError, match="manifest.json is missing"):
        Reader(tmp_path).current()


def test_a_flat_folder_of_version_1_is_read(base, tmp_path):
    write_version_1(base, tmp_path / "kb")
    loaded = load(tmp_path / "kb")
    same(loaded, base)
    assert (loaded.manifest["generation"], loaded.manifest["licence"]) == (0, "CC0")
    (tmp_path / "kb" / "texts.json").write_text("[]")
    with pytest.raises(UsageError, match="texts.json: bytes"):
        load(tmp_path / "kb")


def test_a_base_fits_only_its_own_key_space_and_label_order(base):
    check_fits(base, "k1", ("no", "yes"))
    with pytest.raises(UsageError, match="key_space.*'k1'.*'k2'"):
        check_fits(base, "k2", ("no", "yes"))
    with pytest.raises(UsageError, match=r"labels.*\['no', 'yes'\].*\['yes', 'no'\]"):
        check_fits(base, "k1", ("yes", "no"))
    with pytest.raises(UsageError, match="labels.*None"):
        check_fits(base, "k1", None)


@pytest.mark.parametrize("name", ["teacher", "projection", "tokenizer", "max_length"])
def test_the_message_says_which_part_of_the_key_space_differs(base, name):
    parts = {"teacher": "t1", "projection": "w1", "tokenizer": "v1", "max_length": "64"}
    base = replace(base, manifest={**base.manifest, "made_from": parts})
    check_fits(base, "k1", ("no", "yes"), parts)
    with pytest.raises(UsageError, match=f"^{name} of the knowledge base is '{parts[name]}'.*student's is 'other'"):
        check_fits(base, "k2", ("no", "yes"), {**parts, name: "other"})
    with pytest.raises(UsageError, match="^key_space"):
        check_fits(base, "k2", ("no", "yes"), {"other": "thing"})


def test_the_users_object_saves_and_loads_itself(base, tmp_path):
    mine = KnowledgeBase(base.keys, base.values, base.ids, base.texts, base.manifest)
    mine.save_pretrained(tmp_path / "kb", form="fp16")
    again = KnowledgeBase.from_pretrained(str(tmp_path / "kb"))
    assert isinstance(again, KnowledgeBase)
    again.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "kb")


def test_to_save_over_a_base_is_its_next_generation(base, folder):
    reader = Reader(folder)
    assert reader.generation == 0
    save(replace(base, texts=("a", "b", "c", "d")), folder)
    assert (reader.generation, reader.current().texts) == (1, ("a", "b", "c", "d"))
    assert [change["what"] for change in editing.changes(folder)] == ["save"]
    (folder / "manifest.json").write_text("{}")
    save(base, folder)
    assert load(folder).manifest["generation"] == 0


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The fields of the data files that were read."""
    found: list[str] = []
    original = generations.read_file

    def spied(folder, manifest, name):
        found.append(Path(name).name.partition("-")[0])
        return original(folder, manifest, name)

    monkeypatch.setattr(store, "read_file", spied)
    monkeypatch.setattr(generations, "read_file", spied)
    return found


def test_a_reader_reads_only_what_is_new(rich, folder, reads):
    reader = Reader(folder)
    first = reader.current()
    assert sorted(reads) == sorted(FIELDS)
    reads.clear()
    assert reader.current() is first
    assert reads == []
    more = replace(rich, ids=("a", "b", "c", "d"))
    editing.add(folder, more)
    reads.clear()
    assert reader.current().ids == (*rich.ids, *more.ids)
    assert sorted(reads) == sorted(set(FIELDS) - {"keys", "values", "texts", "weights", "origins"})  # the rest is equal
    editing.relabel(folder, ["t/1"], [(0, 1)])
    reads.clear()
    assert reader.current().values[1].tolist() == [0, 1]
    assert reads == ["values"]
    editing.remove(folder, ["t/0"])
    reads.clear()
    assert reader.current().ids == ("t/1", "t/2", "t/3", "a", "b", "c", "d")
    assert reads == ["removed"]
    same(reader.current(), load(folder))
    assert first.ids == rich.ids
    assert first.values[1].tolist() == rich.values[1].tolist()


def test_a_reader_that_comes_too_late_for_a_file_reads_the_newer_generation(folder, monkeypatch):
    original, edits = store.read_manifest, [["t/0"], ["t/1"]]

    def slow(here):
        manifest = original(here)
        if edits:
            editing.remove(here, edits.pop())
            editing.compact(here)
        return manifest

    monkeypatch.setattr(store, "read_manifest", slow)
    assert load(folder).ids == ("t/2", "t/3")
    assert edits == []


def test_threads_may_share_a_reader(folder):
    reader, found = Reader(folder), []
    threads = [threading.Thread(target=lambda: found.append(reader.current())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({id(base) for base in found}) == 1


def test_a_second_writer_waits_and_then_names_the_lock(base, folder, monkeypatch):
    monkeypatch.setattr(generations, "PATIENCE", 0.05)
    before = contents(folder)
    with FileLock(folder / ".lock"):
        for write in (lambda: save(base, folder), lambda: editing.remove(folder, ["t/0"])):
            with pytest.raises(UsageError, match=r"0\.05 seconds.*\.lock; try again"):
                write()
    assert contents(folder) == before
    editing.remove(folder, ["t/0"])


@pytest.fixture
def label_sets(base):
    """Values of several labels, each by itself."""
    values = np.float32([(0.9, 0.8), (0, 1), (0, 0), (0.5, 0.5)])
    return replace(base, values=values, manifest={**base.manifest, "kind": "multi_label"})


def test_values_of_several_labels_need_not_sum_to_one(label_sets, tmp_path):
    save(label_sets, tmp_path)
    assert load(tmp_path).values.tolist() == label_sets.values.tolist()
    editing.relabel(tmp_path, ["t/2"], [[1, 1]])
    assert load(tmp_path).values[2].tolist() == [1, 1]
    with pytest.raises(UsageError, match=r"values: a probability of row 0 is 1\.5, but it must lie between 0 and 1"):
        editing.relabel(tmp_path, ["t/2"], [[0, 1.5]])


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan, np.inf])
def test_a_value_of_several_labels_is_a_probability(label_sets, tmp_path, value):
    label_sets.values[2, 1] = value
    with pytest.raises(UsageError, match=r"values: a probability of row 2 is .* must lie between 0 and 1 \(1 of 4"):
        save(label_sets, tmp_path / "kb")


def test_a_book_of_classes_is_none_of_several_labels(base, label_sets, tmp_path):
    save(base, tmp_path)
    with pytest.raises(UsageError, match="kind of the entries is 'multi_label', but that of the knowledge base is"):
        editing.add(tmp_path, replace(label_sets, ids=tuple("abcd")))
    with pytest.raises(UsageError, match=r"labels .* against C=2 columns"):
        save(replace(label_sets, manifest={**label_sets.manifest, "labels": ["no"]}), tmp_path / "kb")
