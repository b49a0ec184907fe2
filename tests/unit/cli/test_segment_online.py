"""``loraseg segment --endpoint`` and ``loraseg segment --library`` write the same files."""

import json

import numpy as np
import pytest
from PIL import Image

from loraseg.backbones.clip import load_clip
from loraseg.cli import main
from loraseg.data.masks import read_mask
from loraseg.segment.open_vocabulary.base import load_base
from tests.unit.client.local_endpoint import serve_endpoint, write_tokens
from tests.unit.tiny import domain_images, publish, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def library(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    publish(folder, load_base(models[0]), load_clip(models[1]))
    return str(folder)


@pytest.fixture(scope="module")
def url(models, library, tmp_path_factory):
    tokens = write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.yaml")
    # One image per forward pass: in a batch, sums round differently.
    with serve_endpoint(models, library, tokens=tokens, batch=1) as url:
        yield url


@pytest.fixture
def photos(tmp_path):
    """Images of several sizes: one JPEG with an EXIF rotation, one large enough for tiles."""
    pictures = {name: domain_images(name, 1)[0] for name in ("day", "fog", "dusk")}
    pictures["day"] = np.tile(pictures["day"], (2, 2, 1))
    paths = []
    for name, picture in pictures.items():
        path = tmp_path / (f"{name}.jpg" if name == "dusk" else f"{name}.png")
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(picture).save(path, **({"exif": exif} if name == "dusk" else {}))
        paths.append(str(path))
    return paths


@pytest.fixture
def offline(models, library, photos, tmp_path):
    def run(*more, images=photos):
        options = ["--base", models[0], "--encoder", models[1], "--library", library]
        out = ["--out", str(tmp_path / "offline")]
        return main(["segment", *images, "--classes", "road, car, sky", *options, *out, *more])

    return run


@pytest.fixture
def online(url, photos, tmp_path):
    token = tmp_path / "token"
    token.write_text("worker\n")

    def run(*more, images=photos, url=url, token=token):
        named = ["--token-file", str(token)] if token else []
        out = ["--out", str(tmp_path / "online")]
        classes = ["--classes", "road, car, sky"]
        return main(["segment", *images, *classes, "--endpoint", url, *named, *out, *more])

    return run


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--mode", "uniform", "--maps", "entropy"),
        ("--mode", "base", "--tiling", "always"),
        ("--top-k", "1", "--temperature", "0.3", "--maps", "confidence, entropy"),
        ("--tiling", "never", "--maps", "confidence"),
    ],
)
def test_same_files_online_and_offline(offline, online, options, tmp_path, capsys):
    assert offline(*options) == 0
    spoken = capsys.readouterr().out.replace("offline", "online")
    assert online(*options) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(spoken.splitlines())
    written = sorted(path.name for path in (tmp_path / "offline").iterdir())
    assert written == sorted(path.name for path in (tmp_path / "online").iterdir())
    maps = [name for name in ("confidence", "entropy") if name in " ".join(options)]
    assert len(written) == 3 * (3 + len(maps))
    for name in written:
        ours, theirs = ((tmp_path / where / name).read_bytes() for where in ("online", "offline"))
        if not name.endswith(".json"):
            assert ours == theirs, name
            continue
        online_record, offline_record = json.loads(ours), json.loads(theirs)
        assert offline_record.items() <= online_record.items()
        assert online_record["library"] == "main"
        assert online_record["generation"] == (None if "base" in options else 4)


def test_maps_are_grey_images(offline, photos, tmp_path):
    assert offline("--maps", "confidence, entropy", images=photos[:1]) == 0
    names = {path.name for path in (tmp_path / "offline").iterdir()}
    assert {"day_confidence.png", "day_entropy.png"} < names
    assert read_mask(tmp_path / "offline" / "day_confidence.png").dtype == np.uint8


def test_a_broken_image_does_not_stop_the_others(online, photos, tmp_path, capsys):
    (tmp_path / "no.png").write_bytes(b"not an image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "fog.png").read_bytes()[:200])
    broken = [str(tmp_path / "no.png"), str(tmp_path / "cut.png")]
    assert online(images=[*broken, *photos]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert sorted(captured.err.splitlines()) == [
        f"error: {broken[1]}: the image is broken or cut off",
        f"error: {broken[0]}: not a PNG or JPEG image",
    ]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"token": None}, 2, "token"),
        ({"url": "127.0.0.1:8000"}, 2, "endpoint URL: got"),
        ({"url": "http://192.0.2.1"}, 2, "would be sent unencrypted"),
        ({"url": "http://127.0.0.1:1"}, 1, "127.0.0.1:1"),
    ],
)
def test_unusable_endpoints_and_tokens_are_reported(online, options, status, message, capsys):
    assert online(**options) == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--library", "elsewhere"), "library 'elsewhere'"),
        (("--sliding",), "--sliding: the endpoint decides"),
        (("--base", "miniature"), "--base: the endpoint decides"),
        (("--maps", "depth"), "--maps: got 'depth', expected confidence or entropy"),
        (("--top-k", "0"), "k: got 0"),
        (("--token-file", "absent"), "absent: cannot read the token"),
    ],
)
def test_usage_errors(online, options, message, capsys):
    assert online(*options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_a_token_without_an_endpoint(offline, capsys):
    assert offline("--token-file", "x") == 2
    assert "--token-file: requires --endpoint" in capsys.readouterr().err
