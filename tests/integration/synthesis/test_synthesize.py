"""The data factory on a real Ray: same pairs as in one process, whatever is killed."""

import dataclasses

import pytest
import yaml

import jobs.synthesize as job
from actors.actor_pools import ActorPoolConfig
from actors.synthesize import RaySynthesisExecutor
from loraseg import config as configuration
from loraseg.batch.synthesize.run import LocalSynthesisExecutor, synthesize
from loraseg.data.shards.reader import ShardDataset
from loraseg.errors import DatasetError, StageError
from loraseg.train.segmenter_adapters.samples import fixed_threads
from tests.integration.synthesis.fault_injection import KillDuringStage
from tests.tiny_synthesis import all_rows, digest, settings, write_inputs

pytestmark = [
    pytest.mark.ray,
    # Ray Data warns of its own defaults when it makes its context.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.data\..*"),
]
POOLS = {
    "generators": ActorPoolConfig(min_parallel=2, max_parallel=2, cpus=0.5),
    "voters": ActorPoolConfig(cpus=0.5),
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("shop"), masks=7)


@pytest.fixture(scope="module")
def undisturbed(shop):
    with fixed_threads(1):
        synthesize(settings(shop, shop / "undisturbed"), LocalSynthesisExecutor())
    return digest(shop / "undisturbed")


def run_job(tmp_path, config, *overrides):
    file = tmp_path / "config.yaml"
    own = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    values = configuration.to_dict(job.Config(**own, **POOLS))
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit) as leaving:
        configuration.main(job.main, job.Config, ["--config", str(file), *overrides])
    return leaving.value.code


@pytest.mark.parametrize(
    "store_uri", ["file", pytest.param("durable", marks=pytest.mark.durable)], indirect=True
)
def test_a_cluster_makes_what_one_process_would(
    shop, undisturbed, store_uri, tmp_path, ray_cluster, capsys
):
    config = settings(shop, f"{store_uri}/out")
    assert run_job(tmp_path, config) == 0
    assert "7 masks, 21 ok; 21 new rows" in capsys.readouterr().out
    assert digest(config.output) == undisturbed

    assert run_job(tmp_path, config) == 0
    assert "21 ok; 0 new rows" in capsys.readouterr().out

    assert run_job(tmp_path, config, "sampling.images=4") == 2
    assert "give append=true" in capsys.readouterr().err
    assert run_job(tmp_path, config, "sampling.images=4", "append=true") == 0
    assert "28 ok; 7 new rows" in capsys.readouterr().out
    assert len({row.pair_id for row in all_rows(config.output)}) == 28


def test_killed_workers_cost_only_time(shop, undisturbed, tmp_path, ray_cluster):
    accidents = {}
    for stage in ("draw", "vote"):
        (tmp_path / stage).mkdir()
        accidents[stage] = KillDuringStage(
            stage, "worker", calls=2, delay_s=0.01, folder=tmp_path / stage, times=2
        )
    config = settings(shop, tmp_path / "out")
    synthesize(config, RaySynthesisExecutor(**POOLS, **accidents))
    assert all(accident.log_lines() for accident in accidents.values())
    assert digest(config.output) == undisturbed


@pytest.mark.durable
def test_workers_lost_too_often_end_the_run(shop, undisturbed, tmp_path, ray_cluster):
    accident = KillDuringStage("draw", "worker", calls=1, delay_s=0.0, folder=tmp_path, times=1000)
    pools = {**POOLS, "generators": ActorPoolConfig(max_parallel=1, retries=1)}
    config = settings(shop, tmp_path / "out")
    with pytest.raises(StageError, match="have lost 2 workers"):
        synthesize(config, RaySynthesisExecutor(**pools, make_generate_stage=accident))
    with pytest.raises(DatasetError, match="no synthetic data is committed"):
        ShardDataset.open(config.output)
    synthesize(config, RaySynthesisExecutor(**POOLS))
    assert digest(config.output) == undisturbed
