"""Segmenters on Ray Train: two workers, one of which is killed."""

import json

import numpy as np
import pytest

import jobs.train_segmenter as job
from actors.resources import ResourceConfig
from actors.train_segmenter import WorkerGroupConfig, ray_train_runner
from loraseg.errors import StageError
from loraseg.segment.closed_set.checkpoint import load_closed_set_segmenter
from loraseg.storage import open_store
from loraseg.train.closed_set.job import SegmenterTrainingConfig, run_locally, train_segmenters
from loraseg.train.closed_set.loop import train_segmenter
from tests.integration.segmenters.fault_injection import KillAfterCheckpoint
from tests.unit.train.closed_set.tiny_datasets import TINY_RECIPE, write_datasets

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\..*"),
]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return write_datasets(tmp_path_factory.mktemp("datasets"))


def _config(datasets, output, **changes):
    values = {"real": str(datasets / "real"), "overrides": TINY_RECIPE, "output": output}
    return SegmenterTrainingConfig(**{**values, **changes})


def test_two_workers_survive_the_loss_of_one(ray_cluster, datasets, tmp_path, s3_env):
    """One of two workers is killed after a checkpoint; the training resumes from it."""
    del ray_cluster
    workers = WorkerGroupConfig(count=2, resources=ResourceConfig(retries=2))
    uri = f"{s3_env.uri}/killed run"
    fault = KillAfterCheckpoint(rank=1, step=2, folder=tmp_path)
    config = _config(datasets, uri, synthetic=(str(datasets / "synthetic"),))
    arm, local = (_segmenter_arm(config, run) for run in (ray_train_runner(workers, fault), None))
    assert (tmp_path / "killed").exists()
    assert (tmp_path / "world-2-cpu").exists()
    # pyarrow leaves an empty object for the folder.
    assert list(open_store(uri).list("checkpoints/")) == ["checkpoints/"]
    assert [step for step, _ in arm["scores"]] == [2, 4, 6]
    # One process has the same batches, but adds in another order.
    assert [step for step, _ in arm["losses"]] == [step for step, _ in local["losses"]]
    losses = [[loss for _, loss in one["losses"]] for one in (arm, local)]
    np.testing.assert_allclose(*losses, rtol=0.02)


def _segmenter_arm(config, run):
    """Train the first arm only, with ``run`` or in this process; return its scores."""
    started = []

    def run_first(task):
        if started:
            raise StageError("the control is left out")
        started.append(task.name)
        (run or run_locally)(task)

    with pytest.raises(StageError, match="left out"):
        train_segmenters(config, run_first)
    store = open_store(config.output)
    arm = json.loads(store.get("arms/segmenter.json"))
    assert (
        load_closed_set_segmenter(f"{config.output}/segmenter.safetensors").digest == arm["sha256"]
    )
    store.delete("arms/segmenter.json")
    return arm


def test_job_trains_once(ray_cluster, datasets, tmp_path, capsys):
    del ray_cluster
    config = job.Config(training=_config(datasets, str(tmp_path)))
    job.main(config)
    assert "segmenter: mIoU" in capsys.readouterr().out
    first = (tmp_path / "results.json").read_bytes()
    written = (tmp_path / "segmenter.safetensors").stat().st_mtime_ns
    job.main(config)
    assert (tmp_path / "results.json").read_bytes() == first
    assert (tmp_path / "segmenter.safetensors").stat().st_mtime_ns == written
    assert list(json.loads(first)["arms"]) == ["segmenter"]


def test_an_error_of_a_worker_is_raised_unchanged(ray_cluster, datasets, tmp_path):
    del ray_cluster
    overrides = {**TINY_RECIPE, "learning_rate": 1e30, "clip_norm": None, "warmup_steps": 0}
    workers = WorkerGroupConfig(resources=ResourceConfig(retries=0))
    with pytest.raises(StageError, match="the loss is"):
        train_segmenters(
            _config(datasets, str(tmp_path), overrides=overrides),
            ray_train_runner(workers, train_segmenter),
        )
