"""``loraseg doctor --endpoint`` on working, TLS and broken endpoints."""

import subprocess

import pytest

from loraseg.backbones.clip import load_clip
from loraseg.cli import main
from loraseg.client import Client
from loraseg.client.health import check_endpoint
from loraseg.errors import ServiceError
from loraseg.segment.open_vocabulary.base import load_base
from tests.unit.client.local_endpoint import serve_endpoint, write_tokens
from tests.unit.client.scripted_server import ScriptedServer, answer, problem, silence
from tests.unit.tiny import publish, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def library(models, tmp_path):
    publish(tmp_path / "library", load_base(models[0]), load_clip(models[1]), names=("day", "fog"))
    return str(tmp_path / "library")


@pytest.fixture
def certificate(tmp_path):
    """A self-signed certificate for 127.0.0.1, valid for 30 days."""
    files = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    where = ["-out", files[0], "-keyout", files[1]]
    subprocess.run([*command, *names, *where], check=True, capture_output=True)
    return files


def by_name(checks):
    return {check.name.split(" http")[0]: (check.ok, check.detail) for check in checks}


def test_a_working_endpoint(models, library, tmp_path, capsys):
    (tmp_path / "token").write_text("worker")
    tokens = write_tokens(tmp_path / "tokens.yaml")
    with serve_endpoint(models, library, tokens=tokens) as url:
        found = by_name(check_endpoint(url, "worker"))
        assert main(["doctor", "--endpoint", url, "--token-file", str(tmp_path / "token")]) == 0
        without_token = by_name(check_endpoint(url))
    assert all(ok for ok, _ in found.values()), found
    assert set(found) == {
        *("endpoint", "TLS", "clock", "ready", "base", "library main", "segmentation")
    }
    assert "generation 2" in found["library main"][1]
    assert "2 adapters" in found["library main"][1]
    assert "64 x 64 pixels in" in found["segmentation"][1]
    assert "library main" in capsys.readouterr().out
    assert not without_token["base"][0]
    assert "--token-file" in without_token["base"][1]


def test_adapters_out_of_service_are_listed(models, library, tmp_path, monkeypatch):
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path / "cache"))
    for blob in (tmp_path / "library" / "blobs").rglob("sha256/*/*"):
        blob.write_bytes(b"rust")
    with serve_endpoint(models, library) as url:
        list(check_endpoint(url))  # its segmentation loads the damaged files
        found = by_name(check_endpoint(url))
    adapters = [result for name, result in found.items() if name.startswith("library main, ")]
    assert adapters
    assert all(not ok and "out of service" in detail for ok, detail in adapters)


def test_tls(models, library, certificate, monkeypatch):
    with serve_endpoint(models, library, tls=certificate) as url:
        with (
            Client(url, "worker", retries=9) as client,
            pytest.raises(ServiceError, match="self-signed certificate") as caught,
        ):
            client.base()
        assert caught.value.code == "unreachable"
        monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
        found = by_name(check_endpoint(url))
    ok, detail = found["TLS"]
    assert ok
    assert detail.startswith("TLSv1.3, certificate expires in 30 days")
    assert found["segmentation"][0]


def test_an_endpoint_that_is_not_ready(capsys):
    starting = problem(503, "not_ready", "Waiting for the models.", Retry_After="0")
    script = [answer(200, {}, Date="Wed, 21 Oct 2015 07:28:00 GMT"), starting]
    with ScriptedServer(script).running() as server:
        assert main(["doctor", "--endpoint", server.url]) == 1
    output = capsys.readouterr().out
    assert "Waiting for the models." in output
    assert "behind this machine's" in output
    assert "failed: clock, ready, base" in output


@pytest.mark.parametrize(
    ("handler", "detail"),
    [(answer(404, b"<html>"), "is this the URL"), (silence, "no response in")],
)
def test_a_server_that_is_not_an_endpoint(handler, detail, monkeypatch):
    monkeypatch.setattr("loraseg.client.health._TIMEOUT_S", 1.0)
    with ScriptedServer([handler]).running() as server:
        [check] = check_endpoint(server.url)
    assert not check.ok
    assert detail in check.detail


def test_a_token_file_needs_an_endpoint(capsys):
    assert main(["doctor", "--token-file", "x"]) == 2
    assert "--token-file: requires --endpoint" in capsys.readouterr().err
