"""A store that drops, delays, truncates and refuses, and whose server is killed and restarted."""

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
def proxy(durable_env, chronicle):
    """The durable server behind a proxy that spoils a share of all requests."""
    with FlakyProxy(durable_env.endpoint.url, share=FAULT_SHARE, seed=SEED).running() as proxy:
        yield proxy
    counts = dict(sorted(proxy.counts.items()))
    chronicle.append(f"the proxy: {counts}")


@pytest.fixture
def restart(durable_env, chronicle):
    """Kill the server hard and start it again."""
    if not durable_env.endpoint.restart:
        pytest.skip("LORASEG_TEST_S3_RESTART does not say how to kill and restart the server")

    def restart():
        started = time.monotonic()
        subprocess.run(
            durable_env.endpoint.restart, shell=True, check=True, stdout=subprocess.DEVNULL
        )
        seconds = time.monotonic() - started
        chronicle.append(f"{time.strftime('%H:%M:%S')} killed the server, back in {seconds:.1f} s")

    return restart


class ScheduledFaults:
    """Runs each action once when ``progress`` has reached its share, beside what is tested."""

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
def test_training_outlives_faults_and_restarts(
    ray_cluster, workshop, undisturbed, durable_env, proxy, restart, chronicle, tmp_path
):
    _, config = workshop.manifest(tmp_path / "manifest.yaml", durable_env.uri)
    train_through(proxy, config, {0.1: restart, 0.6: restart})
    assert proxy.counts["no answer"] > 0
    check_library(config.library, undisturbed)


@pytest.mark.ray
def test_training_outlives_an_outage(
    ray_cluster, workshop, undisturbed, durable_env, proxy, chronicle, tmp_path
):
    _, config = workshop.manifest(tmp_path / "manifest.yaml", durable_env.uri)

    def outage():
        chronicle.append(f"{time.strftime('%H:%M:%S')} nothing is reached for {OUTAGE_S} s")
        with proxy.outage():
            time.sleep(OUTAGE_S)

    train_through(proxy, config, {0.2: outage})
    check_library(config.library, undisturbed)


def test_publishing_outlives_faults_and_restarts(workplace, proxy, restart, chronicle):
    direct = Library(open_store(workplace.uri))
    spoilt = workplace.via_proxy(proxy.url)
    readers = publishing.start_readers(spoilt)
    started = time.perf_counter()
    publishers = [spoilt.start(publish_many, name, PUBLICATIONS) for name in publishing.names()]
    expected = {
        adapter_name(name, number) for name in publishing.names() for number in range(PUBLICATIONS)
    }
    with ScheduledFaults(
        lambda: direct.generation() / len(expected), {0.2: restart, 0.6: restart}
    ) as disasters:
        publishing.check_exit_codes(publishers)
    seconds = time.perf_counter() - started
    assert len(disasters.done) == 2
    publishing.finish(spoilt, readers)
    publishing.log_summary(chronicle, workplace, seconds)
    publishing.check_library(workplace.uri, expected)
    (line,) = publishing.verify(workplace)
    assert line.endswith("objects checked, ok")


def train_through(proxy, config, actions):
    """Train all adapters with the store behind the proxy."""
    seen = {}
    outcomes = []
    with (
        pytest.MonkeyPatch.context() as patch,
        ScheduledFaults(lambda: sum(seen.values()) / (STEPS * len(ADAPTERS)), actions) as disasters,
    ):
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        outcomes += train_adapters(
            config.tasks(),
            ResourceConfig(max_parallel=2),
            on_progress=lambda now: seen.update({k: v.progress.step for k, v in now.items()}),
            poll_interval_s=0.2,
        )
    assert [outcome.error for outcome in outcomes] == [None] * len(ADAPTERS)
    assert len(disasters.done) == len(actions)
