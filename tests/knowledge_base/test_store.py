import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from openbook.config import UsageError
from openbook.knowledge_base.store import FILES, check_fits, load, save


@pytest.fixture
def folder(base, tmp_path) -> Path:
    save(base, tmp_path / "kb")
    return tmp_path / "kb"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def forge(folder: Path, name: str, data: bytes) -> None:
    """Replace a file and vouch for it in the manifest, as somebody with bad intentions would."""
    (folder / name).write_bytes(data)
    files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(folder, files=files)


def forge_array(folder: Path, name: str, array: np.ndarray) -> None:
    np.save(folder / name, array)
    forge(folder, name, (folder / name).read_bytes())


def test_what_was_saved_is_loaded(base, folder):
    loaded = load(folder)
    assert loaded.keys.tobytes() == base.keys.tobytes()
    assert loaded.values.tobytes() == base.values.tobytes()
    assert (loaded.keys.shape, loaded.values.shape) == ((4, 2), (4, 2))
    assert (loaded.ids, loaded.texts) == (base.ids, base.texts)
    assert loaded.manifest["origin"] == "train"


def test_the_manifest_says_what_is_inside(folder):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["schema_version"], manifest["M"], manifest["d"], manifest["C"]) == (1, 4, 2, 2)
    assert (manifest["kind"], manifest["labels"], manifest["key_space"]) == ("classification", ["no", "yes"], "k1")
    assert manifest["contains_text"] is True
    assert set(manifest["files"]) == {"keys.npy", "values.npy", "ids.json", "texts.json"}
    for name, promised in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert promised == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_save_load_save_is_identical_in_every_byte(folder, tmp_path):
    save(load(folder), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert len(contents(folder)) == len(FILES) + 1


def test_the_layout_in_memory_is_irrelevant(base, folder, tmp_path):
    reversed_manifest = dict(reversed(base.manifest.items()))
    save(replace(base, keys=np.asfortranarray(base.keys), manifest=reversed_manifest), tmp_path / "columns")
    assert contents(tmp_path / "columns") == contents(folder)


def test_an_empty_base_and_one_without_texts_are_legal(base, empty_base, tmp_path):
    save(empty_base, tmp_path / "empty")
    assert load(tmp_path / "empty").keys.shape == (0, 2)
    save(replace(base, texts=("",) * 4), tmp_path / "secret")
    assert load(tmp_path / "secret").manifest["contains_text"] is False


def test_a_regression_base_holds_one_score_an_entry(base, tmp_path):
    manifest = {"kind": "regression", "labels": None, "key_space": "k1"}
    scores = replace(base, values=np.float32([[4.5], [-1], [3.2], [0]]), manifest=manifest)
    save(scores, tmp_path / "kb")
    assert load(tmp_path / "kb").values.tolist() == scores.values.tolist()
    with pytest.raises(UsageError, match="score is not finite"):
        save(replace(scores, values=np.float32([[np.inf], [1], [1], [1]])), tmp_path / "kb")
    with pytest.raises(UsageError, match="C=1.*C=2"):
        save(replace(base, manifest=manifest), tmp_path / "kb")


@pytest.mark.parametrize("name", FILES)
def test_a_changed_truncated_or_missing_file_is_refused(folder, name):
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


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_pickle_is_refused_under_any_name_even_with_a_matching_digest(folder, name):
    if name == "manifest.json":
        (folder / name).write_bytes(pickle.dumps(Malicious()))
    else:
        forge(folder, name, pickle.dumps(Malicious()))
    with pytest.raises(UsageError, match=name):
        load(folder)


def test_arrays_of_objects_and_archives_are_refused(folder):
    np.save(folder / "keys.npy", np.array([Malicious()], dtype=object), allow_pickle=True)
    forge(folder, "keys.npy", (folder / "keys.npy").read_bytes())
    with pytest.raises(UsageError, match="keys.npy is not a plain array"):
        load(folder)
    np.savez(folder / "archive.npz", keys=np.ones((4, 2), np.float32))
    forge(folder, "keys.npy", (folder / "archive.npz").read_bytes())
    with pytest.raises(UsageError, match="keys.npy is an archive"):
        load(folder)


def test_an_array_shorter_than_its_header_says_is_refused(folder):
    forge(folder, "values.npy", (folder / "values.npy").read_bytes()[:-4])
    with pytest.raises(UsageError, match="values.npy is not a plain array"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, r"schema_version \(found 2\).*1"),
        ({"kind": "ranking"}, r"kind \(found 'ranking'\)"),
        ({"key_space": None}, r"key_space \(found None\)"),
        ({"labels": ["no"]}, r"labels \('no',\).*C=2"),
        ({"M": 5}, "ids.*5.*4"),
        ({"d": 3}, r"keys.*\(4, 3\).*\(4, 2\)"),
        ({"contains_text": False}, "contains_text.*False.*True"),
        ({"files": {}}, r"files.*\[\].*keys.npy"),
        ({"files": {"../keys.npy": {"bytes": 1, "sha256": "0"}}}, r"files.*\.\./keys.npy"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_by_field(folder, changes, message):
    edit_manifest(folder, **changes)
    with pytest.raises(UsageError, match=message):
        load(folder)


def test_labels_that_grew_with_the_manifest_do_not_fit_the_values(folder):
    edit_manifest(folder, C=3, labels=["no", "yes", "maybe"])
    with pytest.raises(UsageError, match=r"values.*\(4, 3\).*\(4, 2\)"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("keys.npy", np.float64([(1, 0)] * 4), "float32.*float64"),
        ("keys.npy", np.float32([(1, 0), (1, 0), (0.6, 0.6), (1, 0)]), "keys: the length of row 2 is 0.848"),
        ("keys.npy", np.float32([(1, 0), (np.nan, 0), (1, 0), (1, 0)]), "keys: the length of row 1 is nan"),
        ("values.npy", np.float32([(1, 0), (0.5, 0.6), (1, 0), (1, 0)]), "values: the sum of row 1 is 1.1"),
        ("values.npy", np.float32([(1, 0), (1.5, -0.5), (1, 0), (1, 0)]), "values: a probability is -0.5"),
        ("values.npy", np.float32([(1, 0)] * 3), r"values.*\(4, 2\).*\(3, 2\)"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused_on_load_and_on_save(base, folder, tmp_path, name, array, message):
    with pytest.raises(UsageError, match=message):
        save(replace(base, **{name.removesuffix(".npy"): array}), tmp_path / "other")
    assert not (tmp_path / "other").exists()
    forge_array(folder, name, array)
    with pytest.raises(UsageError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.json", '["a", "b", "c", "a"]', "distinct ids.*4.*3"),
        ("ids.json", '["a", "b", "c"]', "ids.*4.*3"),
        ("texts.json", '["a", "b", "c"]', "texts.*4.*3"),
        ("texts.json", '["a", "b", "c", 4]', "texts.json is not a list of strings"),
        ("texts.json", '"abcd"', "texts.json is not a list of strings"),
    ],
)
def test_ids_and_texts_that_cannot_be_used_are_refused(folder, name, content, message):
    forge(folder, name, content.encode())
    with pytest.raises(UsageError, match=message):
        load(folder)


def test_a_base_without_a_key_space_is_not_saved(base, tmp_path):
    with pytest.raises(UsageError, match=r"key_space \(found nothing\)"):
        save(replace(base, manifest={"kind": "classification", "labels": ["no", "yes"]}), tmp_path / "kb")


def test_a_folder_that_is_no_knowledge_base_is_refused(tmp_path):
    with pytest.raises(UsageError, match="manifest.json is missing"):
        load(tmp_path)


def test_a_base_fits_only_its_own_key_space_and_label_order(base):
    check_fits(base, "k1", ("no", "yes"))
    with pytest.raises(UsageError, match="key_space.*'k1'.*'k2'"):
        check_fits(base, "k2", ("no", "yes"))
    with pytest.raises(UsageError, match=r"labels.*\['no', 'yes'\].*\['yes', 'no'\]"):
        check_fits(base, "k1", ("yes", "no"))
    with pytest.raises(UsageError, match="labels.*None"):
        check_fits(base, "k1", None)
