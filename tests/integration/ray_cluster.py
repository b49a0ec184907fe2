"""One small Ray for all integration tests; every process that it starts is ended by its pid."""

import contextlib
import os
import secrets
from dataclasses import dataclass

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
