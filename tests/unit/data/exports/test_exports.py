import io
import json
import tarfile
from hashlib import sha256

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools.coco import COCO

from loraseg.data import load_pair, open_dataset
from loraseg.data.exports import (
    EXPORTERS,
    export_coco,
    export_folder,
    export_hf_parquet,
    export_webdataset,
    hf_parquet,
)
from loraseg.data.shards.pictures import encode_label
from loraseg.data.shards.reader import ShardDataset
from loraseg.errors import ConfigError, DatasetError, IntegrityError, StoreError
from tests.unit.data.shards.sample_dataset import (
    CLASSES,
    commit_sample_dataset,
    commit_shards,
    make_pair,
    pair_id,
    random_arrays,
)

# pycocotools hands numpy an array type that does not know the keyword `copy` of numpy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
IDS = {pair_id(index): index for index in range(12)}
WIDE = tuple(f"class {n}" for n in range(300))


@pytest.fixture
def dataset(tmp_path):
    commit_sample_dataset(tmp_path / "data")
    return ShardDataset.open(str(tmp_path / "data"))


@pytest.fixture
def wide(tmp_path):
    commit_shards(tmp_path / "wide", [[make_pair(n, classes=300) for n in range(3)]], WIDE)
    return ShardDataset.open(str(tmp_path / "wide"))


def open_image(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def jpeg(index):
    buffer = io.BytesIO()
    Image.fromarray(random_arrays(index)[0]).save(buffer, format="JPEG")
    return buffer.getvalue()


def test_folder_is_one_that_training_reads(dataset, tmp_path):
    assert export_folder(dataset, tmp_path / "out", split="synthetic") == 12
    folder = open_dataset(tmp_path / "out")
    assert folder.splits == ("synthetic",)
    assert folder.label_space.names == CLASSES
    samples = folder.samples("synthetic")
    assert {sample.id for sample in samples} == set(IDS)
    for sample in samples:
        for read, made in zip(
            load_pair(folder, sample), random_arrays(IDS[sample.id]), strict=True
        ):
            np.testing.assert_array_equal(read, made)


def test_jpeg_images_stay_jpeg(tmp_path):
    commit_shards(tmp_path / "data", [[make_pair(0, image=jpeg(0))]])
    dataset = ShardDataset.open(str(tmp_path / "data"))
    export_folder(dataset, tmp_path / "out")
    path = tmp_path / "out" / "images" / "train" / f"{pair_id(0)}.jpg"
    assert path.read_bytes() == jpeg(0)
    export_webdataset(dataset, tmp_path / "tars")
    with tarfile.open(tmp_path / "tars" / "train-000000.tar") as tar:
        assert tar.getnames()[0] == f"{pair_id(0)}.jpg"


def test_folders_hold_no_wide_labels(wide, tmp_path):
    with pytest.raises(DatasetError, match="1 to 255 classes"):
        export_folder(wide, tmp_path / "out")


def test_webdataset_holds_samples_as_neighbours(dataset, tmp_path):
    assert export_webdataset(dataset, tmp_path / "out", pairs_per_tar=5) == 12
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["classes.json", *(f"train-00000{n}.tar" for n in range(3))]
    seen = []
    for name in names[1:]:
        with tarfile.open(tmp_path / "out" / name) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
        for start in range(0, len(members), 3):
            parts = dict(members[start : start + 3])
            key = members[start][0].split(".")[0]
            image, label = random_arrays(IDS[key])
            np.testing.assert_array_equal(open_image(parts[f"{key}.png"]), image)
            np.testing.assert_array_equal(open_image(parts[f"{key}.seg.png"]), label)
            assert json.loads(parts[f"{key}.json"])["mask_name"] == make_pair(IDS[key]).mask_name
            seen.append(key)
    assert sorted(seen) == sorted(IDS)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == list(CLASSES)


def test_tars_hold_ids_for_every_decoder(tmp_path):
    label = random_arrays(0)[1]
    commit_shards(tmp_path / "data", [[make_pair(0, label=encode_label(label, CLASSES))]])
    export_webdataset(ShardDataset.open(str(tmp_path / "data")), tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        picture = Image.open(io.BytesIO(tar.extractfile(f"{pair_id(0)}.seg.png").read()))
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB"))[..., 0], label)


def folder_contents(folder):
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", EXPORTERS)
def test_equal_data_give_equal_bytes(dataset, tmp_path, name):
    for number in range(2):
        EXPORTERS[name](dataset, tmp_path / f"out{number}")
    assert folder_contents(tmp_path / "out0") == folder_contents(tmp_path / "out1")
    assert len(folder_contents(tmp_path / "out0")) > 1


@pytest.mark.parametrize("count", [3, 300])
def test_coco_masks_are_what_pycocotools_reads(dataset, wide, tmp_path, count):
    source, total = (dataset, 12) if count == 3 else (wide, 3)
    assert export_coco(source, tmp_path / "out") == total
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"images", "annotations.json"}
    coco = COCO(tmp_path / "out" / "annotations.json")
    assert [coco.cats[n + 1]["name"] for n in range(count)] == list(source.manifest.classes)
    assert len(coco.imgs) == total
    for number, about in coco.imgs.items():
        data = (tmp_path / "out" / about["file_name"]).read_bytes()
        image, label = random_arrays(IDS[about["file_name"][7:-4]], classes=count)
        np.testing.assert_array_equal(open_image(data), image)
        again = np.full_like(label, 65_535 if count > 255 else 255)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=number)):
            inside = coco.annToMask(annotation).astype(bool)
            assert annotation["area"] == inside.sum()
            rows, columns = np.nonzero(inside)
            x, y, width, height = annotation["bbox"]
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
            again[inside] = annotation["category_id"] - 1
        np.testing.assert_array_equal(again, label)
    numbers = [annotation["id"] for annotation in coco.dataset["annotations"]]
    assert numbers == list(range(1, len(numbers) + 1))


