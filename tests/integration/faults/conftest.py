"""The chronicle of what was done to whom, printed at the end whatever the outcome."""

import time

import pytest

from loraseg.train.tasks import train_adapter
from tests.integration.faults.publishing import PublisherEnvironment
from tests.integration.faults.suite_size import FULL, SEED
from tests.integration.faults.training_inputs import TrainingInputs, published_digests

_CHRONICLES = []


@pytest.fixture
def chronicle(request):
    """A list of lines that the summary shows."""
    lines = []
    _CHRONICLES.append((request.node.name, lines))
    started = time.monotonic()
    yield lines
    lines.append(f"{time.monotonic() - started:.1f} s in all")


def pytest_terminal_summary(terminalreporter):
    if not _CHRONICLES:
        return
    form = "full" if FULL else "short"
    terminalreporter.section(f"faults, {form} form, LORASEG_FAULTS_SEED={SEED}")
    for name, lines in _CHRONICLES:
        terminalreporter.write_line(name)
        for line in lines:
            terminalreporter.write_line(f"    {line}")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    return TrainingInputs(tmp_path_factory.mktemp("faults") / "workshop").write()


@pytest.fixture(scope="session")
def undisturbed(workshop, tmp_path_factory):
    """What the adapters become in one process, without Ray, S3 or accidents."""
    folder = tmp_path_factory.mktemp("undisturbed")
    _, config = workshop.manifest(folder / "manifest.yaml", folder.as_uri())
    for task in config.tasks():
        train_adapter(task)
    return published_digests(config.library)


@pytest.fixture
def workplace(durable_env, tmp_path):
    """A library on the durable server for many processes."""
    return PublisherEnvironment(
        f"{durable_env.uri}/library", durable_env.environment, tmp_path, SEED
    )
