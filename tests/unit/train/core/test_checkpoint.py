"""Checkpoints in a store that fails."""

import json

import pytest
import torch

from loraseg.errors import StoreError
from loraseg.storage import SHORT_RETRY_TIMEOUT_S, LocalStore
from loraseg.train.core.checkpoint import CheckpointStore, TrainingSnapshot


class FailingStore(LocalStore):
    """Fails every call while ``is_down``; ``retry_timeout_s`` is the last requested timeout."""

    is_down = False
    retry_timeout_s = None

    def with_retry_timeout(self, retry_timeout_s):
        self.retry_timeout_s = retry_timeout_s
        return self

    def get(self, key):
        self._fail_if_due()
        return super().get(key)

    def put(self, key, data):
        self._fail_if_due()
        return super().put(key, data)

    def _fail_if_due(self):
        if self.is_down:
            raise StoreError("down")


def snapshot(step):
    return TrainingSnapshot(step, 0, {"value/w": torch.full((2,), float(step))})


@pytest.fixture
def store(tmp_path):
    return FailingStore(tmp_path)


def test_training_continues_without_the_store(store, caplog):
    slot = CheckpointStore(store)
    assert store.retry_timeout_s == SHORT_RETRY_TIMEOUT_S
    slot.save(snapshot(10))
    store.is_down = True
    slot.save(snapshot(20))
    assert caplog.messages == ["step 20: checkpoint not saved: down"]
    store.is_down = False
    assert slot.load().step == 10
    slot.save(snapshot(30))
    assert slot.load().step == 30


def test_a_failing_store_is_not_an_empty_one(store):
    slot = CheckpointStore(store)
    slot.save(snapshot(10))
    store.is_down = True
    with pytest.raises(StoreError, match="down"):
        slot.load()


def test_a_pointer_to_another_key_counts_as_damaged(tmp_path, caplog):
    store = LocalStore(tmp_path)
    for key in ("../other.safetensors", "latest.json", 7):
        pointer = {"key": key, "sha256": "", "step": 1, "skipped_batches": 0}
        store.put("latest.json", json.dumps(pointer).encode())
        assert CheckpointStore(store).load() is None
    assert caplog.text.count("starting again") == 3


def test_images_are_stored_until_everything_is_cleared(store, caplog):
    slot = CheckpointStore(store)
    slot.save(snapshot(10))
    slot.save_image(100, b"later")
    slot.save_image(20, b"first")
    slot.save(snapshot(20))
    store.put("pictures/other.txt", b"not ours")
    assert list(slot.load_images().items()) == [(20, b"first"), (100, b"later")]
    store.is_down = True
    slot.save_image(30, b"lost")
    assert caplog.messages == ["step 30: image not saved: down"]
    store.is_down = False
    slot.clear()
    assert list(store.list()) == []
