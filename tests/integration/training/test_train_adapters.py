"""The training job on a real Ray: broken data, killed workers, nodes and drivers."""

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
    """The lines printed by their first word."""
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line for line in lines if line.strip()}


def published(config):
    return {entry.name: entry for entry in Library(open_store(config.library)).entries()}


def test_a_broken_domain_fails_alone_and_a_second_run_skips_the_rest(
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


def test_a_killed_worker_costs_nothing_but_the_steps_since_its_checkpoint(
    ray_cluster, make_manifest, tmp_path
):
    _, config = make_manifest("fog", "night")
    outcomes = train_adapters(
        config.tasks(), ResourceConfig(), runner=KillAtStep(step=15, marker=tmp_path / "struck")
    )
    results = {outcome.name: outcome.result for outcome in outcomes}
    assert (tmp_path / "struck").exists()
    assert sorted(result.resumed_from_step for result in results.values()) == [0, 10]

    _, undisturbed = make_manifest("fog", "night")
    for task in undisturbed.tasks():
        train_adapter(task)
    assert digests(undisturbed) == digests(config)


def digests(config):
    return {name: entry.digest for name, entry in published(config).items()}


def test_a_worker_lost_too_often_fails_alone(ray_cluster, make_manifest, tmp_path):
    _, config = make_manifest("fog", "night")
    accident = KillAtStep(step=1, marker=tmp_path / "struck", only="fog")
    outcomes = train_adapters(config.tasks(), ResourceConfig(retries=0), runner=accident)
    found = {outcome.name: outcome for outcome in outcomes}
    assert found["fog"].result is None
    assert "WorkerCrashedError" in found["fog"].error
    assert found["night"].error is None


def test_a_lost_node_hands_its_adapter_to_another(ray_cluster, make_manifest, tmp_path):
    _, config = make_manifest("fog")
    with SpotNodes(ray_cluster, 2, resource="spot"):
        (outcome,) = train_adapters(
            config.tasks(),
            ResourceConfig(node="spot"),
            runner=KillAtStep(step=15, marker=tmp_path / "struck", node=True),
        )
    assert (tmp_path / "struck").exists()
    assert outcome.error is None
    assert outcome.result.resumed_from_step == 10


def test_a_killed_driver_loses_and_doubles_nothing(ray_cluster, make_manifest):
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


def test_secrets_reach_the_workers_but_no_log_of_ray(ray_cluster, make_manifest, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "unlikely-7f3a9")
    _, config = make_manifest("fog")
    (outcome,) = train_adapters(config.tasks(), ResourceConfig(), runner=fail_with_environment)
    assert outcome.error == "RuntimeError: fog sees 9a3f7-ylekilnu"
    session = ray._private.worker._global_node.get_session_dir_path()
    found = subprocess.run(
        ["grep", "-rl", "unlikely-7f3a9", session], capture_output=True, text=True, check=False
    )
    assert found.stdout == ""


def test_progress_is_told_while_it_runs(ray_cluster, make_manifest):
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


def test_the_plan_is_printed_without_a_cluster(make_manifest, capsys, monkeypatch):
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


def test_stages_that_cannot_run_at_the_same_time_are_refused(ray_cluster):
    first, second = ResourceConfig(cpus=1.5), ResourceConfig(cpus=0.5)
    check_total_capacity([(first, 1), (second, 1)], may_grow=False)
    with pytest.raises(ConfigError, match=r"takes 2\.5 CPU and 0 GPU; .* has 2 and 0"):
        check_total_capacity([(first, 1), (second, 2)], may_grow=False)


@pytest.mark.parametrize(
    "server", ["s3_env", pytest.param("durable_env", marks=pytest.mark.durable)]
)
def test_a_bucket_serves_as_well_as_a_folder(
    ray_cluster, make_manifest, tmp_path, request, server, capsys
):
    bucket = request.getfixturevalue(server)
    manifest, config = make_manifest("fog", "broken", uri=bucket.uri)
    accident = KillAtStep(step=15, marker=tmp_path / "struck")
    outcomes = {
        o.name: o for o in train_adapters(config.tasks(), ResourceConfig(), runner=accident)
    }
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
