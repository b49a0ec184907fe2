import pytest

from loraseg.client.endpoint import parse_endpoint, read_token
from loraseg.errors import ConfigError

TOKEN = "s3cr3t-s3cr3t"


@pytest.mark.parametrize(
    ("url", "is_encrypted", "is_loopback"),
    [
        ("https://segment.example.org", True, False),
        ("https://segment.example.org:8443/below/", True, False),
        ("http://127.0.0.1:8000", False, True),
        ("http://127.8.0.1", False, True),
        ("http://localhost:8000", False, True),
        ("http://[::1]:8000", False, True),
        ("http://192.168.0.7", False, False),
        ("http://localhost.example.org", False, False),
    ],
)
def test_encryption_and_loopback_of_urls(url, is_encrypted, is_loopback):
    endpoint = parse_endpoint(url, None, allow_insecure=False)
    assert (endpoint.is_encrypted, endpoint.is_loopback) == (is_encrypted, is_loopback)
    assert endpoint.url == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        *("", "example.org", "localhost:8000", "ftp://example.org", "file:///etc/passwd"),
        *("http://", "http://host:port", "http://host:0", "http://host:99999", "http://[::1"),
        *("http://host/?a=1", "http://host/#a", "http://ho st", "http://host\n"),
    ],
)
def test_invalid_urls_are_rejected(url):
    with pytest.raises(ConfigError, match=r"endpoint URL: got .*expected http\(s\)://host"):
        parse_endpoint(url, None, allow_insecure=False)


def test_a_password_in_a_url_is_rejected_and_not_repeated():
    with pytest.raises(ConfigError, match="user name or password") as caught:
        parse_endpoint(f"https://me:{TOKEN}@example.org", None, allow_insecure=False)
    assert TOKEN not in str(caught.value)


def test_a_token_is_sent_unencrypted_only_to_loopback_or_with_allow_insecure():
    for url in ("https://example.org", "http://127.0.0.1:8000", "http://localhost"):
        parse_endpoint(url, TOKEN, allow_insecure=False)
    with pytest.raises(ConfigError, match="would be sent unencrypted") as caught:
        parse_endpoint("http://example.org", TOKEN, allow_insecure=False)
    assert TOKEN not in str(caught.value)
    parse_endpoint("http://example.org", TOKEN, allow_insecure=True)


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "caf\u00e9", "x" * 5000])
def test_invalid_tokens_are_rejected_and_not_repeated(token):
    with pytest.raises(ConfigError, match="token: expected") as caught:
        parse_endpoint("https://example.org", token, allow_insecure=False)
    assert not token or token not in str(caught.value)


def test_a_token_is_read_from_a_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    assert read_token(path) == TOKEN
    for content, reason in ((b"", "expected 1 to"), (b"a b", "expected 1 to"), (b"\xff", "UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=reason):
            read_token(path)
    with pytest.raises(ConfigError, match="absent: cannot read the token"):
        read_token(tmp_path / "absent")
