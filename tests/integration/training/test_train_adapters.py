"""Adapters trained on a real Ray, with broken data, killed workers, nodes and drivers."""

import pytest

from actors.resources import Placement
from actors.training import train_adapters
from loraseg.train.tasks import AdapterTask
pytestmark = pytest.mark.ray


def tasks(tmp_path, *names):
    return [AdapterTask(name=n, data=str(tmp_path) if n != "broken" else "/nope", library=str(tmp_path/"lib"), checkpoints=str(tmp_path/"ck")) for n in names]


def test_one_broken(ray_cluster, tmp_path):
    outcomes = {o.name: o for o in train_adapters(tasks(tmp_path, "a", "broken", "c"), Placement())}
    assert outcomes["broken"].error.startswith("DatasetError")
    assert outcomes["a"].result and outcomes["c"].result
    outcomes = list(train_adapters(tasks(tmp_path, "a", "c"), Placement()))
    assert all(o.result.skipped for o in outcomes)
    
def test_worker_killed(ray_cluster, tmp_path):
    import os, signal
    killed = []
    def watch(standings):
        s = standings.get("a")
        if s and s.progress.step > 15 and not killed:
            pid = int(s.worker.split(":")[1]); killed.append(pid); os.kill(pid, signal.SIGKILL)
    (o,) = train_adapters(tasks(tmp_path, "a"), Placement(), watch=watch, read_every_s=0.2)
    assert killed
    assert o.result.resumed_from_step >= 10
