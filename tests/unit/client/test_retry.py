import ssl

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraseg.client.retry import RetryableError, connection_error, parse_retry_after, retry_delay_s
from loraseg.errors import ServiceError


def busy(wait_s=None):
    return RetryableError("overloaded", "busy", retry_after_s=wait_s)


def test_only_temporary_errors_are_retried():
    options = {"retries": 4, "remaining_s": 60.0, "jitter": 0.5}
    assert retry_delay_s(0, busy(), **options) == 0.125
    assert retry_delay_s(0, ServiceError("invalid", "top_k"), **options) is None


def test_delays_double_up_to_a_limit_and_are_jittered():
    options = {"retries": 99, "remaining_s": 60.0}
    assert [retry_delay_s(n, busy(), jitter=1.0, **options) for n in range(7)] == [
        *(0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0)
    ]
    assert retry_delay_s(50, busy(), jitter=0.25, **options) == 2.0


def test_no_retry_after_the_last_attempt_or_the_deadline():
    assert retry_delay_s(4, busy(), retries=4, remaining_s=60.0, jitter=0.5) is None
    assert retry_delay_s(0, busy(), retries=0, remaining_s=60.0, jitter=0.5) is None
    assert retry_delay_s(3, busy(), retries=4, remaining_s=0.9, jitter=0.5) is None


@given(st.integers(0, 30), st.floats(0, 100), st.floats(0, 100), st.floats(0, 1, exclude_max=True))
def test_the_delay_is_at_least_retry_after(attempt, wait_s, left_s, jitter):
    delay_s = retry_delay_s(attempt, busy(wait_s), retries=99, remaining_s=left_s, jitter=jitter)
    if delay_s is None:
        assert wait_s + 8.0 >= left_s
    else:
        assert wait_s <= delay_s < left_s


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        *((None, None), ("", None), ("0", 0.0), ("3", 3.0), (" 12 ", 12.0), ("99999", 3600.0)),
        *(("-1", None), ("1.5", None), ("1e3", None), ("9" * 5000, None), ("\u0663", None)),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
    ],
)
def test_parse_retry_after(header, expected):
    assert parse_retry_after(header) == expected


def test_broken_connections_are_retryable_invalid_certificates_are_not():
    broken = connection_error(httpx2.ReadError("reset"), "http://x")
    assert isinstance(broken, RetryableError)
    assert (broken.code, str(broken)) == ("unreachable", "http://x: reset")
    error = httpx2.ConnectError("tls")
    error.__cause__ = ssl.SSLCertVerificationError(1, "self-signed certificate")
    error.__cause__.verify_message = "self-signed certificate"
    permanent = connection_error(error, "https://x")
    assert not isinstance(permanent, RetryableError)
    assert str(permanent) == "https://x: self-signed certificate"
