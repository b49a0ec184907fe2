"""Synthesis while workers, drivers, nodes and the store's server are killed."""

import contextlib
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

import jobs.synthesize as job
from actors.executor import ActorPoolConfig, RayExecutor
from loraseg import config as configuration
from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.synthesize.run import synthesize
from loraseg.data.shards.reader import ShardDataset
from loraseg.errors import DatasetError, LorasegError, StoreError
from loraseg.seeding import numpy_generator
from loraseg.storage import open_store
from tests.executors import StageReplacer
from tests.integration.faults.flaky_proxy import FlakyProxy
from tests.integration.faults.suite_size import FAULT_SHARE, FULL, SEED
from tests.integration.faults.test_store_faults import ScheduledFaults, restart
from tests.integration.ray_cluster import SpotNodes
from tests.integration.synthesis.fault_injection import KillDuringStage
from tests.tiny_synthesis import digest, settings, write_inputs

__all__ = ["restart"]

pytestmark = [
    pytest.mark.ray,
    pytest.mark.durable,
    pytest.mark.faults,
    pytest.mark.timeout(1500),
    # Ray Data warns of its own defaults when it makes its context.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\..*"),
]
MASKS = 16
UNITS = MASKS // 2
RUNS = range(2 if FULL else 1)
GENERATORS = ActorPoolConfig(max_parallel=2, cpus=0.5, retries=10)
VOTERS = ActorPoolConfig(cpus=0.5, retries=10)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), masks=MASKS)


@pytest.fixture(scope="module")
def expected(inputs):
    """Digest of the rows of a local run without faults."""
    synthesize(settings(inputs, inputs / "expected"), LocalExecutor())
    return digest(inputs / "expected")


@pytest.fixture
def config(inputs, durable_env):
    return settings(inputs, f"{durable_env.uri}/pairs")


def check(config, expected):
    """Check that the committed pairs are those of a run without faults."""
    assert digest(config.output) == expected
    dataset = ShardDataset.open(config.output)
    assert len(dataset) == 3 * MASKS
    assert synthesize(config, RayExecutor(GENERATORS, VOTERS)).new_rows == 0


def plan_kill(target, run, stage, folder, *, times=1):
    random = numpy_generator(SEED, "strikes", "synthesis", target, run, stage)
    return KillDuringStage(
        stage,
        target,
        calls=int(random.integers(1, UNITS // 2)),
        delay_s=float(random.uniform(0, 0.6)),
        folder=folder,
        times=times,
    )


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("stage", ["generate", "filter"])
def test_killed_workers(ray_cluster, config, expected, fault_log, tmp_path, stage, run):
    fault = plan_kill("worker", run, stage, tmp_path, times=2)
    synthesize(config, StageReplacer(RayExecutor(GENERATORS, VOTERS), **{stage: fault}))
    fault_log.extend(fault.log_lines())
    check(config, expected)


@pytest.mark.parametrize("run", RUNS)
def test_killed_drivers(ray_cluster, durable_env, config, expected, fault_log, tmp_path, run):
    fault = plan_kill("driver", run, "filter", tmp_path)
    (tmp_path / "fault").write_bytes(pickle.dumps(fault))
    values = configuration.to_dict(
        job.Config(synthesis=config, generators=GENERATORS, voters=VOTERS)
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    environment = {**ray_cluster.environment, **durable_env.environment}
    command = [sys.executable, "-m", "tests.integration.synthesis.driver"]
    command += [tmp_path / "config.yaml", tmp_path / "fault"]
    kills = 0
    while (status := subprocess.run(command, env=environment, check=False).returncode) != 0:
        assert status == -signal.SIGKILL
        kills += 1
        assert kills <= 1
        with contextlib.suppress(DatasetError):
            # Killed just after its commit, or before it: then readers see no dataset.
            assert digest(config.output) == expected
    fault_log.extend([*fault.log_lines(), f"the driver was killed {kills} times"])
    check(config, expected)


@pytest.mark.parametrize("run", RUNS)
def test_killed_nodes(ray_cluster, config, expected, fault_log, tmp_path, run):
    fault = plan_kill("node", run, "generate", tmp_path)
    executor = RayExecutor(replace(GENERATORS, node="spot"), VOTERS)
    with SpotNodes(ray_cluster, 2, resource="spot") as nodes:
        synthesize(config, StageReplacer(executor, generate=fault))
        fault_log.extend([*fault.log_lines(), f"{nodes.replaced} nodes were replaced"])
    check(config, expected)


@pytest.mark.parametrize("run", RUNS)
def test_a_killed_server(ray_cluster, config, expected, restart, fault_log, run):
    output = open_store(config.output)
    share = float(numpy_generator(SEED, "strikes", "synthesis", "server", run).uniform(0.1, 0.8))

    def progress():
        with contextlib.suppress(LorasegError):
            return sum(1 for _ in output.list("parts/")) / UNITS
        return 0.0

    with ScheduledFaults(progress, {share: restart}) as faults:
        try:
            synthesize(config, RayExecutor(GENERATORS, VOTERS))
        except StoreError as error:
            # Ceph may delay requests beyond the retry timeout; written shards are kept.
            fault_log.append(f"the first run ended: {error}")
            synthesize(config, RayExecutor(GENERATORS, VOTERS))
    fault_log.append(f"the server was killed at {share:.2f} of the units: {bool(faults.done)}")
    check(config, expected)


def test_a_proxy_that_disturbs_requests(ray_cluster, durable_env, config, expected, fault_log):
    with (
        FlakyProxy(durable_env.endpoint.url, share=FAULT_SHARE, seed=SEED).running() as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        synthesize(config, RayExecutor(GENERATORS, VOTERS))
        counts = dict(sorted(proxy.counts.items()))
    fault_log.append(f"the proxy: {counts}")
    assert sum(counts.values()) > counts.get("passed", 0)
    check(config, expected)
