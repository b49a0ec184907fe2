"""Generator adapters on Ray: broken data, a killed worker, the plan, a repeated job."""

import pytest
import yaml

import jobs.train_adapters as job
from actors.resources import ResourceConfig
from actors.train_adapters import train_adapters
from loraseg import config as configuration
from loraseg.library import Library
from loraseg.storage import open_store
from loraseg.train.tasks import train_adapter
from tests.integration.training.fault_injection import KillAtStep
from tests.unit.train.tiny_generator import RECIPE, write_pipeline

pytestmark = pytest.mark.ray

OVERRIDES = {
    **RECIPE,
    "grid": {"every": 10, "masks": 2, "steps": 2},
    "loop": {"steps": 30, "warmup_steps": 2, "checkpoint_every": 10},
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def make(tmp_path, domains, pipeline):
    """Return a function: folder and domain names -> (manifest file, its config)."""

    def manifest(name, *names):
        folder = tmp_path / name
        folder.mkdir()
        values = {
            "role": "generator",
            "base": str(pipeline),
            "library": str(folder / "library"),
            "checkpoints": str(folder / "checkpoints"),
            "output": str(folder / "reports"),
            "overrides": OVERRIDES,
            "domains": [{"name": name, "data": str(domains[name])} for name in names],
        }
        path = folder / "manifest.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path, configuration.load(job.Config, path)

    return manifest


def run_job(manifest, *overrides):
    with pytest.raises(SystemExit) as leaving:
        configuration.main(job.main, job.Config, ["--config", str(manifest), *overrides])
    return leaving.value.code


def published(config):
    return {entry.name: entry for entry in Library(open_store(config.library)).entries()}


def test_a_manifest_trains_generators_and_a_broken_domain_fails_alone(ray_cluster, make, capsys):
    manifest, config = make("first", "fog", "broken")
    assert run_job(manifest, "--dry-run") == 1
    plan = capsys.readouterr().out
    assert "to be trained" in plan
    assert "broken: " in plan
    assert run_job(manifest) == 1
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["fog"].split()[1] == "published"
    assert "val_loss" in rows["fog"]
    assert "DatasetError" in rows["broken"]
    entries = published(config)
    assert set(entries) == {"fog"}
    assert entries["fog"].card.role == "generator"
    page = open_store(config.output).get("fog.html").decode()
    assert page.count("data:image/png") == 3
    assert run_job(manifest) == 1
    assert published(config) == entries


def test_a_killed_worker_loses_only_the_steps_since_its_checkpoint(ray_cluster, make, tmp_path):
    _, config = make("killed", "fog")
    runner = KillAtStep(step=15, marker=tmp_path / "interrupted")
    (outcome,) = train_adapters(config.tasks(), ResourceConfig(), runner=runner)
    assert (tmp_path / "interrupted").exists()
    assert outcome.error is None
    assert outcome.result.resumed_from_step == 10
    _, undisturbed = make("undisturbed", "fog")
    assert train_adapter(undisturbed.tasks()[0]).digest == outcome.result.digest
    report = Library(open_store(config.library)).verify()
    assert not report.missing
    assert not report.corrupt
