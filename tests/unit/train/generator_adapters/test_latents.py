"""The cache of latents and prompts: hits, damage, failing stores."""

import threading

import pytest
import torch

from loraseg.errors import StoreError
from loraseg.storage import LocalStore, open_store
from loraseg.train.generator_adapters.latents import TensorCache
from tests.unit.train.tiny_generator import denoising_data, tiny_generator, tiny_recipe


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


class CountingComputation:
    """Counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"b": torch.arange(5.0), "a": torch.ones(2, 3)}


def test_stored_tensors_are_not_computed_again(store):
    make = CountingComputation()
    first, second = (TensorCache(store).get_or_compute("kind", {"of": 1}, make) for _ in range(2))
    assert make.calls == 1
    assert all(torch.equal(first[name], second[name]) for name in ("a", "b"))
    TensorCache(store).get_or_compute("kind", {"of": 2}, make)
    TensorCache(store).get_or_compute("other", {"of": 1}, make)
    assert make.calls == 3


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_damaged_tensors_are_computed_and_stored_again(store, damage, caplog):
    make = CountingComputation()
    TensorCache(store).get_or_compute("kind", {}, make)
    (key,) = store.list()
    good = store.get(key)
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    store.put(key, {"cut": good[:-3], "flip": flipped, "empty": b"", "foreign": b"x" * 99}[damage])
    again = TensorCache(store).get_or_compute("kind", {}, make)
    assert torch.equal(again["b"], torch.arange(5.0))
    assert make.calls == 2
    assert store.get(key) == good
    assert "damaged, computed again" in caplog.text


class UnreachableStore(LocalStore):
    def with_retry_timeout(self, patience_s):
        return self

    def get(self, key):
        raise StoreError("down")

    def put(self, key, data):
        raise StoreError("down")


def test_a_failing_store_only_costs_time(tmp_path, caplog):
    make = CountingComputation()
    found = TensorCache(UnreachableStore(tmp_path)).get_or_compute("kind", {}, make)
    assert torch.equal(found["b"], torch.arange(5.0))
    assert "cannot be read" in caplog.text
    assert "not stored: down" in caplog.text


def test_concurrent_workers_store_equal_tensors(store):
    make = CountingComputation()
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(TensorCache(store).get_or_compute("kind", {}, make))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(one["b"], torch.arange(5.0)) for one in found)
    assert len(list(store.list())) == 1


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_second_run_encodes_nothing(tmp_path, kind, monkeypatch):
    base = tiny_generator(kind)
    first = denoising_data(tmp_path, base, tiny_recipe()).batch(0, 4)
    calls = base.encoded_prompts
    assert calls > 0
    monkeypatch.setattr(type(base), "encode_images", None)
    second = denoising_data(tmp_path, base, tiny_recipe()).batch(0, 4)
    assert base.encoded_prompts == calls
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.text.hidden, second.text.hidden)
    if kind == "sdxl":
        assert torch.equal(first.text.pooled, second.text.pooled)


def test_a_changed_image_is_encoded_again(tmp_path):
    base = tiny_generator()
    denoising_data(tmp_path, base, tiny_recipe())
    before = set(open_store(str(tmp_path / "cache")).list("latents/"))
    images = tmp_path / "fog" / "images" / "train"
    (images / "0.png").write_bytes((images / "1.png").read_bytes())
    denoising_data(tmp_path, base, tiny_recipe())
    assert len(set(open_store(str(tmp_path / "cache")).list("latents/")) - before) == 1
