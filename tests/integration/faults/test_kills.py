"""Workers, drivers and nodes die by SIGKILL while adapters train; nothing is lost or doubled."""

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
def ambush(request, chronicle, tmp_path):
    """Return a function: (victim, run) -> Ambush. What happened is told in the chronicle."""
    laid = []

    def lay(victim, run):
        strikes = plan_kills(victim, ADAPTERS, STEPS, KILLS, SEED, run)
        chronicle.extend(f"planned: {strike}" for strike in strikes)
        folder = tmp_path / "ambush"
        folder.mkdir()
        laid.append(KillSchedule(strikes, folder))
        return laid[0]

    yield lay
    for ambush in laid:
        chronicle.extend(ambush.log_lines())


@pytest.fixture
def training(workshop, durable_env, tmp_path):
    """A manifest whose stores are on the durable server, and its config."""
    return workshop.manifest(tmp_path / "manifest.yaml", durable_env.uri)


@pytest.mark.parametrize("run", RUNS)
def test_workers(ray_cluster, training, undisturbed, ambush, chronicle, run):
    _, config = training
    trap = ambush("worker", run)
    outcomes = list(train_adapters(config.tasks(), config.resources, runner=trap))
    assert trap.kill_count()
    assert [outcome.error for outcome in outcomes] == [None] * len(ADAPTERS)
    chronicle.append(f"resumed from steps {[o.result.resumed_from_step for o in outcomes]}")
    check_library(config.library, undisturbed)


@pytest.mark.parametrize("run", RUNS)
def test_drivers(ray_cluster, durable_env, training, undisturbed, ambush, chronicle, tmp_path, run):
    manifest, config = training
    trap = ambush("driver", run)
    trap_file = tmp_path / "ambush.pickle"
    trap_file.write_bytes(pickle.dumps(trap))
    environment = {**ray_cluster.environment, **durable_env.environment}
    command = [sys.executable, "-m", "tests.integration.faults.driver", manifest, trap_file]
    deaths = 0
    while (status := subprocess.run(command, env=environment, check=False).returncode) != 0:
        assert status == -signal.SIGKILL
        deaths += 1
        assert deaths <= KILLS
    assert deaths
    chronicle.append(f"the driver was started {deaths + 1} times")
    check_library(config.library, undisturbed)
    job = [sys.executable, "-m", "jobs.train_adapters", "--config", manifest]
    done = subprocess.run(job, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.count("skipped") >= len(ADAPTERS)
    check_library(config.library, undisturbed)


@pytest.mark.parametrize("run", RUNS)
def test_nodes(ray_cluster, training, undisturbed, ambush, chronicle, run):
    """All training is on two nodes beside the driver's; each one lost is replaced."""
    _, config = training
    trap = ambush("node", run)
    with SpotNodes(ray_cluster, 2, resource="spot") as nodes:
        placement = ResourceConfig(node="spot", retries=10)
        outcomes = list(train_adapters(config.tasks(), placement, runner=trap))
        chronicle.append(f"{nodes.replaced} nodes were replaced while the training ran")
    assert trap.kill_count()
    assert [outcome.error for outcome in outcomes] == [None] * len(ADAPTERS)
    chronicle.append(f"resumed from steps {[o.result.resumed_from_step for o in outcomes]}")
    check_library(config.library, undisturbed)


# Two workers that are killed are in the short form already.
@pytest.mark.parametrize(
    ("workers", "strikes"), [(1, 0), (2, 0), *([(1, 3), (2, 3)] if FULL else [])]
)
def test_the_number_of_workers_changes_no_byte(
    ray_cluster, training, undisturbed, ambush, chronicle, workers, strikes
):
    _, config = training
    trap = ambush("worker", f"{workers} at once") if strikes else KillSchedule((), None)
    placement = ResourceConfig(max_parallel=workers, retries=10)
    outcomes = list(train_adapters(config.tasks(), placement, runner=trap))
    assert [outcome.error for outcome in outcomes] == [None] * len(ADAPTERS)
    check_library(config.library, undisturbed)