def test_hugging_face_sees_pictures(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_parquet, "_FILE_ROWS", 5)
    monkeypatch.setattr(hf_parquet, "_GROUP_ROWS", 2)
    assert export_hf_parquet(dataset, tmp_path / "out") == 12
    names = [f"train-0000{n}-of-00003.parquet" for n in range(3)]
    assert sorted(path.name for path in (tmp_path / "out" / "data").iterdir()) == names
    rows = []
    for name in names:
        table = pq.read_table(tmp_path / "out" / "data" / name)
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        assert list(features) == table.column_names
        assert features["image"] == features["label"] == {"_type": "Image"}
        assert features["kept"] == {"dtype": "float64", "_type": "Value"}
        rows += table.to_pylist()
    assert {row["pair_id"] for row in rows} == set(IDS)
    for row in rows:
        image, label = random_arrays(IDS[row["pair_id"]])
        np.testing.assert_array_equal(open_image(row["image"]["bytes"]), image)
        np.testing.assert_array_equal(open_image(row["label"]["bytes"]), label)
        assert row["image"]["path"] == f"{row['pair_id']}.png"
        assert row["seed"] == 2**62 + IDS[row["pair_id"]]


def test_hugging_face_loads_it(dataset, tmp_path):
    datasets = pytest.importorskip("datasets")
    export_hf_parquet(dataset, tmp_path / "out")
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    for row in loaded["train"]:
        image, label = random_arrays(IDS[row["pair_id"]])
        np.testing.assert_array_equal(np.asarray(row["image"]), image)
        np.testing.assert_array_equal(np.asarray(row["label"]), label)


@pytest.mark.parametrize("name", EXPORTERS)
def test_nothing_is_left_of_an_export_that_fails(tmp_path, name):
    commit_shards(tmp_path / "data", [[make_pair(0), make_pair(1, label=make_pair(0).label[:50])]])
    dataset = ShardDataset.open(str(tmp_path / "data"))
    with pytest.raises(IntegrityError, match=f"pair {pair_id(1)}: "):
        EXPORTERS[name](dataset, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("name", EXPORTERS)
def test_existing_files_are_not_changed(dataset, tmp_path, name):
    (tmp_path / "out").mkdir()
    with pytest.raises(DatasetError, match="is there already"):
        EXPORTERS[name](dataset, tmp_path / "out")


@pytest.mark.parametrize("name", [name for name in EXPORTERS if name != "coco"])
@pytest.mark.parametrize("split", ["../up", "/root", "a/b", "", ".", "a\0b", "x" * 100, ".hidden"])
def test_names_that_would_leave_the_folder_are_refused(dataset, tmp_path, name, split):
    with pytest.raises(ConfigError, match="split: got"):
        EXPORTERS[name](dataset, tmp_path / "out", split=split)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_pair_in_two_shards_is_noticed(tmp_path):
    commit_shards(tmp_path / "data", [[make_pair(0)], [make_pair(0)]])
    with pytest.raises(IntegrityError, match="is in two shards"):
        export_coco(ShardDataset.open(str(tmp_path / "data")), tmp_path / "out")


def test_a_place_that_cannot_be_written_is_named(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        export_coco(dataset, tmp_path / "file" / "out")


def test_tars_need_a_size(dataset, tmp_path):
    with pytest.raises(ConfigError, match="pairs_per_tar"):
        export_webdataset(dataset, tmp_path / "out", pairs_per_tar=0)
