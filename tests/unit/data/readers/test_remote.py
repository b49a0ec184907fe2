from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from loraseg.data.datasets import digest_samples
from loraseg.data.labels import LabelSpace, write_classes
from loraseg.data.masks import write_mask
from loraseg.data.readers.opening import open_dataset
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


@pytest.fixture
def open_remote(monkeypatch, tmp_path):
    """open_dataset for s3:// URIs, with each bucket a folder of ``tmp_path``."""
    monkeypatch.setattr(
        "loraseg.storage.open_store",
        lambda uri: open_store((tmp_path / uri.removeprefix("s3://")).as_uri()),
    )
    return open_dataset


def copy_all(source, cache):
    store = open_store(source.as_uri())
    return download_to_cache(store, list(store.list()), cache)


def test_copy_equals_the_source(source, tmp_path, open_remote, monkeypatch):
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path / "cache"))
    local, remote = open_dataset(source), open_remote("s3://source")
    assert remote.location != local.location
    assert digest_samples(remote, remote.samples("train")) == digest_samples(
        local, local.samples("train")
    )
    (copy,) = (tmp_path / "cache" / "datasets").iterdir()
    assert sorted(path.name for path in copy.iterdir()) == ["classes.json", "images", "masks"]


def test_same_content_is_one_copy_and_other_content_another(source, tmp_path):
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as pool:
        copies = set(pool.map(lambda _: copy_all(source, cache), range(8)))
    assert len(copies) == 1
    assert list(cache.iterdir()) == list(copies)
    Image.new("RGB", (8, 6), (99, 0, 0)).save(source / "images/train/0.png")
    changed = copy_all(source, cache)
    assert {*copies, changed} == set(cache.iterdir())
    assert len(open_dataset(changed).samples("train")) == 3


def test_cache_folder_comes_from_the_environment(source, tmp_path, monkeypatch):
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path / "named"))
    assert (tmp_path / "named") in copy_all(source, None).parents


def test_a_store_without_a_dataset(tmp_path, open_remote):
    (tmp_path / "void").mkdir()
    with pytest.raises(DatasetError, match=r"void: not a dataset; expected a folder 'images'"):
        open_remote("s3://void")


@pytest.mark.parametrize("key", ["images/../../x.png", "images/a\\b.png", "images/a\nb.png"])
def test_keys_outside_the_folder_are_rejected(key, tmp_path):
    class HostileStore:
        uri = "s3://bucket/set"

        def list(self, prefix=""):
            return iter([key])

        def get(self, key):
            return b"x"

    with pytest.raises(DatasetError, match=r"s3://bucket/set: key .* is not a plain path"):
        download_to_cache(HostileStore(), [key], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
