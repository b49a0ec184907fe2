"""Train a closed-set segmenter on Ray Train, each worker with its share of every batch.

Ray Train starts the workers, connects them by torch.distributed, and restarts all of them from the
last checkpoint when one is lost. The run's name contains the run digest, so a restarted job resumes
its own checkpoints and never those of other settings.
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

from actors.filesystem import pyarrow_filesystem
from actors.resources import ResourceConfig, StorageCredentials
from loraseg.errors import LorasegError, StageError
from loraseg.train.closed_set.job import SegmenterTrainingTask, TaskRunner
from loraseg.train.closed_set.loop import TrainingContext, TrainingResult, train_segmenter

__all__ = ["WorkerGroupConfig", "ray_train_runner"]

_STATE_FILE = "state.safetensors"
# A node that the autoscaler adds takes minutes to start.
_START_TIMEOUT_S = 1800
# Ray logs these variables. Unlike the other store settings of a worker they are not secret.
_CHECKSUMS = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")

TrainFunction = Callable[..., TrainingResult]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerGroupConfig:
    """Number and resources of the workers that train together.

    Attributes:
        count: Number of workers; each takes an equal part of the batch.
        resources: Resources of each; ``retries`` is how often the group may lose a worker.
        loaders: Data loader processes of each worker.
    """

    count: int = 1
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    loaders: int = 0


def ray_train_runner(
    workers: WorkerGroupConfig, train: TrainFunction = train_segmenter
) -> TaskRunner:
    """Return a runner that trains one task on the connected Ray cluster.

    Args:
        workers: Number and resources of the workers.
        train: Called in each worker.
    """

    def run(task: SegmenterTrainingTask) -> None:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
        trainer = TorchTrainer(
            partial(
                _train_worker, task, train, workers.loaders, StorageCredentials.from_environment()
            ),
            scaling_config=_scaling_config(workers),
            run_config=_run_config(task, workers),
            torch_config=TorchConfig(backend="nccl" if workers.resources.gpus else "gloo"),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _root_cause(error) from error
        path, system = pyarrow_filesystem(task.output)
        system.delete_dir(f"{path}/{task.checkpoint_prefix}")

    return run


def _scaling_config(workers: WorkerGroupConfig) -> ScalingConfig:
    needs = {"CPU": workers.resources.cpus, **workers.resources.custom_resources}
    if workers.resources.gpus:
        needs["GPU"] = workers.resources.gpus
    return ScalingConfig(
        num_workers=workers.count,
        use_gpu=workers.resources.gpus > 0,
        resources_per_worker=needs,
    )


def _run_config(task: SegmenterTrainingTask, workers: WorkerGroupConfig) -> RunConfig:
    path, system = pyarrow_filesystem(task.output)
    folder, _, name = task.checkpoint_prefix.rpartition("/")
    checksums = {key: os.environ[key] for key in _CHECKSUMS if key in os.environ}
    return RunConfig(
        name=name,
        storage_path=f"{path}/{folder}",
        storage_filesystem=system,
        failure_config=FailureConfig(max_failures=workers.resources.retries),
        checkpoint_config=CheckpointConfig(num_to_keep=1),
        worker_runtime_env={"env_vars": checksums},
    )


def _train_worker(
    task: SegmenterTrainingTask, train: TrainFunction, loaders: int, access: StorageCredentials
) -> None:
    """Train on one worker; rank 0 writes the result."""
    access.export()
    ray_context = ray.train.get_context()
    context = TrainingContext(
        rank=ray_context.get_world_rank(),
        world_size=ray_context.get_world_size(),
        device=str(ray.train.torch.get_device()),
        num_workers=loaders,
        load_checkpoint=_load_checkpoint,
        save_checkpoint=_save_checkpoint,
    )
    data = task.open_data()
    trained = train(task.recipe, data, task.seed, context)
    if context.rank == 0:
        task.write_result(trained, data.label_space.names)


def _load_checkpoint() -> bytes | None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return Path(folder, _STATE_FILE).read_bytes()


def _save_checkpoint(step: int, scores: Mapping[str, float], data: bytes | None) -> None:
    metrics = {"step": step, **scores}
    name = f"step-{step:09d}"
    if data is None:
        ray.train.report(metrics, checkpoint_dir_name=name)
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, _STATE_FILE).write_bytes(data)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)


def _root_cause(error: ray.train.TrainingFailedError) -> LorasegError:
    """Return the error of a worker without Ray's wrappers."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, LorasegError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    return StageError(f"the workers were lost too often: {str(error)[:500]}")
