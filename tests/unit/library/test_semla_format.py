import dataclasses
import io
import pickle
import zipfile

import numpy as np
import pytest

from loraseg.errors import AdapterMismatchError, IntegrityError
from loraseg.library import Library, export_loradb, import_loradb
from loraseg.library.semla_format import SEMLA_ENCODER_ID
from loraseg.storage import LocalStore
from tests.unit.library.sample_adapters import BASE, make_card, make_centroid, make_files

DOMAINS = ("acdc-rain", "coconutL")


def write_domain(folder, name, embedding):
    target = folder / name
    target.mkdir(parents=True)
    for file, data in make_files(name).items():
        (target / file).write_bytes(data)
    np.savez(target / f"{name}_statistics.npz", train_average_embedding=embedding)
    return target


@pytest.fixture
def loradb(tmp_path):
    folder = tmp_path / "loradb"
    rng = np.random.default_rng(0)
    for name in DOMAINS:
        write_domain(folder, name, rng.normal(size=(1, 768)).astype(np.float32))
    (folder / "README").write_text("not a domain")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def library(tmp_path):
    return Library(LocalStore(tmp_path / "library"))


def test_import(loradb, library):
    spaces = {"acdc-rain": ["road", "sky"]}
    entries = import_loradb(loradb, library, BASE, label_spaces=spaces)
    assert [entry.name for entry in entries] == ["acdc-rain", "coconutl"]
    assert library.generation() == 1
    files, card = library.load("acdc-rain")
    assert files == make_files("acdc-rain")
    assert card.label_space == ("road", "sky")
    (centroid,) = card.centroids
    with np.load(loradb / "acdc-rain" / "acdc-rain_statistics.npz") as arrays:
        stored = arrays["train_average_embedding"][0]
    np.testing.assert_array_equal(centroid.vector.astype(np.float32), stored)
    assert (centroid.encoder_id, centroid.normalised) == (SEMLA_ENCODER_ID, False)
    assert (centroid.count, centroid.spread) == (None, None)


def test_export_gives_the_folder_back(loradb, library, tmp_path):
    import_loradb(loradb, library, BASE)
    written = export_loradb(library, tmp_path / "out")
    assert [path.name for path in written] == list(DOMAINS)
    for path in written:
        original = loradb / path.name
        assert sorted(p.name for p in path.iterdir()) == sorted(p.name for p in original.iterdir())
        for file in make_files():
            assert (path / file).read_bytes() == (original / file).read_bytes()
        name = f"{path.name}_statistics.npz"
        with np.load(path / name) as ours, np.load(original / name) as theirs:
            assert ours.files == theirs.files == ["train_average_embedding"]
            mean = ours["train_average_embedding"]
            assert mean.dtype == np.float32
            np.testing.assert_array_equal(mean, theirs["train_average_embedding"])
    assert [p.name for p in export_loradb(library, tmp_path / "one", ["coconutl"])] == ["coconutL"]


@pytest.mark.parametrize(
    "centroids", [(), (make_centroid(), make_centroid()), (make_centroid(normalised=True),)]
)
def test_what_the_format_cannot_say_is_not_exported(library, tmp_path, centroids):
    library.publish("fog", make_files(), make_card("fog", centroids=centroids))
    with pytest.raises(AdapterMismatchError, match="a loradb folder holds exactly one"):
        export_loradb(library, tmp_path / "out")


def test_a_hostile_recipe_cannot_choose_the_folder(library, tmp_path):
    card = make_card("fog")
    card = dataclasses.replace(card, recipe={"loradb_domain": "../../fog"})
    library.publish("fog", make_files(), card)
    assert export_loradb(library, tmp_path / "out") == (tmp_path / "out" / "fog",)


def npz_bytes(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not a zip", "no readable array"),
        (pickle.dumps([1]), "no readable array"),
        (npz_bytes(other=npy_bytes(np.zeros((1, 4)))), "no readable array"),
        (npz_bytes(train_average_embedding=npy_bytes(np.array([[{}]]))), "allow_pickle=False"),
        (npz_bytes(train_average_embedding=bytes(2**21)), "unpacks to 2097152 bytes"),
        (npz_bytes(train_average_embedding=npy_bytes(np.zeros(4))), r"float64 of shape \(4,\)"),
        (npz_bytes(train_average_embedding=npy_bytes(np.zeros((1, 4), int))), "is int64 of shape"),
        (npz_bytes(train_average_embedding=npy_bytes(np.full((1, 4), np.nan))), "not finite"),
    ],
)
def test_hostile_statistics(tmp_path, library, data, message):
    target = write_domain(tmp_path / "db", "fog", np.zeros((1, 4)))
    (target / "fog_statistics.npz").write_bytes(data)
    with pytest.raises(IntegrityError, match=message):
        import_loradb(tmp_path / "db", library, BASE)
    assert library.entries() == ()


def test_incomplete_folders(tmp_path, library):
    with pytest.raises(IntegrityError, match="no such folder"):
        import_loradb(tmp_path / "absent", library, BASE)
    with pytest.raises(IntegrityError, match=r"no folder in it holds an adapter_config.json"):
        import_loradb(tmp_path, library, BASE)
    target = write_domain(tmp_path / "db", "fog", np.zeros((1, 4)))
    (target / "adapter_model.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"adapter_model.safetensors: cannot be read"):
        import_loradb(tmp_path / "db", library, BASE)
