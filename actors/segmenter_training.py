# pyright: basic
"""Train a segmenter on Ray Train: any number of workers, each with its share of every batch.

Ray Train keeps the workers together: it starts them, joins them by torch.distributed, and starts
all of them again from the last checkpoint when one is lost. The name of its run carries the digest
of all that decides the result, so that a job that is started again goes on where it was, and one
with other settings never takes up its checkpoints.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import ray.train
import ray.train.torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from actors.arrow_place import arrow_place
from actors.resources import Placement, StoreAccess
from loraseg.errors import LorasegError, StageError
from loraseg.train.closed_set import Trained, TrainingContext, train_segmenter
from loraseg.train.closed_work import RunTask, SegmenterTask

__all__ = ["Workers", "on_ray_train"]

_STATE = "state.safetensors"
# A node that an autoscaler brings takes minutes to start.
_START_TIMEOUT_S = 1800
# Not secret, unlike the rest of what a worker must know of the store: Ray logs these.
_CHECKSUMS = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")

Train = Callable[..., Trained]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """How many train together, and what each takes.

    Attributes:
        count: How many; the batch is shared out evenly.
        resources: Of each; ``retries`` is how often the group may lose a worker.
        loaders: Processes beside each worker that prepare its batches.
    """

    count: int = 1
    resources: Placement = field(default_factory=Placement)
    loaders: int = 0


def on_ray_train(workers: Workers, train: Train = train_segmenter) -> RunTask:
    """Return what trains one arm on the connected Ray cluster.

    Args:
        workers: How many, and what each takes.
        train: What a worker calls.
    """

    def run(task: SegmenterTask) -> None:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
        trainer = TorchTrainer(
            partial(_work, task, train, workers.loaders, StoreAccess.of_driver()),
            scaling_config=_scaling(workers),
            run_config=_run_config(task, workers),
            torch_config=TorchConfig(backend="nccl" if workers.resources.gpus else "gloo"),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from error
        path, system = arrow_place(task.output)
        system.delete_dir(f"{path}/{task.place}")

    return run


def _scaling(workers: Workers) -> ScalingConfig:
    needs = {"CPU": workers.resources.cpus, **workers.resources.custom}
    if workers.resources.gpus:
        needs["GPU"] = workers.resources.gpus
    return ScalingConfig(
        num_workers=workers.count,
        use_gpu=workers.resources.gpus > 0,
        resources_per_worker=needs,
    )


def _run_config(task: SegmenterTask, workers: Workers) -> RunConfig:
    path, system = arrow_place(task.output)
    folder, _, name = task.place.rpartition("/")
    checksums = {key: os.environ[key] for key in _CHECKSUMS if key in os.environ}
    return RunConfig(
        name=name,
        storage_path=f"{path}/{folder}",
        storage_filesystem=system,
        failure_config=FailureConfig(max_failures=workers.resources.retries),
        checkpoint_config=CheckpointConfig(num_to_keep=1),
        worker_runtime_env={"env_vars": checksums},
    )


def _work(task: SegmenterTask, train: Train, loaders: int, access: StoreAccess) -> None:
    """Train on one worker; the first one writes the result."""
    access.apply()
    place = ray.train.get_context()
    context = TrainingContext(
        rank=place.get_world_rank(),
        world=place.get_world_size(),
        device=str(ray.train.torch.get_device()),
        loaders=loaders,
        load=_load,
        save=_save,
    )
    data = task.data()
    trained = train(task.recipe, data, task.seed, context)
    if context.rank == 0:
        task.finish(trained, data.label_space.names)


def _load() -> bytes | None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return Path(folder, _STATE).read_bytes()


def _save(step: int, scores: Mapping[str, float], data: bytes | None) -> None:
    told = {"step": step, **scores}
    name = f"step-{step:09d}"
    if data is None:
        ray.train.report(told, checkpoint_dir_name=name)
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, _STATE).write_bytes(data)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(told, checkpoint=checkpoint, checkpoint_dir_name=name)


def _cause(error: ray.train.TrainingFailedError) -> LorasegError:
    """Return what a worker stopped for, without Ray's wrapping."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        found: BaseException | None = failure
        while found is not None:
            if isinstance(found, LorasegError):
                return found
            found = getattr(found, "cause", None) or found.__cause__
    return StageError(f"the training was lost for good: {str(error)[:500]}")
