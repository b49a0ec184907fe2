import signal

import pytest

from loraseg.serving.config import ServiceConfig
from loraseg.serving.listen import ListenAddress, ServeConfig, StopSignal


@pytest.fixture
def restore_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_sets_the_stop_signal(restore_handlers, number):
    stop_signal = StopSignal()
    assert not stop_signal.wait(0.0)
    signal.raise_signal(number)
    assert stop_signal.wait(0.0)
    # A second signal ends the process.
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("example.org", "http://example.org:80"),
    ],
)
def test_url_of_an_address(host, url):
    assert ListenAddress(host, 80).url == url


def test_port_0_stands_for_a_free_port():
    address = ListenAddress("127.0.0.1", 0).with_free_port()
    assert address.port > 0
    with address.bind() as bound:
        assert bound.getsockname() == (address.host, address.port)


def test_service_settings_of_a_serve_config():
    options = {"libraries": {"main": "s3://bucket/adapters"}, "batch": 2, "tokens": "tokens.yaml"}
    assert ServeConfig(port=1, **options).service() == ServiceConfig(**options)
