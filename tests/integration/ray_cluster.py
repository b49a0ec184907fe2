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

_START_S = 3.0


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
        self._keeper = threading.Thread(target=self._keep)
        self._keeper.start()
        try:
            wait_for_resource(self._resource, at_least=self._count)
        except TimeoutError:
            self.__exit__()
            raise
        self.replaced = 0  # one that failed to start is no loss
        return self

    def __exit__(self, *_):
        self._closing.set()
        self._keeper.join()
        for starter in self._starters:
            end_starter(starter)
        # A dead node is counted for some seconds; another test must not take it for its own.
        wait_for_resource(self._resource, at_most=0)

    def _start(self):
        ray_command = str(Path(sys.executable).with_name("ray"))
        command = [ray_command, "start", "--block", f"--address={self._cluster.address}"]
        command += ["--num-cpus=1", f"--resources={json.dumps({self._resource: 1})}"]
        command += ["--object-store-memory=100000000", "--min-worker-port=0"]
        command += ["--max-worker-port=0", "--disable-usage-stats"]
        return subprocess.Popen(command, env=self._cluster.environment, stdout=subprocess.DEVNULL)

    def _keep(self):
        while not self._closing.is_set():
            # `ray start --block` ends when its raylet has gone.
            lost = [starter for starter in self._starters if starter.poll() is not None]
            if lost or len(self._starters) < self._count:
                self._starters = [each for each in self._starters if each not in lost[:1]]
                self._starters.append(self._start())
                self.replaced += len(lost[:1])
                # One after the other: two that start at once may pick the same free port.
                self._closing.wait(_START_S)
            self._closing.wait(0.5)


def wait_for_resource(name, *, at_least=0, at_most=1000, deadline_s=90):
    deadline = time.monotonic() + deadline_s
    while not at_least <= ray.cluster_resources().get(name, 0) <= at_most:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not {at_least} to {at_most} nodes with {name!r} in {deadline_s} s")
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
