"""Training while workers, drivers and nodes are killed: each adapter is published once."""

import pickle
import signal
import subprocess
import sys

import pytest

from actors.resources import ResourceConfig
from actors.train_adapters import train_adapters
from tests.integration.faults.kill_schedule import KillSchedule, plan_kills
from tests.integration.faults.suite_size import FULL, KILLS, RUNS, SEED
from tests.integration.faults.training_inputs import ADAPTERS, STEPS, check_library
from tests.integration.ray_cluster import SpotNodes

pytestmark = [pytest.mark.ray, pytest.mark.durable, pytest.mark.faults]


@pytest.fixture
def plan_schedule(request, fault_log, tmp_path):
    """Return a function (target, run) -> KillSchedule; its kills are logged."""
    schedules = []

    def plan(target, run):
        kills = plan_kills(target, ADAPTERS, STEPS, KILLS, SEED, run)
        fault_log.extend(f"planned: {kill}" for kill in kills)
        folder = tmp_path / "kills"
        folder.mkdir()
        schedules.append(KillSchedule(kills, folder))
        return schedules[0]

    yield plan
    for schedule in schedules:
        fault_log.extend(schedule.log_lines())


@pytest.fixture
def training(inputs, durable_env, tmp_path):
    """A manifest whose stores are on the durable server, and its config."""
    return inputs.manifest(tmp_path / "manifest.yaml", durable_env.uri)


@pytest.mark.parametrize("run", RUNS)
def test_killed_workers(ray_cluster, training, expected, plan_schedule, fault_log, run):
    _, config = training
    schedule = plan_schedule("worker", run)
    outcomes = list(train_adapters(config.tasks(), config.resources, runner=schedule))
    assert schedule.kill_count()
    assert [outcome.error for outcome in outcomes] == [None] * len(ADAPTERS)
    fault_log.append(f"resumed from steps {[o.result.resumed_from_step for o in outcomes]}")
    check_library(config.library, expected)


@pytest.mark.parametrize("run", RUNS)
def test_killed_drivers(
    ray_cluster, durable_env, training, expected, plan_schedule, fault_log, tmp_path, run
):
    manifest, config = training
    schedule = plan_schedule("driver", run)
    schedule_file = tmp_path / "schedule.pickle"
    schedule_file.write_bytes(pickle.dumps(schedule))
    environment = {**ray_cluster.environment, **durable_env.environment}
    command = [sys.executable, "-m", "tests.integration.faults.driver", manifest, schedule_file]
    kills = 0
    while (status := subprocess.run(command, env=environment, check=False).returncode) != 0:
        assert status == -signal.SIGKILL
        kills += 1
        assert kills <= KILLS
    assert kills
    fault_log.append(f"the driver was started {kills + 1} times")
    check_library(config.library, expected)
    job = [sys.executable, "-m", "jobs.train_adapters", "--config", manifest]
    completed = subprocess.run(job, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert completed.stdout.count("skipped") >= len(ADAPTERS)
    check_library(config.library, expected)


@pytest.mark.parametrize("run", RUNS)
def test_killed_nodes(ray_cluster, training, expected, plan_schedule, fault_log, run):
    """Train on two nodes other than the driver's; a lost node is replaced."""
    _, config = training
    schedule = plan_schedule("node", run)
    with SpotNodes(ray_cluster, 2, resource="spot") as nodes:
        resources = ResourceConfig(node="spot", retries=10)
        outcomes = list(train_adapters(config.tasks(), resources, runner=schedule))
        fault_log.append(f"{nodes.replaced} nodes were replaced during the training")
    assert schedule.kill_count()
    assert [outcome.error for outcome in outcomes] == [None] * len(ADAPTERS)
    fault_log.append(f"resumed from steps {[o.result.resumed_from_step for o in outcomes]}")
    check_library(config.library, expected)


# The short form has test_killed_workers with two workers.
@pytest.mark.parametrize(
    ("workers", "kills"), [(1, 0), (2, 0), *([(1, 3), (2, 3)] if FULL else [])]
)
def test_adapters_do_not_depend_on_the_number_of_workers(
    ray_cluster, training, expected, plan_schedule, fault_log, workers, kills
):
    _, config = training
    schedule = plan_schedule("worker", f"{workers} at once") if kills else KillSchedule((), None)
    resources = ResourceConfig(max_parallel=workers, retries=10)
    outcomes = list(train_adapters(config.tasks(), resources, runner=schedule))
    assert [outcome.error for outcome in outcomes] == [None] * len(ADAPTERS)
    check_library(config.library, expected)
