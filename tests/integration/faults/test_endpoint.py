"""The endpoint under load while processes are killed, the store fails, and the library changes."""

import time

import pytest

from loraseg.library.records import blob_key, read_record
from loraseg.seeding import numpy_generator
from loraseg.storage import open_store
from tests.integration.faults.endpoint_process import EndpointProcess, SampleLibrary
from tests.integration.faults.flaky_proxy import FlakyProxy
from tests.integration.faults.load_generator import CLIENTS, LoadGenerator, check_responses
from tests.integration.faults.suite_size import CHANGES, FULL, LOAD_S, OUTAGE_S, SEED

pytestmark = [
    pytest.mark.durable,
    pytest.mark.faults,
    pytest.mark.ray,
    pytest.mark.timeout(1500),
]

full_suite_only = pytest.mark.skipif(not FULL, reason="minutes under load: `make faults`")
_ADAPTERS = range(24)
_REFRESH_TIMEOUT_S = 20
_RECOVERY_TIMEOUT_S = 60


@pytest.fixture
def library(durable_env, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    library = SampleLibrary(folder, f"{durable_env.uri}/library")
    library.publish(_ADAPTERS)
    return library


def wait_for_share(load, share):
    """Wait until a share of the time under load has passed."""
    time.sleep(max(0.0, share * LOAD_S - load.elapsed_s))


def append_note(fault_log, load, text):
    fault_log.append(f"{load.elapsed_s:5.1f} s: {text}")


def wait_for_generation(load, library):
    """Wait until a response has the newest generation; return the seconds."""
    started, newest = time.monotonic(), library.library.generation()
    while load.newest_generation() < newest:
        assert time.monotonic() - started < _REFRESH_TIMEOUT_S, (
            f"no response has generation {newest}"
        )
        time.sleep(0.1)
    return time.monotonic() - started


def test_killed_replicas(library, durable_env, fault_log, tmp_path):
    random = numpy_generator(SEED, "replicas")
    environment = durable_env.endpoint.environment
    with (
        EndpointProcess(library, tmp_path / "served", environment) as endpoint,
        LoadGenerator(endpoint, library) as load,
    ):
        for share, kind in ((0.15, "Segmenter"), (0.4, "Retrieval"), (0.65, "Gateway")):
            wait_for_share(load, share)
            replicas = endpoint.replicas(kind)
            target = replicas[int(random.integers(len(replicas)))]
            target.kill()
            append_note(fault_log, load, f"killed 1 of {len(replicas)} {kind}, pid {target.pid}")
        wait_for_share(load, 1.0)
        while {response.status for response in load.responses[-2 * CLIENTS :]} != {200}:
            assert load.elapsed_s < LOAD_S + _RECOVERY_TIMEOUT_S, "the endpoint does not recover"
            time.sleep(0.1)
    check_responses(load, library, fault_log)


@full_suite_only
def test_an_outage_of_the_store(library, durable_env, fault_log, tmp_path):
    with FlakyProxy(durable_env.endpoint.url).running() as proxy:
        environment = {**durable_env.endpoint.environment, "AWS_ENDPOINT_URL": proxy.url}
        with (
            EndpointProcess(library, tmp_path / "served", environment) as endpoint,
            LoadGenerator(endpoint, library) as load,
        ):
            wait_for_share(load, 0.2)
            append_note(fault_log, load, f"outage of {OUTAGE_S} s")
            with proxy.outage():
                time.sleep(OUTAGE_S)
                during = load.responses[-CLIENTS:]
            append_note(fault_log, load, "the store is back")
            library.publish(range(100, 104))
            append_note(
                fault_log, load, f"new generation after {wait_for_generation(load, library):.1f} s"
            )
            wait_for_share(load, 1.0)
    check_responses(load, library, fault_log)
    assert any(response.status == 200 for response in during), "cached adapters are not served"


@full_suite_only
def test_adapters_are_published_retired_and_rolled_back(library, durable_env, fault_log, tmp_path):
    published, retired, rolled_back = CHANGES
    size = 4 * library.adapter_bytes
    library.publish(range(8), seed=1)
    environment = durable_env.endpoint.environment
    with (
        EndpointProcess(library, tmp_path / "served", environment, cache_bytes=size) as endpoint,
        LoadGenerator(endpoint, library) as load,
    ):
        names = [f"a{number:03d}" for number in _ADAPTERS]
        changes = [
            *((library.publish, ([200 + n],)) for n in range(published)),
            *((library.library.retire, (name,)) for name in names[8 : 8 + retired]),
            *((library.library.rollback, (name, 1)) for name in names[:rolled_back]),
        ]
        order = numpy_generator(SEED, "changes").permutation(len(changes))
        for count, index in enumerate(order):
            wait_for_share(load, 0.1 + 0.7 * count / len(changes))
            change, arguments = changes[index]
            change(*arguments)
        seconds = wait_for_generation(load, library)
        append_note(fault_log, load, f"{len(changes)} changes, the last one after {seconds:.1f} s")
        wait_for_share(load, 1.0)
    check_responses(load, library, fault_log)
    generations = {r.body["generation"] for r in load.responses if r.status == 200}
    fault_log.append(f"{len(generations)} generations, a cache for 4 adapters")
    assert len(generations) > 3


def test_damaged_blobs(library, durable_env, fault_log, tmp_path):
    store = open_store(library.uri)
    library.publish(_ADAPTERS, seed=2)
    damaged = library.nearest_adapters()[:2]
    for name in damaged:
        library.library.rollback(name, 1)
    with (
        EndpointProcess(library, tmp_path / "served", durable_env.endpoint.environment) as endpoint,
        LoadGenerator(endpoint, library) as load,
    ):
        wait_for_share(load, 0.2)
        # Version 2 of these adapters is in no cache.
        original = {}
        for name, damage in zip(damaged, (_cut, _same_size), strict=True):
            key = _weights_blob(library, name, version=2)
            original[key] = store.get(key)
            store.put(key, damage(original[key]))
            library.library.rollback(name, 2)
            append_note(
                fault_log,
                load,
                f"{name} has a version with damaged weights ({damage.__name__})",
            )
        wait_for_share(load, 0.5)
        for key, data in original.items():
            store.put(key, data)
        append_note(fault_log, load, "both are restored")
        wait_for_share(load, 1.0)
    check_responses(load, library, fault_log)
    answered = [response for response in load.responses if response.status == 200]
    skipped = {(s["name"], s["reason"]) for r in answered for s in r.body["skipped"]}
    fault_log.append(f"skipped: {sorted(skipped)}")
    assert {name for name, _ in skipped} == set(damaged)
    used = {(a["name"], a["version"]) for r in answered[-500:] for a in r.body["adapters"]}
    fault_log.append(f"used again: {sorted(set(used) & {(name, 2) for name in damaged})}")


def _weights_blob(library, name, *, version):
    record = read_record(open_store(library.uri), library.library.entry(name, version))
    return blob_key(record.files["adapter_model.safetensors"].sha256)


def _cut(data):
    return data[: len(data) // 2]


def _same_size(data):
    return data[:-8] + bytes(byte ^ 1 for byte in data[-8:])


@full_suite_only
def test_memory_is_bounded(library, durable_env, fault_log, tmp_path):
    """Every request has another mix; caches of mixes must not grow without limit."""
    first, last = 500, 10_000
    with (
        EndpointProcess(library, tmp_path / "served", durable_env.endpoint.environment) as endpoint,
        LoadGenerator(endpoint, library) as load,
    ):
        sizes = []
        for count in (first, last):
            while len(load.responses) < count:
                time.sleep(0.05)
            sizes.append(endpoint.memory_bytes())
    check_responses(load, library, fault_log)
    growth = sizes[1] / sizes[0] - 1
    fault_log.append(f"{sizes[0] / 1e6:.0f} MB after {first}, {100 * growth:+.1f} % after {last}")
    assert growth < 0.05
