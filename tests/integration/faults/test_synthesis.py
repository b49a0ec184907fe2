"""Generators, voters, drivers, nodes and the store's server die while pairs are made."""

import contextlib
import pickle
import signal
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import yaml

import jobs.synthesize as job
from actors.actor_pools import ActorPoolConfig
from actors.synthesize import RaySynthesisExecutor
from loraseg import config as configuration
from loraseg.batch.synthesize.run import LocalSynthesisExecutor, synthesize
from loraseg.data.shards.reader import ShardDataset
from loraseg.errors import DatasetError, LorasegError, StoreError
from loraseg.seeding import numpy_generator
from loraseg.storage import open_store
from loraseg.train.segmenter_adapters.samples import fixed_threads
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
PARTS = MASKS // 2
RUNS = range(2 if FULL else 1)
POOLS = {
    "generators": ActorPoolConfig(max_parallel=2, cpus=0.5, retries=10),
    "voters": ActorPoolConfig(cpus=0.5, retries=10),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("shop"), masks=MASKS)


@pytest.fixture(scope="module")
def expected(shop):
    with fixed_threads(1):
        synthesize(settings(shop, shop / "undisturbed"), LocalSynthesisExecutor())
    return digest(shop / "undisturbed")


@pytest.fixture
def config(shop, durable_env):
    return settings(shop, f"{durable_env.uri}/pairs")


def check(config, expected):
    """All pairs are there, as without accidents; readers see what the manifest names alone."""
    assert digest(config.output) == expected
    dataset = ShardDataset.open(config.output)
    assert len(dataset) == 3 * MASKS
    calm = synthesize(config, RaySynthesisExecutor(**POOLS))
    assert calm.new_rows == 0


def plan(victim, run, stage, folder, *, times=1):
    random = numpy_generator(SEED, "strikes", "synthesis", victim, run, stage)
    return KillDuringStage(
        stage,
        victim,
        calls=int(random.integers(1, PARTS // 2)),
        delay_s=float(random.uniform(0, 0.6)),
        folder=folder,
        times=times,
    )


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("stage", ["draw", "vote"])
def test_workers(ray_cluster, config, expected, chronicle, tmp_path, stage, run):
    accident = plan("worker", run, stage, tmp_path, times=2)
    synthesize(config, RaySynthesisExecutor(**POOLS, **{stage: accident}))
    chronicle.extend(accident.log_lines())
    check(config, expected)


@pytest.mark.parametrize("run", RUNS)
def test_drivers(ray_cluster, durable_env, config, expected, chronicle, tmp_path, run):
    accident = plan("driver", run, "vote", tmp_path)
    (tmp_path / "accident").write_bytes(pickle.dumps(accident))
    own = {item.name: getattr(config, item.name) for item in fields(config)}
    values = configuration.to_dict(job.Config(**own, **POOLS))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    environment = {**ray_cluster.environment, **durable_env.environment}
    command = [sys.executable, "-m", "tests.integration.synthesis.driver"]
    command += [tmp_path / "config.yaml", tmp_path / "accident"]
    deaths = 0
    while (status := subprocess.run(command, env=environment, check=False).returncode) != 0:
        assert status == -signal.SIGKILL
        deaths += 1
        assert deaths <= 1
        with contextlib.suppress(DatasetError):
            # Killed just after its commit, or before anything is to be seen.
            assert digest(config.output) == expected
    chronicle.extend([*accident.log_lines(), f"the driver died {deaths} times"])
    check(config, expected)


@pytest.mark.parametrize("run", RUNS)
def test_nodes(ray_cluster, config, expected, chronicle, tmp_path, run):
    accident = plan("node", run, "draw", tmp_path)
    pools = {**POOLS, "generators": replace(POOLS["generators"], node="spot")}
    with SpotNodes(ray_cluster, 2, resource="spot") as nodes:
        synthesize(config, RaySynthesisExecutor(**pools, make_generate_stage=accident))
        chronicle.extend([*accident.log_lines(), f"{nodes.replaced} nodes were replaced"])
    check(config, expected)


@pytest.mark.parametrize("run", RUNS)
def test_the_server(ray_cluster, config, expected, restart, chronicle, run):
    output = open_store(config.output)
    share = float(numpy_generator(SEED, "strikes", "synthesis", "server", run).uniform(0.1, 0.8))

    def progress():
        with contextlib.suppress(LorasegError):
            return sum(1 for _ in output.list("parts/")) / PARTS
        return 0.0

    with ScheduledFaults(progress, {share: restart}) as disasters:
        try:
            synthesize(config, RaySynthesisExecutor(**POOLS))
        except StoreError as error:
            # Ceph may hold requests longer than the patience of a run; what is made is kept.
            chronicle.append(f"the first run ended: {error}")
            synthesize(config, RaySynthesisExecutor(**POOLS))
    chronicle.append(f"the server was killed at {share:.2f} of the parts: {bool(disasters.done)}")
    check(config, expected)


def test_a_store_that_spoils_requests(ray_cluster, durable_env, config, expected, chronicle):
    with (
        FlakyProxy(durable_env.endpoint.url, share=FAULT_SHARE, seed=SEED).running() as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        synthesize(config, RaySynthesisExecutor(**POOLS))
        counts = dict(sorted(proxy.counts.items()))
    chronicle.append(f"the proxy: {counts}")
    assert sum(counts.values()) > counts.get("passed", 0)
    check(config, expected)
