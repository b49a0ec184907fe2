"""Checkpoints of one training run in an object store.

``<step>.safetensors`` is written first, then ``latest.json`` with its key and digest, so a reader
always finds the last complete checkpoint or the one before. The prefix of the store contains the
task digest, so a run with another config never resumes the checkpoint.
"""

import dataclasses
import hashlib
import json
import logging
import re
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from loraseg.errors import StoreError
from loraseg.storage.store import SHORT_RETRY_TIMEOUT_S, ObjectNotFoundError, ObjectStore
from loraseg.tensor_types import Tensor

__all__ = ["CheckpointStore", "TrainingSnapshot"]

logger = logging.getLogger(__name__)

_LATEST = "latest.json"
_KEY = re.compile(r"\d+\.safetensors")
_IMAGE_PREFIX = "pictures/"
_IMAGE_KEY = re.compile(r"pictures/(\d{9})\.png")


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingSnapshot:
    """The state after ``step`` steps: tensors by name, and the number of skipped batches."""

    step: int
    skipped_batches: int
    tensors: dict[str, Tensor]


class CheckpointStore:
    """The newest checkpoint of one run.

    Several workers may write to it, for instance when a slow one was replaced: equal steps have
    equal bytes, and :meth:`save` ignores a worker that is behind.
    """

    def __init__(self, store: ObjectStore) -> None:
        """Store checkpoints at the root of ``store``."""
        self._store = store
        self._short_timeout = store.with_retry_timeout(SHORT_RETRY_TIMEOUT_S)

    def save(self, snapshot: TrainingSnapshot) -> None:
        """Write a checkpoint and delete the one before.

        A store that fails for 15 s is only logged: training continues, and a later checkpoint is
        tried again. The other methods use the store's own retry timeout.
        """
        key = f"{snapshot.step:09d}.safetensors"
        data = safetensors.torch.save({k: v.contiguous() for k, v in snapshot.tensors.items()})
        pointer = {
            "key": key,
            "sha256": hashlib.sha256(data).hexdigest(),
            "step": snapshot.step,
            "skipped_batches": snapshot.skipped_batches,
        }
        try:
            if self._latest_step() > snapshot.step:
                return  # Another worker is ahead; keep the pointer to its checkpoint.
            self._short_timeout.put(key, data)
            self._short_timeout.put(_LATEST, json.dumps(pointer, sort_keys=True).encode())
            _delete_data(self._short_timeout, before=key)
        except StoreError as error:
            logger.warning("step %d: checkpoint not saved: %s", snapshot.step, error)

    def load(self) -> TrainingSnapshot | None:
        """Return the newest complete checkpoint, None if there is none.

        A damaged checkpoint counts as none: training again is slow, but correct.

        Raises:
            StoreError: The store cannot be read.
        """
        try:
            pointer: dict[str, Any] = json.loads(self._store.get(_LATEST))
            if not _KEY.fullmatch(pointer["key"]):
                raise ValueError(f"its key is {pointer['key']!r}")
            data = self._store.get(pointer["key"])
            if hashlib.sha256(data).hexdigest() != pointer["sha256"]:
                raise ValueError("its bytes differ from its digest")
            tensors = safetensors.torch.load(data)
            return TrainingSnapshot(int(pointer["step"]), int(pointer["skipped_batches"]), tensors)
        except ObjectNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            logger.warning("%s: checkpoint damaged, starting again: %s", self._store.uri, error)
            return None

    def save_image(self, step: int, png: bytes) -> None:
        """Save an image of the run after ``step`` steps; a failure is only logged."""
        try:
            self._short_timeout.put(f"{_IMAGE_PREFIX}{step:09d}.png", png)
        except StoreError as error:
            logger.warning("step %d: image not saved: %s", step, error)

    def load_images(self) -> dict[int, bytes]:
        """Return the saved images (PNG) by step, in increasing order.

        Raises:
            StoreError: The store cannot be read.
        """
        matches = (_IMAGE_KEY.fullmatch(key) for key in self._store.list(_IMAGE_PREFIX))
        return {int(match[1]): self._store.get(match[0]) for match in matches if match}

    def clear(self) -> None:
        """Delete all checkpoints and images, the pointer first."""
        self._store.delete(_LATEST)
        _delete_data(self._store)
        for key in list(self._store.list(_IMAGE_PREFIX)):
            self._store.delete(key)

    def _latest_step(self) -> int:
        try:
            return int(json.loads(self._short_timeout.get(_LATEST))["step"])
        except (ObjectNotFoundError, ValueError, KeyError, TypeError):
            return -1


def _delete_data(store: ObjectStore, before: str | None = None) -> None:
    for key in list(store.list()):
        if key.endswith(".safetensors") and (before is None or key < before):
            store.delete(key)
