"""Training and publishing while the store fails requests, is restarted, or cannot be reached."""

import subprocess
import threading
import time

import pytest

from actors.resources import ResourceConfig
from actors.train_adapters import train_adapters
from loraseg.library import Library
from loraseg.storage import open_store
from tests.integration.faults import test_publishing as publishing
from tests.integration.faults.flaky_proxy import FlakyProxy
from tests.integration.faults.publishing import adapter_name, publish_many
from tests.integration.faults.suite_size import (
    ADAPTERS as PUBLICATIONS,
)
from tests.integration.faults.suite_size import (
    FAULT_SHARE,
    OUTAGE_S,
    SEED,
)
from tests.integration.faults.training_inputs import ADAPTERS, STEPS, check_library

pytestmark = [pytest.mark.durable, pytest.mark.faults, pytest.mark.timeout(1500)]


@pytest.fixture
def proxy(durable_env, fault_log):
    """The durable server behind a proxy that disturbs a share of all requests."""
    with FlakyProxy(durable_env.endpoint.url, share=FAULT_SHARE, seed=SEED).running() as proxy:
        yield proxy
    counts = dict(sorted(proxy.counts.items()))
    fault_log.append(f"the proxy: {counts}")


@pytest.fixture
def restart(durable_env, fault_log):
    """Return a function that kills the server and starts it again."""
    if not durable_env.endpoint.restart:
        pytest.skip("LORASEG_TEST_S3_RESTART has no command that restarts the server")

    def restart():
        started = time.monotonic()
        subprocess.run(
            durable_env.endpoint.restart, shell=True, check=True, stdout=subprocess.DEVNULL
        )
        seconds = time.monotonic() - started
        fault_log.append(
            f"{time.strftime('%H:%M:%S')} killed the server, restarted after {seconds:.1f} s"
        )

    return restart


class ScheduledFaults:
    """Runs each action once, in a thread, when ``progress`` reaches its share."""

    def __init__(self, progress, actions):
        self._progress, self._actions = progress, dict(actions)
        self._stop = threading.Event()
        self.done = []

    def __enter__(self):
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _run(self):
        for share, action in sorted(self._actions.items()):
            while self._progress() < share:
                if self._stop.wait(0.1):
                    return
            action()
            self.done.append(share)


@pytest.mark.ray
def test_training_survives_faults_and_restarts(
    ray_cluster, inputs, expected, durable_env, proxy, restart, fault_log, tmp_path
):
    _, config = inputs.manifest(tmp_path / "manifest.yaml", durable_env.uri)
    train_with_faults(proxy, config, {0.1: restart, 0.6: restart})
    assert proxy.counts["no answer"] > 0
    check_library(config.library, expected)


@pytest.mark.ray
def test_training_survives_an_outage(
    ray_cluster, inputs, expected, durable_env, proxy, fault_log, tmp_path
):
    _, config = inputs.manifest(tmp_path / "manifest.yaml", durable_env.uri)

    def outage():
        fault_log.append(f"{time.strftime('%H:%M:%S')} outage of {OUTAGE_S} s")
        with proxy.outage():
            time.sleep(OUTAGE_S)

    train_with_faults(proxy, config, {0.2: outage})
    check_library(config.library, expected)


def test_publishing_survives_faults_and_restarts(environment, proxy, restart, fault_log):
    direct = Library(open_store(environment.uri))
    proxied = environment.via_proxy(proxy.url)
    readers = publishing.start_readers(proxied)
    started = time.perf_counter()
    publishers = [proxied.start(publish_many, name, PUBLICATIONS) for name in publishing.names()]
    expected = {
        adapter_name(name, number) for name in publishing.names() for number in range(PUBLICATIONS)
    }
    with ScheduledFaults(
        lambda: direct.generation() / len(expected), {0.2: restart, 0.6: restart}
    ) as faults:
        publishing.check_exit_codes(publishers)
    seconds = time.perf_counter() - started
    assert len(faults.done) == 2
    publishing.finish(proxied, readers)
    publishing.log_summary(fault_log, environment, seconds)
    publishing.check_library(environment.uri, expected)
    (line,) = publishing.verify(environment)
    assert line.endswith("objects checked, ok")


def train_with_faults(proxy, config, actions):
    """Train all adapters with the store behind the proxy."""
    steps = {}
    outcomes = []
    with (
        pytest.MonkeyPatch.context() as patch,
        ScheduledFaults(lambda: sum(steps.values()) / (STEPS * len(ADAPTERS)), actions) as faults,
    ):
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        outcomes += train_adapters(
            config.tasks(),
            ResourceConfig(max_parallel=2),
            on_progress=lambda now: steps.update({k: v.progress.step for k, v in now.items()}),
            poll_interval_s=0.2,
        )
    assert [outcome.error for outcome in outcomes] == [None] * len(ADAPTERS)
    assert len(faults.done) == len(actions)
