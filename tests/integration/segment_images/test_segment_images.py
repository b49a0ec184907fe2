"""Image segmentation on Ray: the same bytes as in one process, with and without kills."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml

import jobs.segment_images as job
from actors.executor import ActorPoolConfig, RayExecutor
from loraseg import config as configuration
from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.segment_images import segment_images
from loraseg.errors import StageError
from loraseg.storage import open_store
from tests.executors import StageReplacer
from tests.integration.segment_images.fault_injection import KillBeforeWrite
from tests.tiny_image_batch import bad_images, good_images, put_all, read_all, write_inputs

pytestmark = [
    pytest.mark.ray,
    # Ray Data warns of its own defaults when it makes its context.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\..*"),
]
POOL = ActorPoolConfig(max_parallel=2)


def on_stores(*kinds):
    """Run a test on these kinds of store."""
    marks = {"durable": pytest.mark.durable}
    stores = [pytest.param(kind, marks=marks.get(kind, ())) for kind in kinds]
    return pytest.mark.parametrize("store_uri", stores, indirect=True)


@pytest.fixture
def config(tmp_path, store_uri):
    images = {**good_images(count=6), **bad_images()}
    put_all(f"{store_uri}/images", images)
    return write_inputs(tmp_path / "models", f"{store_uri}/images", f"{store_uri}/out")


def local_output(config):
    """Return the objects that a local run without faults writes."""
    local = replace(config, output=f"{config.output} local")
    segment_images(local, LocalExecutor())
    return read_all(local.output)


def run_job(tmp_path, config, *overrides):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(configuration.to_dict(config)))
    with pytest.raises(SystemExit) as leaving:
        configuration.main(job.main, job.Config, ["--config", str(file), *overrides])
    return leaving.value.code


@on_stores("file", "durable")
def test_ray_writes_the_same_bytes_as_one_process(config, tmp_path, ray_cluster, capsys):
    assert run_job(tmp_path, config, "resources.max_parallel=2") == 0
    assert "28 images (4 bad_image, 24 ok), 28 of them new" in capsys.readouterr().out
    before = read_all(config.output)
    assert before == local_output(config)

    assert run_job(tmp_path, config, "resources.max_parallel=2") == 0
    assert "28 images (4 bad_image, 24 ok), 0 of them new" in capsys.readouterr().out
    assert read_all(config.output) == before

    assert run_job(tmp_path, config, "k=1") == 2
    assert "k was 2 and is 1" in capsys.readouterr().err
    assert read_all(config.output) == before


@on_stores("durable")
def test_killed_workers_do_not_change_the_output(config, tmp_path, ray_cluster):
    fault = KillBeforeWrite(before_write=6, times=2, folder=tmp_path)
    segment_images(config, StageReplacer(RayExecutor(POOL), segment=fault))
    assert fault.count() == 2
    assert read_all(config.output) == local_output(config)


@on_stores("durable")
def test_the_run_fails_when_a_unit_has_lost_too_many_workers(config, tmp_path, ray_cluster):
    fault = KillBeforeWrite(before_write=1, times=1000, folder=tmp_path)
    executor = StageReplacer(RayExecutor(replace(POOL, retries=1)), segment=fault)
    with pytest.raises(StageError, match=r"segment: images .* to .* have lost 2 workers"):
        segment_images(config, executor)
    assert not open_store(config.output).exists("manifest.json")
    segment_images(config, RayExecutor(POOL))
    assert read_all(config.output) == local_output(config)


@on_stores("durable")
def test_a_run_after_a_killed_driver_completes_the_output(config, tmp_path, ray_cluster):
    file = tmp_path / "driver.yaml"
    file.write_text(yaml.safe_dump(configuration.to_dict(config)))
    command = [sys.executable, "-m", "jobs.segment_images", "--config", str(file)]
    driver = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": ray_cluster.address})
    store = open_store(config.output)
    deadline = time.monotonic() + 120
    while not list(store.list("explanations/")) and time.monotonic() < deadline:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    completed = list(store.list("explanations/"))
    assert completed
    assert not store.exists("manifest.json")

    summary = segment_images(config, RayExecutor(POOL))
    assert summary.new_images < 28
    assert read_all(config.output) == local_output(config)
    assert json.loads(store.get("manifest.json"))["images"] == 28


@on_stores("moto")
def test_hostile_keys_of_a_bucket_get_rows(config, tmp_path, s3_env, ray_cluster):
    image = good_images(["day"], 1)["day/0 é.png"]
    keys = ["../up.png", "a//b.png", "x" * 300 + ".png", "tab\there.png", "d/" * 300 + "a.png"]
    keys += ["a.png", "a.png/b.png", "a.jpg", "folder/", "\U0001f697.png"]
    client = s3_env.endpoint.client()
    for key in keys:
        client.put_object(Bucket=s3_env.bucket, Key=f"hostile/{key}", Body=image)
    hostile = replace(config, images=f"{s3_env.uri}/hostile", output=f"{s3_env.uri}/segmented")
    summary = segment_images(hostile, RayExecutor(POOL))
    assert summary.statuses == {"bad_key": 4, "ok": 5}
    assert segment_images(hostile, RayExecutor(POOL)).new_images == 0
    assert len([key for key in read_all(hostile.output) if key.startswith("masks/")]) == 5
