"""``loraseg serve`` as a process, with the tiny models."""

import contextlib
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from loraseg.backbones.clip import load_clip
from loraseg.cli import main
from loraseg.client import Client
from loraseg.inference.config import SegmenterConfig
from loraseg.inference.loading import load_models
from loraseg.inference.selection import AdaptiveSettings
from loraseg.segment.open_vocabulary.base import load_base
from tests.unit.tiny import CLASSES, domain_images, publish, write_models

EXIT_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def library(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    publish(folder, load_base(models[0]), load_clip(models[1]))
    return str(folder)


@contextlib.contextmanager
def serve(models, library, *settings):
    """Run the command; yield the process and its URL."""
    code = "import sys; from loraseg.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", f"libraries.main={library}", "port=0"]
    command += [f"base={models[0]}", f"encoder={models[1]}", *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("ready: http://127.0.0.1:"), line
            yield process, line.removeprefix("ready: ").strip()
        finally:
            process.kill()


def test_serves_and_finishes_running_requests_after_sigterm(models, library):
    image = domain_images("night", 1)[0]
    loaded = load_models(SegmenterConfig(base=models[0], encoder=models[1]), library)
    settings = AdaptiveSettings(k=2, temperature=0.3)
    [expected] = loaded.segmenter(settings).segment([image], CLASSES)
    responses = []

    def segment_large(client):
        responses.append(client.segment(np.tile(image, (20, 20, 1)), CLASSES, tiling="always"))

    with (
        serve(models, library, "k=2", "temperature=0.3") as (process, url),
        Client(url) as client,
    ):
        response = client.segment(image, CLASSES)
        assert np.array_equal(response.label_map, expected.label_map)
        assert response.mix == expected.explanation.mix
        running = threading.Thread(target=segment_large, args=(client,))
        running.start()
        time.sleep(0.5)  # so that the request arrives before the signal
        process.terminate()
        running.join(timeout=EXIT_TIMEOUT_S)
        assert process.wait(timeout=EXIT_TIMEOUT_S) == 0
        assert [large.label_map.shape for large in responses] == [(400, 480)]
        assert not client.is_ready()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7"])
def test_other_interfaces_require_tokens(library, host, capsys):
    assert main(["serve", f"libraries.main={library}", f"host='{host}'"]) == 2
    assert "without a token" in capsys.readouterr().err


def test_a_port_in_use_is_an_error(library, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert main(["serve", f"libraries.main={library}", f"port={port}"]) == 2
    assert f"127.0.0.1 port {port}: Address already in use" in capsys.readouterr().err


def test_settings_are_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["serve"]) == 2
    assert "libraries: expected at least one" in capsys.readouterr().err
    assert main(["serve", "libraries.main=x", "bach=2"]) == 2
    assert "did you mean 'batch'" in capsys.readouterr().err
