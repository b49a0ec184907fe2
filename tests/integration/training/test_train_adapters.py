"""The training job on Ray: broken data; killed workers, nodes and drivers."""

import os
import signal
import subprocess
import sys
import time

import pytest
import ray

import jobs.train_adapters as job
from actors.resources import ResourceConfig, check_capacity, check_total_capacity
from actors.train_adapters import train_adapters
from loraseg import config as configuration
from loraseg.errors import ConfigError
from loraseg.library import Library
from loraseg.storage import open_store
from loraseg.train.tasks import train_adapter
from tests.integration.ray_cluster import SpotNodes
from tests.integration.training.fault_injection import KillAtStep, fail_with_environment

pytestmark = pytest.mark.ray


def run_job(manifest, *overrides):
    with pytest.raises(SystemExit) as leaving:
        configuration.main(job.main, job.Config, ["--config", str(manifest), *overrides])
    return leaving.value.code


def table(capsys):
    """The printed lines by their first word."""
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line for line in lines if line.strip()}


def published(config):
    return {entry.name: entry for entry in Library(open_store(config.library)).entries()}


def test_a_broken_domain_fails_alone_and_a_second_run_skips_published_ones(
    ray_cluster, make_manifest, capsys
):
    manifest, config = make_manifest("fog", "night", "broken")
    assert run_job(manifest) == 1
    rows = table(capsys)
    assert rows["fog"].split()[1] == rows["night"].split()[1] == "published"
    assert rows["broken"].split()[1] == "failed"
    assert "DatasetError" in rows["broken"]
    assert "0.png" in rows["broken"]
    first = published(config)
    assert set(first) == {"fog", "night"}

    assert run_job(manifest) == 1
    rows = table(capsys)
    assert rows["fog"].split()[1] == rows["night"].split()[1] == "skipped"
    assert published(config) == first


def test_a_killed_worker_loses_only_the_steps_since_its_checkpoint(
    ray_cluster, make_manifest, tmp_path
):
    _, config = make_manifest("fog", "night")
    outcomes = train_adapters(
        config.tasks(), ResourceConfig(), runner=KillAtStep(step=15, marker=tmp_path / "killed")
    )
    results = {outcome.name: outcome.result for outcome in outcomes}
    assert (tmp_path / "killed").exists()
    assert sorted(result.resumed_from_step for result in results.values()) == [0, 10]

    _, undisturbed = make_manifest("fog", "night")
    for task in undisturbed.tasks():
        train_adapter(task)
    assert digests(undisturbed) == digests(config)


def digests(config):
    return {name: entry.digest for name, entry in published(config).items()}


def test_a_worker_lost_too_often_fails_alone(ray_cluster, make_manifest, tmp_path):
    _, config = make_manifest("fog", "night")
    runner = KillAtStep(step=1, marker=tmp_path / "killed", only="fog")
    outcomes = train_adapters(config.tasks(), ResourceConfig(retries=0), runner=runner)
    found = {outcome.name: outcome for outcome in outcomes}
    assert found["fog"].result is None
    assert "WorkerCrashedError" in found["fog"].error
    assert found["night"].error is None


def test_an_adapter_of_a_lost_node_trains_on_another(ray_cluster, make_manifest, tmp_path):
    _, config = make_manifest("fog")
    with SpotNodes(ray_cluster, 2, resource="spot"):
        (outcome,) = train_adapters(
            config.tasks(),
            ResourceConfig(node="spot"),
            runner=KillAtStep(step=15, marker=tmp_path / "killed", node=True),
        )
    assert (tmp_path / "killed").exists()
    assert outcome.error is None
    assert outcome.result.resumed_from_step == 10


def test_a_restarted_driver_publishes_each_adapter_once(ray_cluster, make_manifest):
    manifest, config = make_manifest("fog", "night")
    command = [sys.executable, "-m", "jobs.train_adapters", "--config", str(manifest)]
    driver = subprocess.Popen(command, env=ray_cluster.environment)
    store = open_store(config.checkpoints)
    deadline = time.monotonic() + 60
    while not list(store.list()) and time.monotonic() < deadline:
        time.sleep(0.1)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL

    assert run_job(manifest) == 0
    library = Library(open_store(config.library))
    assert [len(library.versions(name)) for name in ("fog", "night")] == [1, 1]
    report = library.verify()
    assert not report.missing
    assert not report.corrupt


