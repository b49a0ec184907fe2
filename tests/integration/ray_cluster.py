"""One small Ray for all integration tests; every process that it starts is ended by its pid."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray


@dataclass(frozen=True)
class RayCluster:
    """``environment`` lets another process join as a driver or as a node."""

    address: str
    environment: dict[str, str]


@pytest.fixture(scope="session")
def ray_cluster():
    # The mode stays as it was when ray was imported (it is read then); the token is needed when it
    # is unset or "token", and keeps Ray from writing one into the home folder.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    own = psutil.Process()
    others = set(own.children())
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=200 * 1024**2,
        include_dashboard=False,
        log_to_driver=False,
        # A lost node counts as dead after about 5 s instead of 15 s, and workers do not give way
        # to whatever else the machine does: tests wait for them.
        _system_config={"health_check_period_ms": 1000, "worker_niceness": 0},
    )
    started = [child for child in own.children() if child not in others]
    address = ray.get_runtime_context().gcs_address
    yield RayCluster(address, {**os.environ, "RAY_ADDRESS": address})
    family = [process for child in started for process in (child, *child.children(recursive=True))]
    ray.shutdown()
    end(family)


class SpotNodes:
    """Nodes of one CPU with a custom resource, in a cluster as long as the context lasts.

    A node that is lost is replaced; ``replaced`` counts how often that happened.
    """

    def __init__(self, cluster, count, *, resource):
        self._cluster, self._count, self._resource = cluster, count, resource
        self._starters, self._closing = [], threading.Event()
        self.replaced = 0

    def __enter__(self):
        # One after the other: two that start at once may pick the same free port.
        for number in range(1, self._count + 1):
            self._starters.append(self._start())
            wait_for_resource(self._resource, number)
        self._keeper = threading.Thread(target=self._keep)
        self._keeper.start()
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._keeper.join()
        for starter in self._starters:
            end_starter(starter)

    def _start(self):
        ray_command = str(Path(sys.executable).with_name("ray"))
        command = [ray_command, "start", "--block", f"--address={self._cluster.address}"]
        command += ["--num-cpus=1", f"--resources={json.dumps({self._resource: 1})}"]
        command += ["--object-store-memory=100000000", "--min-worker-port=0"]
        command += ["--max-worker-port=0", "--disable-usage-stats"]
        return subprocess.Popen(command, env=self._cluster.environment, stdout=subprocess.DEVNULL)

    def _keep(self):
        while not self._closing.wait(0.5):
            for number, starter in enumerate(self._starters):
                # `ray start --block` ends when its raylet has gone.
                if starter.poll() is not None:
                    self._starters[number] = self._start()
                    self.replaced += 1


def wait_for_resource(name, amount, deadline_s=90):
    deadline = time.monotonic() + deadline_s
    while ray.cluster_resources().get(name, 0) < amount:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {amount} nodes with {name!r} came up in {deadline_s} s")
        time.sleep(0.2)


def end_starter(starter):
    """End a ``ray start --block`` and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(starter.pid)
        family = [root, *root.children(recursive=True)]
        starter.terminate()
        end(family)
    starter.wait()


def end(processes, patience_s=5.0):
    """Wait for the processes to go, then kill those that stay."""
    _, stubborn = psutil.wait_procs(processes, timeout=patience_s)
    for process in stubborn:
        process.kill()
    psutil.wait_procs(stubborn, timeout=patience_s)
