"""The closed-set training job: a segmenter, a control without synthetic data, and their scores.

One store holds ``segmenter.safetensors`` and ``control.safetensors``, the record of each finished
run in ``arms/<name>.json``, then ``results.json`` and ``report.html``. The checkpoints of a run are
below ``checkpoints/``, under a prefix that contains the run digest.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from loraseg.backbones.weights import resolve_weights
from loraseg.config import to_dict
from loraseg.errors import ConfigError, IntegrityError, StageError
from loraseg.revision import code_revision
from loraseg.storage import ObjectNotFoundError, ObjectStore, absolute_uri, open_store
from loraseg.train.closed_set.data_spec import DataSpec, TrainingDataDigests
from loraseg.train.closed_set.loop import (
    TrainingContext,
    TrainingData,
    TrainingResult,
    train_segmenter,
)
from loraseg.train.closed_set.recipes import SegmenterRecipe, named_segmenter_recipe
from loraseg.train.closed_set.report import render_training_report
from loraseg.train.core.task_digest import task_digest

__all__ = [
    "SegmenterTrainingConfig",
    "SegmenterTrainingTask",
    "TaskRunner",
    "run_locally",
    "train_segmenters",
]

logger = logging.getLogger(__name__)

RESULTS_KEY, REPORT_KEY = "results.json", "report.html"
_FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterTrainingConfig:
    """Data, recipe and output of the job.

    Attributes:
        real: Dataset folder, a path or URI.
        split: Labelled split to train on.
        val_split: Labelled split that selects the best checkpoint.
        images: Number of training images, the first by name; or names of images; None for all.
        synthetic: Store URIs of synthetic datasets.
        recipe: A key of :data:`~loraseg.train.closed_set.recipes.SEGMENTER_RECIPES`.
        overrides: Fields of the recipe that differ.
        output: Store URI of the results.
        reuse: ``output`` of another job: a run with equal inputs is copied from it instead of
            trained. Rounds of MatchMask++ share their control in this way.
        seed: Seed of weights, batches and augmentation.
    """

    real: str
    split: str = "train"
    val_split: str = "val"
    images: int | tuple[str, ...] | None = None
    synthetic: tuple[str, ...] = ()
    recipe: str = "unet-miniature"
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    output: str
    reuse: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SegmenterTrainingTask:
    """One run of the job. Running it again after a kill at any point is safe.

    Attributes:
        name: ``segmenter`` or ``control``.
        run_digest: Digest (hex) of everything that decides the result.
        recipe: Network, data mix and optimisation.
        data_spec: Locations of the data; a control has no synthetic data.
        digests: Digests of the data when the job started.
        output: As in :class:`SegmenterTrainingConfig`.
        seed: As in :class:`SegmenterTrainingConfig`.
    """

    name: str
    run_digest: str
    recipe: SegmenterRecipe
    data_spec: DataSpec
    digests: TrainingDataDigests
    output: str
    seed: int

    @property
    def checkpoint_prefix(self) -> str:
        """Prefix of the checkpoints below the output."""
        return f"checkpoints/{self.name}-{self.run_digest[:16]}"

    def open_data(self) -> TrainingData:
        """Open the data.

        Raises:
            DatasetError: The data cannot be used.
            IntegrityError: A manifest is damaged.
            StageError: The data changed since the job started.
            StoreError: A store cannot be read.
        """
        data, digests = self.data_spec.open()
        if digests != self.digests:
            changed = ", ".join(self.data_spec.changed_sources(self.digests, digests))
            raise StageError(
                f"{self.name}: the data changed while training: {changed}; run again to train on "
                "the new data"
            )
        return data

    def write_result(self, result: TrainingResult, classes: Sequence[str]) -> None:
        """Write the segmenter, then its record.

        Raises:
            StoreError: The store cannot be written.
        """
        store = open_store(self.output)
        store.put(f"{self.name}.safetensors", result.segmenter)
        store.put(_run_key(self.name), _encode_json(_run_record(self, result, classes)))


TaskRunner = Callable[[SegmenterTrainingTask], None]


def train_segmenters(
    config: SegmenterTrainingConfig, run_task: TaskRunner | None = None
) -> dict[str, Any]:
    """Train the segmenter and, if there is synthetic data, its control; write results and report.

    Finished runs are not trained again.

    Args:
        config: Data, recipe and output.
        run_task: Trains one run, calls :meth:`SegmenterTrainingTask.write_result` and deletes the
            checkpoints; by default :func:`run_locally`.

    Returns:
        The content of ``results.json``.

    Raises:
        ConfigError: The config is wrong, or the output holds the results of other inputs.
        LorasegError: As in :func:`~loraseg.train.closed_set.loop.train_segmenter`.
    """
    store = open_store(config.output)
    tasks, data = _plan_tasks(config)
    digest = _json_digest([task.run_digest for task in tasks])
    known = _read_json(store, RESULTS_KEY)
    if known is not None:
        if known.get("run") != digest:
            raise ConfigError(
                f"output {store.uri}: holds results of other inputs; choose another one"
            )
        logger.info("%s: already finished", store.uri)
        return known
    for task in tasks:
        if not (_is_finished(store, task) or _copy_finished(config.reuse, task, store)):
            logger.info("%s: training starts", task.name)
            (run_task or run_locally)(task)
    records = {task.name: _read_finished(store, task) for task in tasks}
    results = {
        "format": _FORMAT,
        "run": digest,
        "classes": list(data.label_space.names),
        "arms": records,
        "settings": {**to_dict(config), "recipe": to_dict(tasks[0].recipe)},
        "code_revision": code_revision(),
    }
    page = render_training_report(
        results, data, {name: store.get(f"{name}.safetensors") for name in records}
    )
    store.put(REPORT_KEY, page.encode())
    store.put(RESULTS_KEY, _encode_json(results))
    return results


def run_locally(task: SegmenterTrainingTask) -> None:
    """Train a run in this process, with checkpoints in its store.

    Raises:
        LorasegError: As in :func:`~loraseg.train.closed_set.loop.train_segmenter`.
    """
    store, key = open_store(task.output), f"{task.checkpoint_prefix}/state.safetensors"

    def load() -> bytes | None:
        try:
            return store.get(key)
        except ObjectNotFoundError:
            return None

    def save(step: int, scores: Mapping[str, float], data: bytes | None) -> None:
        del step, scores
        if data is not None:
            store.put(key, data)

    data = task.open_data()
    context = TrainingContext(load_checkpoint=load, save_checkpoint=save)
    trained = train_segmenter(task.recipe, data, task.seed, context)
    task.write_result(trained, data.label_space.names)
    store.delete(key)


def _plan_tasks(
    config: SegmenterTrainingConfig,
) -> tuple[list[SegmenterTrainingTask], TrainingData]:
    recipe = named_segmenter_recipe(config.recipe, config.overrides)
    if recipe.weights is not None:
        recipe = dataclasses.replace(recipe, weights=_weights_file(recipe.weights))
    data_spec = DataSpec(
        real=absolute_uri(config.real),
        split=config.split,
        val_split=config.val_split,
        images=config.images,
        synthetic=tuple(absolute_uri(uri) for uri in config.synthetic),
    )
    data, digests = data_spec.open()
    runs = [("segmenter", data_spec, digests)]
    if data_spec.synthetic:
        real_only = dataclasses.replace(data_spec, synthetic=())
        runs.append(("control", real_only, dataclasses.replace(digests, synthetic=())))
    return [
        SegmenterTrainingTask(
            name=name,
            run_digest=_run_digest(recipe, config.seed, run_digests),
            recipe=recipe,
            data_spec=run_spec,
            digests=run_digests,
            output=absolute_uri(config.output),
            seed=config.seed,
        )
        for name, run_spec, run_digests in runs
    ], data


def _weights_file(spec: str) -> str:
    path = Path(spec).expanduser().resolve()
    return str(path / "model.safetensors" if path.is_dir() else path)


def _run_digest(recipe: SegmenterRecipe, seed: int, data: TrainingDataDigests) -> str:
    """Return the digest of recipe, seed and data."""
    settings = to_dict(recipe)
    # The name changes nothing; without synthetic data, neither does their share.
    del settings["name"]
    if not data.synthetic:
        del settings["synthetic_share"]
    return task_digest(
        _FORMAT,
        {
            "recipe": settings,
            "weights": recipe.weights and resolve_weights(recipe.weights).digest,
            "seed": seed,
            "real": data.real,
            "val": data.val,
            "synthetic": data.synthetic,
        },
        compact=False,
    )


def _run_record(
    task: SegmenterTrainingTask, result: TrainingResult, classes: Sequence[str]
) -> dict[str, Any]:
    confusion = result.confusion
    scores: dict[str, Any] = {"miou": None, "pixel_accuracy": None}
    if confusion.counts.sum():
        scores = {"miou": confusion.miou(), "pixel_accuracy": confusion.pixel_accuracy()}
    return {
        "run": task.run_digest,
        "file": f"{task.name}.safetensors",
        "sha256": hashlib.sha256(result.segmenter).hexdigest(),
        "step": result.step,
        **scores,
        "iou": {
            name: None if math.isnan(value) else float(value)
            for name, value in zip(classes, confusion.iou(), strict=True)
        },
        # Rows are labels, columns predictions, the last one "no class".
        "confusion": confusion.counts.tolist(),
        "losses": result.curves.losses,
        "scores": [
            (step, None if math.isnan(score) else score) for step, score in result.curves.scores
        ],
    }


def _copy_finished(reuse_from: str | None, task: SegmenterTrainingTask, store: ObjectStore) -> bool:
    """Copy a finished run of equal inputs from another output, under any of its names."""
    if reuse_from is None:
        return False
    other = open_store(reuse_from)
    for name in ("control", "segmenter"):
        record = _read_json(other, _run_key(name))
        if record is not None and record.get("run") == task.run_digest:
            data = other.get(f"{name}.safetensors")
            if hashlib.sha256(data).hexdigest() != record.get("sha256"):
                raise IntegrityError(f"{other.uri}/{name}.safetensors: not what its scores are of")
            store.put(f"{task.name}.safetensors", data)
            store.put(
                _run_key(task.name), _encode_json({**record, "file": f"{task.name}.safetensors"})
            )
            logger.info("%s: copied from %s", task.name, other.uri)
            return True
    return False


def _is_finished(store: ObjectStore, task: SegmenterTrainingTask) -> bool:
    record = _read_json(store, _run_key(task.name))
    return record is not None and record.get("run") == task.run_digest


def _read_finished(store: ObjectStore, task: SegmenterTrainingTask) -> dict[str, Any]:
    record = _read_json(store, _run_key(task.name))
    if record is None:
        raise IntegrityError(f"{store.uri}/{_run_key(task.name)}: missing, although it was trained")
    return record


def _run_key(name: str) -> str:
    return f"arms/{name}.json"


def _read_json(store: ObjectStore, key: str) -> dict[str, Any] | None:
    try:
        content = json.loads(store.get(key))
    except ObjectNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{store.uri}/{key}: damaged: {error}") from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{store.uri}/{key}: damaged: not an object")
    return cast(dict[str, Any], content)


def _encode_json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _json_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
