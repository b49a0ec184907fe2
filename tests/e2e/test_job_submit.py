"""``ray job submit`` of the tracked files to a local head node."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

from loraseg.library import Library
from loraseg.storage import open_store
from tests.integration.ray_cluster import end_starter
from tests.tiny_training import write_domain, write_manifest, write_models

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture
def exported(tmp_path):
    """A folder with only the tracked files of the last commit."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    archive, folder = tmp_path / "export.tar", tmp_path / "export"
    subprocess.run(["git", "archive", f"--output={archive}", "HEAD"], cwd=ROOT, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture
def head():
    """The environment variables for a Ray head with dashboard on free ports."""
    ports = free_ports(5)
    # The paths of Unix sockets below it are limited to 107 characters.
    session = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    names = (*names, "dashboard-agent-grpc-port")
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
    command += [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    command += [f"--temp-dir={session}", "--object-store-memory=200000000"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--include-dashboard=true"]
    starter = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for_port(ports[1], starter)
        yield {**environment, "RAY_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
    finally:
        end_starter(starter)
        shutil.rmtree(session, ignore_errors=True)


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]


def wait_for_port(port, process, deadline_s=90):
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.3)
    raise TimeoutError(f"no dashboard on port {port}, the head's status is {process.poll()}")


def submit(folder, environment, *arguments):
    """Submit a job, repeatedly while the head has no agent; return the last attempt."""
    command = [BIN / "ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", *arguments]
    deadline = time.monotonic() + 60
    while True:
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if "No available agent" not in result.stdout + result.stderr or time.monotonic() > deadline:
            return result
        time.sleep(1)


def test_a_submitted_job_fills_the_library(exported, head, tmp_path):
    data = {name: write_domain(tmp_path / name, name) for name in ("fog", "night")}
    models = write_models(tmp_path)
    write_manifest(exported / "manifest.yaml", str(tmp_path), data, **models)
    result = submit(exported, head, "jobs.train_adapters", "--config", "manifest.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "succeeded" in result.stdout
    library = Library(open_store(str(tmp_path / "library")))
    assert {entry.name for entry in library.entries()} == {"fog", "night"}
