"""Shared inputs, and a log of all faults, which pytest prints at the end."""

import time

import pytest

from loraseg.train.tasks import train_adapter
from tests.integration.faults.publishing import PublisherEnvironment
from tests.integration.faults.suite_size import FULL, SEED
from tests.integration.faults.training_inputs import TrainingInputs, published_digests

_FAULT_LOGS = []


@pytest.fixture
def fault_log(request):
    """A list of lines for the summary."""
    lines = []
    _FAULT_LOGS.append((request.node.name, lines))
    started = time.monotonic()
    yield lines
    lines.append(f"{time.monotonic() - started:.1f} s in total")


def pytest_terminal_summary(terminalreporter):
    if not _FAULT_LOGS:
        return
    form = "full" if FULL else "short"
    terminalreporter.section(f"faults, {form} form, LORASEG_FAULTS_SEED={SEED}")
    for name, lines in _FAULT_LOGS:
        terminalreporter.write_line(name)
        for line in lines:
            terminalreporter.write_line(f"    {line}")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return TrainingInputs(tmp_path_factory.mktemp("faults") / "inputs").write()


@pytest.fixture(scope="session")
def expected(inputs, tmp_path_factory):
    """Digests of the adapters that one process publishes without Ray, S3 and faults."""
    folder = tmp_path_factory.mktemp("expected")
    _, config = inputs.manifest(folder / "manifest.yaml", folder.as_uri())
    for task in config.tasks():
        train_adapter(task)
    return published_digests(config.library)


@pytest.fixture
def environment(durable_env, tmp_path):
    """A library on the durable server for several processes."""
    return PublisherEnvironment(
        f"{durable_env.uri}/library", durable_env.environment, tmp_path, SEED
    )
