"""The evaluation job on Ray: the same bytes as without Ray, lost workers, errors."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

import jobs.evaluate as job
from actors.resources import ResourceConfig
from actors.tasks import ordered_map
from loraseg import config as configuration
from loraseg.backbones.clip import load_clip
from loraseg.errors import DatasetError
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.train.core.threads import fixed_threads
from tests.unit.tiny import DOMAINS, publish, write_domain, write_models

pytestmark = pytest.mark.ray
FAMILIES = {"day": "bright", "fog": "bright", "night": "dark", "dusk": "dark"}


@pytest.fixture
def config(tmp_path):
    base, clip = write_models(tmp_path)
    publish(tmp_path / "library", load_base(base), load_clip(clip))
    domains = [
        {"name": name, "family": family, "data": str(write_domain(tmp_path / name, name))}
        for name, family in FAMILIES.items()
    ]
    values = {
        "library": str(tmp_path / "library"),
        "output": str(tmp_path / "out"),
        "base": base,
        "encoder": clip,
        "domains": domains,
        "grid": {"k": [1, 2], "temperature": [0.3]},
        "resources": {"max_parallel": 2},
    }
    return configuration.build(job.Config, values)


def test_the_job_writes_the_same_bytes_with_and_without_ray(config, ray_cluster, capsys):
    job.main(config)
    table = capsys.readouterr().out
    for name in DOMAINS:
        assert name in table
    out = Path(config.evaluation.output)
    assert (out / "report.html").stat().st_size > 10_000
    on_cluster = (out / "results.json").read_bytes()
    with fixed_threads(config.resources.threads):
        job.main(replace(config, local=True))
    assert (out / "results.json").read_bytes() == on_cluster


def test_the_task_of_a_lost_worker_is_repeated(ray_cluster, tmp_path):
    ray_map = ordered_map(ResourceConfig(max_parallel=1), "test")
    assert list(ray_map(_die_once, [_FakeTask(tmp_path, n) for n in range(3)])) == [0, 1, 2]
    assert (tmp_path / "1.died").exists()


def test_an_error_of_a_task_is_raised_unchanged(ray_cluster, tmp_path):
    ray_map = ordered_map(ResourceConfig(), "test")
    with pytest.raises(DatasetError, match="no masks here"):
        list(ray_map(_fail, [_FakeTask(tmp_path, n) for n in range(2)]))


class _FakeTask:
    def __init__(self, folder, number):
        self.folder, self.number = folder, number

    @property
    def domain(self):
        return type("Named", (), {"name": str(self.number)})


def _die_once(task):
    marker = task.folder / f"{task.number}.died"
    if task.number == 1 and not marker.exists():
        marker.touch()
        os._exit(1)
    return task.number


def _fail(task):
    raise DatasetError("no masks here")
