"""Both clients with the real API over a local engine with the tiny models."""

import asyncio
import base64
import io

import httpx2
import numpy as np
import pytest
from PIL import Image

from loraseg.backbones.clip import load_clip
from loraseg.client import AsyncClient, Client
from loraseg.errors import DatasetError, ServiceError
from loraseg.inference.config import SegmenterConfig
from loraseg.inference.loading import load_models
from loraseg.inference.selection import AdaptiveSettings
from loraseg.segment.open_vocabulary.base import load_base
from tests.unit.client.local_endpoint import serve_endpoint, write_tokens
from tests.unit.client.sample_response import sample_response
from tests.unit.tiny import CLASSES, DOMAINS, domain_images, publish, write_models

K, TEMPERATURE = 2, 0.3


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
    with serve_endpoint(models, library, tokens=tokens, k=K, temperature=TEMPERATURE) as url:
        yield url


@pytest.fixture
def client(url):
    with Client(url, "admin") as client:
        yield client


@pytest.fixture(scope="module")
def offline(models, library):
    loaded = load_models(SegmenterConfig(base=models[0], encoder=models[1]), library)

    def segment(image, mode="fused", **options):
        settings = AdaptiveSettings(k=K, temperature=TEMPERATURE, mode=mode)
        [result] = loaded.segmenter(settings).segment([image], CLASSES, **options)
        return result

    return segment


def images():
    return [domain_images(name, 1)[0] for name in DOMAINS]


@pytest.mark.parametrize("mode", ["fused", "uniform", "base"])
def test_label_map_and_explanation_equal_the_offline_ones(client, offline, mode):
    for image in images():
        reply = client.segment(image, CLASSES, mode=mode, maps=["confidence", "entropy"])
        expected = offline(image, mode, maps=("confidence", "entropy"))
        assert (reply.label_map == expected.label_map).all()
        # The maps of the reply have 8 bits.
        assert np.abs(reply.confidence - expected.confidence).max() <= 0.5 / 255 + 1e-6
        assert np.abs(reply.entropy - expected.entropy).max() <= 0.5 / 255 + 1e-6
        why = expected.explanation
        assert (reply.mode, reply.base, reply.mix) == (mode, why.base, why.mix)
        assert [used.digest for used in reply.adapters] == [used.digest for used in why.adapters]
        for used, known in zip(reply.adapters, why.adapters, strict=True):
            assert used.weight == pytest.approx(known.weight, abs=1e-12)
            assert used.distance == (
                None if known.distance is None else pytest.approx(known.distance)
            )


def test_a_response_has_all_requested_members(client):
    reply = client.segment(images()[0], CLASSES, library="main", top_k=1, timeout_s=30.0)
    assert reply.class_names == CLASSES
    assert reply.palette.shape == (3, 3)
    assert reply.palette.dtype == np.uint8
    assert (reply.confidence, reply.entropy) == (None, None)
    assert (reply.library, reply.generation, reply.tiles) == ("main", 4, 1)
    assert (len(reply.adapters), reply.fallback, reply.skipped) == (1, None, ())
    assert reply.timing_ms["total"] >= reply.timing_ms["segment"] > 0
    assert reply.request_id


def test_the_sample_response_of_other_tests_has_the_keys_of_a_real_reply(url):
    buffer = io.BytesIO()
    Image.fromarray(images()[0]).save(buffer, format="PNG")
    body = httpx2.post(
        f"{url}/v1/segment",
        params={"classes": ",".join(CLASSES)},
        content=buffer.getvalue(),
        headers={"Authorization": "Bearer worker", "Content-Type": "image/png"},
    ).json()
    assert set(body) == set(sample_response())
    assert set(body["adapters"][0]) == set(sample_response()["adapters"][0])
    assert all(
        type(body[key]) is type(value)
        for key, value in sample_response().items()
        if value is not None
    )


def test_adapters_can_be_selected_and_excluded(client):
    image = images()[0]
    only = client.segment(image, CLASSES, adapters=["night", "fog"])
    assert {used.name for used in only.adapters} == {"night", "fog"}
    without = client.segment(image, CLASSES, adapters=["-day", "-fog"])
    assert {used.name for used in without.adapters} == {"night", "dusk"}
    with pytest.raises(ServiceError, match="mars") as caught:
        client.segment(image, CLASSES, adapters=["mars"])
    assert caught.value.code == "no_such_adapter"


