"""``loraseg doctor --endpoint``: what it finds at sound, secured and broken endpoints."""

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
    """A certificate for 127.0.0.1 that nobody else has signed, for thirty days."""
    files = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    where = ["-out", files[0], "-keyout", files[1]]
    subprocess.run([*command, *names, *where], check=True, capture_output=True)
    return files


def states(findings):
    return {
        finding.what.split(" http")[0]: (finding.is_well, finding.state) for finding in findings
    }


def test_a_sound_endpoint(models, library, tmp_path, capsys):
    (tmp_path / "token").write_text("worker")
    tokens = write_tokens(tmp_path / "tokens.yaml")
    with serve_endpoint(models, library, tokens=tokens) as url:
        found = states(check_endpoint(url, "worker"))
        assert main(["doctor", "--endpoint", url, "--token-file", str(tmp_path / "token")]) == 0
        lacking = states(check_endpoint(url))
    assert all(is_well for is_well, _ in found.values()), found
    assert set(found) == {
        *("endpoint", "TLS", "clock", "ready", "base", "library main", "segmentation")
    }
    assert "generation 2" in found["library main"][1]
    assert "2 adapters" in found["library main"][1]
    assert "64 x 64 pixels in" in found["segmentation"][1]
    assert "library main" in capsys.readouterr().out
    assert not lacking["base"][0]
    assert "--token-file" in lacking["base"][1]


def test_adapters_out_of_service_are_told(models, library, tmp_path, monkeypatch):
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path / "cache"))
    for blob in (tmp_path / "library" / "blobs").rglob("sha256/*/*"):
        blob.write_bytes(b"rust")
    with serve_endpoint(models, library) as url:
        list(check_endpoint(url))  # its segmentation meets the damage
        found = states(check_endpoint(url))
    lacking = [state for what, state in found.items() if what.startswith("library main, ")]
    assert lacking
    assert all(not is_well and "out of service" in words for is_well, words in lacking)


def test_tls(models, library, certificate, monkeypatch):
    with serve_endpoint(models, library, tls=certificate) as url:
        with (
            Client(url, "worker", retries=9) as client,
            pytest.raises(ServiceError, match="self-signed certificate") as caught,
        ):
            client.base()
        assert caught.value.code == "unreachable"
        monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
        found = states(check_endpoint(url))
    is_well, state = found["TLS"]
    assert is_well
    assert state.startswith("TLSv1.3, certificate for 30 more days")
    assert found["segmentation"][0]


def test_an_endpoint_that_is_not_ready(capsys):
    starting = problem(503, "not_ready", "Waiting for the models.", Retry_After="0")
    script = [answer(200, {}, Date="Wed, 21 Oct 2015 07:28:00 GMT"), starting]
    with ScriptedServer(script).running() as server:
        assert main(["doctor", "--endpoint", server.url]) == 1
    told = capsys.readouterr().out
    assert "Waiting for the models." in told
    assert "behind this machine's" in told
    assert "failed: clock, ready, base" in told


@pytest.mark.parametrize(
    ("act", "state"),
    [(answer(404, b"<html>"), "is this the URL"), (silence, "no answer in")],
)
def test_something_else_answers(act, state, monkeypatch):
    monkeypatch.setattr("loraseg.client.health._TIMEOUT_S", 1.0)
    with ScriptedServer([act]).running() as server:
        [finding] = check_endpoint(server.url)
    assert not finding.ok
    assert state in finding.detail


def test_a_token_file_needs_an_endpoint(capsys):
    assert main(["doctor", "--token-file", "x"]) == 2
    assert "--token-file: requires --endpoint" in capsys.readouterr().err
