from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from loraseg.data.labels import LabelSpace, write_classes
from loraseg.data.masks import write_mask
from loraseg.data.readers.folder import DatasetFolder
from loraseg.data.readers.remote import download_to_cache
from loraseg.errors import DatasetError
from loraseg.storage import open_store


@pytest.fixture
def source(tmp_path):
    root = tmp_path / "source"
    for kind in ("images", "masks"):
        (root / kind / "train").mkdir(parents=True)
    for index in range(3):
        Image.new("RGB", (8, 6), (index, 0, 0)).save(root / f"images/train/{index}.png")
        write_mask(root / f"masks/train/{index}.png", np.zeros((6, 8), np.uint8))
    write_classes(root / "classes.json", LabelSpace(("road",)))
    (root / "licence.pdf").write_bytes(b"not needed")
    return root


def test_copy_equals_the_source(source, tmp_path):
    copy = download_to_cache(open_store(source.as_uri()), tmp_path / "cache")
    here, there = DatasetFolder.open(source), DatasetFolder.open(copy)
    assert there.digest(there.samples("train")) == here.digest(here.samples("train"))
    assert not (copy / "licence.pdf").exists()


def test_same_content_is_one_copy_and_other_content_another(source, tmp_path):
    cache, store = tmp_path / "cache", open_store(source.as_uri())
    with ThreadPoolExecutor(4) as pool:
        copies = set(pool.map(lambda _: download_to_cache(store, cache), range(8)))
    assert len(copies) == 1
    assert list(cache.iterdir()) == list(copies)
    Image.new("RGB", (8, 6), (99, 0, 0)).save(source / "images/train/0.png")
    changed = download_to_cache(store, cache)
    assert {*copies, changed} == set(cache.iterdir())
    assert len(DatasetFolder.open(changed).samples("train")) == 3


def test_cache_folder_comes_from_the_environment(source, tmp_path, monkeypatch):
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path / "named"))
    assert (tmp_path / "named") in download_to_cache(open_store(source.as_uri())).parents


def test_nothing_there(tmp_path):
    (tmp_path / "void").mkdir()
    with pytest.raises(DatasetError, match="not a dataset folder"):
        download_to_cache(open_store((tmp_path / "void").as_uri()), tmp_path / "cache")


@pytest.mark.parametrize("key", ["images/../../x.png", "images/a\\b.png", "images/a\nb.png"])
def test_keys_that_leave_the_folder(key, tmp_path):
    class Hostile:
        uri = "s3://bucket/set"

        def list(self, prefix=""):
            return iter([key])

        def get(self, key):
            return b"x"

    with pytest.raises(DatasetError, match=r"s3://bucket/set: key .* is not a plain path"):
        download_to_cache(Hostile(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
