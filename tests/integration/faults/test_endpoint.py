"""The endpoint under load while its processes, its store and its library suffer accidents."""

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
def stock(durable_env, tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    stock = SampleLibrary(folder, f"{durable_env.uri}/library")
    stock.publish(_ADAPTERS)
    return stock


def wait_for_share(crowd, share):
    """Wait until a share of the time under load is over."""
    time.sleep(max(0.0, share * LOAD_S - crowd.seconds))


def append_note(chronicle, crowd, words):
    chronicle.append(f"{crowd.seconds:5.1f} s: {words}")


def wait_for_generation(crowd, stock):
    """Wait until an answer names the newest generation; return how long that took."""
    started, newest = time.monotonic(), stock.library.generation()
    while crowd.newest_generation() < newest:
        assert time.monotonic() - started < _REFRESH_TIMEOUT_S, f"generation {newest} is not seen"
        time.sleep(0.1)
    return time.monotonic() - started


def test_replicas_are_killed(stock, durable_env, chronicle, tmp_path):
    random = numpy_generator(SEED, "replicas")
    environment = durable_env.endpoint.environment
    with (
        EndpointProcess(stock, tmp_path / "served", environment) as endpoint,
        LoadGenerator(endpoint, stock) as crowd,
    ):
        for share, kind in ((0.15, "Segmenter"), (0.4, "Retrieval"), (0.65, "Gateway")):
            wait_for_share(crowd, share)
            victims = endpoint.replicas(kind)
            victim = victims[int(random.integers(len(victims)))]
            victim.kill()
            append_note(chronicle, crowd, f"killed 1 of {len(victims)} {kind}, pid {victim.pid}")
        wait_for_share(crowd, 1.0)
        while {told.status for told in crowd.responses[-2 * CLIENTS :]} != {200}:
            assert crowd.elapsed_s < LOAD_S + _RECOVERY_TIMEOUT_S, "it recovers"
            time.sleep(0.1)
    check_responses(crowd, stock, chronicle)


@full_suite_only
def test_the_store_is_down_for_a_while(stock, durable_env, chronicle, tmp_path):
    with FlakyProxy(durable_env.endpoint.url).running() as proxy:
        environment = {**durable_env.endpoint.environment, "AWS_ENDPOINT_URL": proxy.url}
        with (
            EndpointProcess(stock, tmp_path / "served", environment) as endpoint,
            LoadGenerator(endpoint, stock) as crowd,
        ):
            wait_for_share(crowd, 0.2)
            append_note(chronicle, crowd, f"nothing is reached for {OUTAGE_S} s")
            with proxy.outage():
                time.sleep(OUTAGE_S)
                during = crowd.responses[-CLIENTS:]
            append_note(chronicle, crowd, "back")
            stock.publish(range(100, 104))
            append_note(
                chronicle, crowd, f"news seen after {wait_for_generation(crowd, stock):.1f} s"
            )
            wait_for_share(crowd, 1.0)
    check_responses(crowd, stock, chronicle)
    assert any(told.status == 200 for told in during), "what is on the machine is served on"


@full_suite_only
def test_adapters_come_and_go(stock, durable_env, chronicle, tmp_path):
    published, retired, rolled = CHANGES
    few = 4 * stock.adapter_bytes
    stock.publish(range(8), seed=1)
    environment = durable_env.endpoint.environment
    with (
        EndpointProcess(stock, tmp_path / "served", environment, cache_bytes=few) as endpoint,
        LoadGenerator(endpoint, stock) as crowd,
    ):
        names = [f"a{number:03d}" for number in _ADAPTERS]
        changes = [
            *((stock.publish, ([200 + n],)) for n in range(published)),
            *((stock.library.retire, (name,)) for name in names[8 : 8 + retired]),
            *((stock.library.rollback, (name, 1)) for name in names[:rolled]),
        ]
        order = numpy_generator(SEED, "changes").permutation(len(changes))
        for done, index in enumerate(order):
            wait_for_share(crowd, 0.1 + 0.7 * done / len(changes))
            change, arguments = changes[index]
            change(*arguments)
        append_note(chronicle, crowd, f"{len(changes)} changes, last seen after "
             f"{wait_for_generation(crowd, stock):.1f} s")  # fmt: skip
        wait_for_share(crowd, 1.0)
    check_responses(crowd, stock, chronicle)
    generations = {told.body["generation"] for told in crowd.responses if told.status == 200}
    chronicle.append(f"{len(generations)} generations seen, memory for 4 adapters of many")
    assert len(generations) > 3


def test_blobs_rot(stock, durable_env, chronicle, tmp_path):
    store = open_store(stock.uri)
    stock.publish(_ADAPTERS, seed=2)
    rotten = stock.nearest()[:2]
    for name in rotten:
        stock.library.rollback(name, 1)
    with (
        EndpointProcess(stock, tmp_path / "served", durable_env.endpoint.environment) as endpoint,
        LoadGenerator(endpoint, stock) as crowd,
    ):
        wait_for_share(crowd, 0.2)
        # Version 2 of these was never fetched, so it has to be now.
        sound = {}
        for name, rot in zip(rotten, (_cut, _same_size), strict=True):
            key = _weights_blob(stock, name, version=2)
            sound[key] = store.get(key)
            store.put(key, rot(sound[key]))
            stock.library.rollback(name, 2)
            append_note(
                chronicle,
                crowd,
                f"{name} points to a version whose weights are spoilt ({rot.__name__})",
            )
        wait_for_share(crowd, 0.5)
        for key, data in sound.items():
            store.put(key, data)
        append_note(chronicle, crowd, "both are restored")
        wait_for_share(crowd, 1.0)
    check_responses(crowd, stock, chronicle)
    answered = [told for told in crowd.responses if told.status == 200]
    skipped = {(s["name"], s["reason"]) for told in answered for s in told.body["skipped"]}
    chronicle.append(f"reported: {sorted(skipped)}")
    assert {name for name, _ in skipped} == set(rotten)
    used = {(a["name"], a["version"]) for told in answered[-500:] for a in told.body["adapters"]}
    chronicle.append(f"back in service: {sorted(set(used) & {(name, 2) for name in rotten})}")


def _weights_blob(stock, name, *, version):
    record = read_record(open_store(stock.uri), stock.library.entry(name, version))
    return blob_key(record.files["adapter_model.safetensors"].sha256)


def _cut(data):
    return data[: len(data) // 2]


def _same_size(data):
    return data[:-8] + bytes(byte ^ 1 for byte in data[-8:])


@full_suite_only
def test_memory_stays_where_it_was(stock, durable_env, chronicle, tmp_path):
    """Mixes rotate from request to request; what is kept of them must not pile up."""
    first, last = 500, 10_000
    with (
        EndpointProcess(stock, tmp_path / "served", durable_env.endpoint.environment) as endpoint,
        LoadGenerator(endpoint, stock) as crowd,
    ):
        sizes = []
        for count in (first, last):
            while len(crowd.responses) < count:
                time.sleep(0.05)
            sizes.append(endpoint.memory_bytes())
    check_responses(crowd, stock, chronicle)
    growth = sizes[1] / sizes[0] - 1
    chronicle.append(f"{sizes[0] / 1e6:.0f} MB after {first}, {100 * growth:+.1f} % after {last}")
    assert growth < 0.05
