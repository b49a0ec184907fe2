"""Batch jobs with local=true: no Ray, and the same bytes as the library functions."""

import dataclasses
from pathlib import Path

import pytest
import ray
import yaml

import jobs.segment_images
import jobs.synthesize
from loraseg import config as configuration
from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.segment_images import segment_images
from loraseg.batch.synthesize.run import synthesize
from tests import tiny_image_batch, tiny_synthesis


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("Ray is started")

    monkeypatch.setattr(ray, "init", fail)


def run_job(job, tmp_path, config, *overrides):
    """Run a job from the command line; return its exit status."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(configuration.to_dict(config)))
    with pytest.raises(SystemExit) as leaving:
        configuration.main(job.main, job.Config, ["--config", str(file), *overrides])
    return leaving.value.code


def test_segment_images(tmp_path, capsys):
    objects = {**tiny_image_batch.good_images(count=1), **tiny_image_batch.bad_images()}
    tiny_image_batch.put_all(str(tmp_path / "images"), objects)
    config = tiny_image_batch.write_inputs(tmp_path, tmp_path / "images", tmp_path / "job")
    assert run_job(jobs.segment_images, tmp_path, config, "local=true") == 0
    assert "8 images (4 bad_image, 4 ok), 8 of them new" in capsys.readouterr().out
    segment_images(dataclasses.replace(config, output=str(tmp_path / "direct")), LocalExecutor())
    direct = tiny_image_batch.read_all(str(tmp_path / "direct"))
    assert tiny_image_batch.read_all(config.output) == direct


def test_segment_images_uses_the_threads_of_the_resources(tmp_path):
    tiny_image_batch.put_all(str(tmp_path / "images"), tiny_image_batch.good_images(["day"], 1))
    config = tiny_image_batch.write_inputs(tmp_path, tmp_path / "images", tmp_path / "out")
    assert run_job(jobs.segment_images, tmp_path, config, "--local", "resources.cpus=2") == 0
    assert '"threads": 2' in Path(tmp_path, "out", "state.json").read_text()


def test_synthesize(tmp_path, capsys):
    tiny_synthesis.write_inputs(tmp_path, masks=3)
    config = tiny_synthesis.settings(tmp_path, tmp_path / "job")
    assert run_job(jobs.synthesize, tmp_path, config, "local=true") == 0
    assert "3 masks, 9 ok; 9 new rows" in capsys.readouterr().out
    synthesize(dataclasses.replace(config, output=str(tmp_path / "direct")), LocalExecutor())
    for path in Path(tmp_path, "direct").rglob("*"):
        copy = Path(tmp_path, "job", path.relative_to(tmp_path / "direct"))
        assert path.is_dir() or path.read_bytes() == copy.read_bytes(), path
    assert run_job(jobs.synthesize, tmp_path, config, "local=true") == 0
    assert "9 ok; 0 new rows" in capsys.readouterr().out