def test_files_give_the_results_of_arrays(client, tmp_path):
    image = images()[1]
    path = tmp_path / "fog.png"
    Image.fromarray(image).save(path)
    expected = client.segment(image, CLASSES).label_map
    for same in (path, str(path), path.read_bytes()):
        assert (client.segment(same, CLASSES).label_map == expected).all()


def test_exif_orientation_is_applied(client, tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(images()[0]).save(path, exif=exif)
    assert client.segment(path, CLASSES).label_map.shape == (24, 20)


def test_tiles(client, offline):
    image = np.tile(images()[0], (3, 3, 1))
    for tiling in ("always", "never", "auto"):
        reply = client.segment(image, CLASSES, tiling=tiling)
        expected = offline(image, tiling=tiling)
        assert reply.tiles == expected.tiles
        assert (reply.label_map == expected.label_map).all()


def test_a_batch_gives_what_single_calls_give(client, tmp_path):
    (tmp_path / "cut.png").write_bytes(sample_png()[:-30])
    (tmp_path / "no.png").write_bytes(b"no image")
    batch = [*images(), tmp_path / "cut.png", *images(), tmp_path / "no.png"] * 2
    found = dict(client.segment_batch(batch, CLASSES, maps=["confidence"]))
    assert sorted(found) == list(range(20))
    singly = [client.segment(image, CLASSES, maps=["confidence"]) for image in images()]
    for index, outcome in found.items():
        if index % 10 == 4:
            assert isinstance(outcome, ServiceError)
            assert outcome.code == "bad_image"
        elif index % 10 == 9:
            assert isinstance(outcome, DatasetError)
        else:
            expected = singly[index % 10 if index % 10 < 4 else index % 10 - 5]
            assert outcome.mix == expected.mix
            assert agreement(outcome, expected) > 0.98


def test_many_calls_at_once(url):
    async def run():
        async with AsyncClient(url, "worker") as client:
            together = [client.segment(image, CLASSES) for image in images() * 3]
            return await asyncio.gather(*together), [
                await client.segment(i, CLASSES) for i in images()
            ]

    together, singly = asyncio.run(run())
    for index, reply in enumerate(together):
        assert reply.mix == singly[index % 4].mix
        assert agreement(reply, singly[index % 4]) > 0.98


def test_libraries_and_adapters(client):
    adapters = client.adapters("main")
    assert [adapter.name for adapter in adapters] == sorted(DOMAINS)
    assert adapters[0].classes == CLASSES
    assert adapters[0].unavailable is None
    card = client.adapter("fog")
    assert (card["name"], card["digest"]) == ("fog", adapters[2].digest)
    state = client.library()
    assert (state.library, state.generation, state.adapters, state.misfits) == ("main", 4, 4, 0)
    assert state.checked_s < 60
    assert client.refresh("main").generation == 4
    assert client.base()["settings"] == {"top_k": K, "temperature": TEMPERATURE}
    assert client.is_ready()


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda client: client.segment(images()[0], ["car", "Car"]), "invalid"),
        (lambda client: client.segment(images()[0], []), "invalid"),
        (lambda client: client.segment(images()[0], CLASSES, top_k=0), "invalid"),
        (lambda client: client.segment(images()[0], CLASSES, library="x"), "no_such_library"),
        (lambda client: list(client.segment_batch(images(), [])), "invalid"),
        (lambda client: client.segment(sample_png()[:-30], CLASSES), "bad_image"),
        (lambda client: client.adapter("mars"), "no_such_adapter"),
        (lambda client: client.adapter("../library"), "not_found"),
        (lambda client: client.library("x"), "no_such_library"),
        (lambda client: client.segment(images()[0], CLASSES, timeout_s=0.001), "deadline"),
    ],
)
def test_errors_keep_their_code(client, call, code):
    with pytest.raises(ServiceError, match=r"\w") as caught:
        call(client)
    assert caught.value.code == code


def test_tokens(url):
    with Client(url) as client:
        assert client.is_ready()
        with pytest.raises(ServiceError, match=r"\w") as caught:
            client.segment(images()[0], CLASSES)
        assert caught.value.code == "unauthorized"
    with Client(url, "worker") as client, pytest.raises(ServiceError, match=r"\w") as caught:
        client.refresh()
    assert caught.value.code == "forbidden"


def agreement(reply, other):
    """Return the share of equal pixels. Rounding depends on the batch, and the saturated scores of
    the random model have ties."""
    return (reply.label_map == other.label_map).mean()


def sample_png():
    return base64.b64decode(sample_response()["segmentation_mask"])