def test_secrets_reach_the_workers_but_not_rays_logs(ray_cluster, make_manifest, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "unlikely-7f3a9")
    _, config = make_manifest("fog")
    (outcome,) = train_adapters(config.tasks(), ResourceConfig(), runner=fail_with_environment)
    assert outcome.error == "RuntimeError: fog sees 9a3f7-ylekilnu"
    session = ray._private.worker._global_node.get_session_dir_path()
    found = subprocess.run(
        ["grep", "-rl", "unlikely-7f3a9", session], capture_output=True, text=True, check=False
    )
    assert found.stdout == ""


def test_progress_is_reported_during_training(ray_cluster, make_manifest):
    _, config = make_manifest("fog")
    seen = []
    (outcome,) = train_adapters(
        config.tasks(),
        ResourceConfig(),
        on_progress=lambda now: seen.append(now),
        poll_interval_s=0.1,
    )
    assert outcome.error is None
    reports = [standings["fog"].progress for standings in seen if "fog" in standings]
    steps = [report.step for report in reports if report.phase == "train"]
    assert steps == sorted(steps)
    assert any(0 < step < 30 for step in steps)


def test_a_dry_run_needs_no_cluster(make_manifest, capsys, monkeypatch):
    def refuse():
        raise AssertionError("the plan needs no Ray")

    monkeypatch.setattr(job, "connect", refuse)
    manifest, _ = make_manifest("fog", "absent")
    assert run_job(manifest, "--dry-run") == 1
    rows = table(capsys)
    assert rows["fog"].split()[1] == "4"
    assert rows["fog"].endswith("1 CPU      to be trained")
    assert "broken: " in rows["absent"]


def test_an_adapter_too_large_for_every_node_is_refused(ray_cluster):
    with pytest.raises(ConfigError, match="no node has 64 CPU for one unit of work"):
        check_capacity(ResourceConfig(cpus=64), may_grow=False)


def test_stages_that_do_not_fit_together_are_refused(ray_cluster):
    first, second = ResourceConfig(cpus=1.5), ResourceConfig(cpus=0.5)
    check_total_capacity([(first, 1), (second, 1)], may_grow=False)
    with pytest.raises(ConfigError, match=r"takes 2\.5 CPU and 0 GPU; .* has 2 and 0"):
        check_total_capacity([(first, 1), (second, 2)], may_grow=False)


@pytest.mark.parametrize(
    "server", ["s3_env", pytest.param("durable_env", marks=pytest.mark.durable)]
)
def test_a_bucket_gives_the_same_adapters_as_a_folder(
    ray_cluster, make_manifest, tmp_path, request, server, capsys
):
    bucket = request.getfixturevalue(server)
    manifest, config = make_manifest("fog", "broken", uri=bucket.uri)
    runner = KillAtStep(step=15, marker=tmp_path / "killed")
    outcomes = {o.name: o for o in train_adapters(config.tasks(), ResourceConfig(), runner=runner)}
    assert outcomes["fog"].result.resumed_from_step == 10
    assert outcomes["broken"].error.startswith("DatasetError")
    assert not list(open_store(config.checkpoints).list())

    _, in_a_folder = make_manifest("fog")
    train_adapter(in_a_folder.tasks()[0])
    assert digests(config) == digests(in_a_folder)

    capsys.readouterr()
    assert run_job(manifest) == 1
    rows = table(capsys)
    assert rows["fog"].split()[1] == "skipped"


@pytest.mark.slow
def test_a_job_without_a_cluster_starts_its_own(make_manifest):
    manifest, config = make_manifest("fog")
    names = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-m", "jobs.train_adapters", "--config", str(manifest)]
    subprocess.run(command, env=environment, check=True)
    assert set(published(config)) == {"fog"}
