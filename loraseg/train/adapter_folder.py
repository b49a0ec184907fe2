"""Train one adapter in this process, without Ray and without a manifest."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraseg.adapters import Adapter, load_adapter
from loraseg.cache_dir import cache_dir
from loraseg.library import AdapterCard, Library
from loraseg.library.card import Role
from loraseg.storage import open_store
from loraseg.train import tasks
from loraseg.train.core.progress import Progress, ProgressCallback
from loraseg.train.manifest import TrainingDomain, TrainingManifest

__all__ = ["TrainedAdapter", "train_adapter"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedAdapter:
    """A trained adapter.

    Attributes:
        adapter: Its pairs.
        card: Its card, with recipe and metrics.
        files: Its files by name, peft's among them.
        version: Its version in the library; None if it was not published.
    """

    adapter: Adapter
    card: AdapterCard
    files: Mapping[str, bytes]
    version: int | None


def _ignore(progress: Progress) -> None:
    del progress


def train_adapter(  # noqa: PLR0913 - the arguments of a one-line call
    data: str | Path,
    *,
    name: str | None = None,
    base: str = "miniature",
    recipe: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    images: int | None = None,
    seed: int = 0,
    role: Role = "segmenter",
    encoder: str = "miniature",
    library: str | Path | None = None,
    output: str | Path | None = None,
    on_progress: ProgressCallback = _ignore,
) -> TrainedAdapter:
    """Train an adapter on a dataset folder and return it.

    A killed call that is repeated with the same arguments resumes from its last checkpoint. The
    result equals that of ``jobs.train_adapters`` with the same settings, byte for byte on the CPU.

    Args:
        data: Dataset folder, a path or URI: ``classes.json``, ``images/<split>`` and
            ``masks/<split>``; the splits "train" and, to score on, "val".
        name: Name of the adapter; None is the last part of ``data``.
        base: The frozen model: ``miniature``, a weight file, or for generators a diffusers folder.
        recipe: Name of the recipe; None is the miniature one of the role.
        overrides: Fields of the recipe that differ, nested fields as nested mappings.
        images: Number of training images, chosen by seed; None for all.
        seed: Seed of the choice of images, the initial pairs and the batches.
        role: "segmenter" or "generator".
        encoder: For segmenters, the CLIP of the index.
        library: Store URI of a library to publish to; None publishes nowhere.
        output: Folder or store URI that the adapter's files are written to; None writes none.
        on_progress: Called about once per step.

    Raises:
        ConfigError: The name, the recipe or an override is wrong.
        DatasetError: The data cannot be used, or has no labelled pixel.
        StageError: The loss is not finite, or there is nothing to learn from.
        StoreError: A store cannot be reached.
        IntegrityError: The weights of the base or the library are damaged.
    """
    name = name or str(data).rstrip("/").rpartition("/")[2]
    with tempfile.TemporaryDirectory() as scratch:
        manifest = TrainingManifest(
            library=str(library or scratch),
            checkpoints=str(cache_dir("checkpoints")),
            role=role,
            base=base,
            encoder=encoder,
            recipe=recipe,
            overrides=dict(overrides or {}),
            images=images,
            seed=seed,
            domains=(TrainingDomain(name=name, data=str(data)),),
        )
        (task,) = manifest.tasks()
        result = tasks.train_adapter(task, on_progress)
        files, card = Library(open_store(task.library)).load(name, result.version)
    if output is not None:
        _write(str(output), files)
    return TrainedAdapter(
        adapter=load_adapter(files, name=name),
        card=card,
        files=files,
        version=None if library is None else result.version,
    )


def _write(output: str, files: Mapping[str, bytes]) -> None:
    store = open_store(output)
    for key, data in files.items():
        store.put(key, data)
