"""Synthesis on Ray: the same pairs as in one process, with and without killed workers."""

import pytest
import yaml

import jobs.synthesize as job
from actors.executor import ActorPoolConfig, RayExecutor
from loraseg import config as configuration
from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.synthesize.run import synthesize
from loraseg.data.shards.reader import ShardDataset
from loraseg.errors import DatasetError, StageError
from tests.executors import StageReplacer
from tests.integration.synthesis.fault_injection import KillDuringStage
from tests.tiny_synthesis import all_rows, digest, settings, write_inputs

pytestmark = [
    pytest.mark.ray,
    # Ray Data warns of its own defaults when it makes its context.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\..*"),
]
GENERATORS = ActorPoolConfig(min_parallel=2, max_parallel=2, cpus=0.5)
VOTERS = ActorPoolConfig(cpus=0.5)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), masks=7)


@pytest.fixture(scope="module")
def expected(inputs):
    """Digest of the rows of a local run without faults."""
    synthesize(settings(inputs, inputs / "expected"), LocalExecutor())
    return digest(inputs / "expected")


def run_job(tmp_path, config, *overrides):
    file = tmp_path / "config.yaml"
    job_config = job.Config(synthesis=config, generators=GENERATORS, voters=VOTERS)
    file.write_text(yaml.safe_dump(configuration.to_dict(job_config)))
    with pytest.raises(SystemExit) as leaving:
        configuration.main(job.main, job.Config, ["--config", str(file), *overrides])
    return leaving.value.code


@pytest.mark.parametrize(
    "store_uri", ["file", pytest.param("durable", marks=pytest.mark.durable)], indirect=True
)
def test_ray_generates_the_same_pairs_as_one_process(
    inputs, expected, store_uri, tmp_path, ray_cluster, capsys
):
    config = settings(inputs, f"{store_uri}/out")
    assert run_job(tmp_path, config) == 0
    assert "7 masks, 21 ok; 21 new rows" in capsys.readouterr().out
    assert digest(config.output) == expected

    assert run_job(tmp_path, config) == 0
    assert "21 ok; 0 new rows" in capsys.readouterr().out

    assert run_job(tmp_path, config, "sampling.images=4") == 2
    assert "give append=true" in capsys.readouterr().err
    assert run_job(tmp_path, config, "sampling.images=4", "append=true") == 0
    assert "28 ok; 7 new rows" in capsys.readouterr().out
    assert len({row.pair_id for row in all_rows(config.output)}) == 28


def test_killed_workers_do_not_change_the_pairs(inputs, expected, tmp_path, ray_cluster):
    faults = {}
    for stage in ("generate", "filter"):
        (tmp_path / stage).mkdir()
        faults[stage] = KillDuringStage(
            stage, "worker", calls=2, delay_s=0.01, folder=tmp_path / stage, times=2
        )
    config = settings(inputs, tmp_path / "out")
    synthesize(config, StageReplacer(RayExecutor(GENERATORS, VOTERS), **faults))
    assert all(fault.log_lines() for fault in faults.values())
    assert digest(config.output) == expected


@pytest.mark.durable
def test_the_run_fails_when_a_unit_has_lost_too_many_workers(
    inputs, expected, tmp_path, ray_cluster
):
    fault = KillDuringStage("generate", "worker", calls=1, delay_s=0.0, folder=tmp_path, times=1000)
    executor = RayExecutor(ActorPoolConfig(max_parallel=1, retries=1), VOTERS)
    config = settings(inputs, tmp_path / "out")
    with pytest.raises(StageError, match=r"generate: .* have lost 2 workers"):
        synthesize(config, StageReplacer(executor, generate=fault))
    with pytest.raises(DatasetError, match="no synthetic data is committed"):
        ShardDataset.open(config.output)
    synthesize(config, RayExecutor(GENERATORS, VOTERS))
    assert digest(config.output) == expected
