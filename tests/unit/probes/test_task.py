import dataclasses

import pytest

from loraseg.adapters.targets.layer_report import LayerReport
from loraseg.adapters.targets.layer_report_io import read_layer_report
from loraseg.backbones.diffusion import load_diffusion
from loraseg.errors import ConfigError, IntegrityError
from loraseg.probes.gradient import GradientProbeConfig
from loraseg.probes.task import ProbeTask, run_probe
from loraseg.train.generator_adapters.targets import generator_targets
from tests.tiny_training import write_domain
from tests.unit.train.tiny_generator import tiny_recipe, write_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    write_pipeline(folder / "pipeline")
    write_domain(folder / "fog", "fog")
    return folder


@pytest.fixture
def task(folder, tmp_path):
    return ProbeTask(
        base=str(folder / "pipeline"),
        data=str(folder / "fog"),
        images=3,
        gradient=GradientProbeConfig(epochs=1, learning_rate=1e-3, batch_size=4),
        output=str(tmp_path / "reports" / "fog.json"),
        cache=str(folder / "cache"),
    ).resolved()


def test_report_is_at_the_output_and_selects_layers_for_a_recipe(task, folder):
    result = run_probe(task)
    assert not result.skipped
    report = read_layer_report(task.output)
    assert report.to_bytes() == result.report
    base = load_diffusion(task.base)
    assert report.base_digest == base.digest
    assert report.samples["images"] == report.samples["views"] == 3
    assert report.settings["size"] == [32, 32]
    assert {"task_digest", "data_digest", "learning_rate"} <= set(report.settings)
    recipe = tiny_recipe(targets=task.output, top=5)
    assert generator_targets(base.unet, recipe) == report.projections().top(5)


def test_a_finished_probe_is_skipped(task, monkeypatch):
    first = run_probe(task)
    monkeypatch.setattr("loraseg.probes.task.gradient_probe", None)
    again = run_probe(task)
    assert again.skipped
    assert again.report == first.report


def test_another_probe_replaces_the_report(task):
    first = run_probe(task)
    other = run_probe(dataclasses.replace(task, seed=1))
    assert not other.skipped
    digests = {LayerReport.from_bytes(r.report).settings["task_digest"] for r in (first, other)}
    assert len(digests) == 2
    assert read_layer_report(task.output).to_bytes() == other.report


def test_a_file_that_is_not_a_report_is_kept(task, tmp_path):
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "fog.json").write_text("mine")
    with pytest.raises(IntegrityError, match=r"fog\.json"):
        run_probe(task)
    assert (tmp_path / "reports" / "fog.json").read_text() == "mine"


def test_resolved_paths_are_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder)
    task = ProbeTask(base="pipeline", data="fog", output="fog.json").resolved()
    assert (task.base, task.data, task.output) == tuple(
        str(folder / name) for name in ("pipeline", "fog", "fog.json")
    )
    assert task.cache_uri == str(folder / "_cache")
    assert ProbeTask(base="miniature", data="s3://b/d", output="s3://b/r/x.json").resolved() == (
        ProbeTask(base="miniature", data="s3://b/d", output="s3://b/r/x.json")
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "concepts"}, "'concepts', expected one of gradient"),
        ({"images": 0}, "images"),
        ({"flip": 2.0}, "flip"),
        ({"output": "s3://bucket"}, "a file"),
    ],
)
def test_config_is_checked(task, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(task, **changes)


def test_size_is_a_multiple_that_the_model_can_halve(task):
    with pytest.raises(ConfigError, match=r"size: got \(30, 32\), expected multiples of 4"):
        run_probe(dataclasses.replace(task, size=(30, 32)))
