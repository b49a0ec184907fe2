"""The endpoint on Ray against the engine of one process, and what Ray adds to it."""

import asyncio
import base64
import io
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from ray import serve

from loraseg.backbones.clip import load_clip
from loraseg.segment.base import load_base
from loraseg.serving.build import build_local
from tests.unit.tiny import DOMAINS, domain_images, publish

pytestmark = pytest.mark.ray

CLASSES = ("road", "car", "sky")
SEGMENT = f"/v1/segment?classes={','.join(CLASSES)}"


@pytest.fixture(scope="module")
def images():
    """Two images of each domain; adapters differ from image to image."""
    return [image for name in DOMAINS for image in domain_images(name, 2)]


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def label_map(reply):
    data = base64.b64decode(reply["segmentation_mask"])
    return np.asarray(Image.open(io.BytesIO(data)))


def together(service, images, path=SEGMENT):
    """Send all images at once; return the responses."""

    async def send():
        async with service.async_client() as client:
            posts = [
                client.post(path, content=png(image), headers={"Content-Type": "image/png"})
                for image in images
            ]
            return await asyncio.gather(*posts)

    return asyncio.run(send())


def told_alike(one, other):
    """Compare what was used and why, whatever the order of arrival."""
    keys = ("mode", "base", "generation", "fallback", "adapters", "mix")
    return all(one[key] == other[key] for key in keys)


def test_answers_are_those_of_one_process_alone_and_in_a_mixed_crowd(service, images):
    alone = [together(service, [image])[0].json() for image in images]
    crowd = [response.json() for response in together(service, images)]
    with build_local(service.config) as engine:
        assert engine.wait_until_ready(30)
        local = asyncio.run(_locally(engine, service.config, images))
    assert len({reply["mix"] for reply in alone}) > 1
    for one, many, outcome in zip(alone, crowd, local, strict=True):
        assert told_alike(one, many)
        assert one["mix"] == outcome.result.explanation.mix
        np.testing.assert_array_equal(label_map(one), outcome.result.label_map)
        np.testing.assert_array_equal(label_map(many), outcome.result.label_map)


async def _locally(engine, config, images):
    from loraseg.segment.choice import Wish
    from loraseg.serving.orders import Order
    from loraseg.serving.views import default_settings

    wish = Wish(settings=default_settings(config))
    return [
        await engine.segment(
            Order(
                request_id="local",
                image=image,
                classes=CLASSES,
                library="main",
                wish=wish,
                deadline=time.time() + 30,
            )
        )
        for image in images
    ]


def test_a_crowd_goes_through_the_model_together(service, images):
    replies = [response.json() for response in together(service, images)]
    assert max(reply["batch"] for reply in replies) > 1


def test_large_images_travel_through_the_object_store(service):
    image = np.tile(domain_images(next(iter(DOMAINS)), 1)[0], (12, 12, 1))
    [whole] = together(service, [image], f"{SEGMENT}&tiling=never")
    [tiled] = together(service, [image], f"{SEGMENT}&tiling=always")
    assert whole.status_code == tiled.status_code == 200, (whole.text, tiled.text)
    assert label_map(whole.json()).shape == label_map(tiled.json()).shape == image.shape[:2]
    assert tiled.json()["tiles"] > 1


def test_the_request_id_is_the_clients_or_a_plain_one(service):
    with service.client() as client:
        given = client.get("/healthz", headers={"X-Request-ID": "mine-1"})
        refused = client.get("/nothing", headers={"X-Request-ID": "<script>"})
    assert given.headers.get_list("x-request-id") == ["mine-1"]
    assert refused.headers.get_list("x-request-id") == [refused.json()["request_id"]]
    assert "<" not in refused.text


def test_a_deadline_that_cannot_be_kept_is_told(service, images):
    [response] = together(service, images[:1], f"{SEGMENT}&timeout_s=0.001")
    assert (response.status_code, response.json()["code"]) == (504, "deadline")


def test_catalog_card_base_and_refresh_come_from_the_replicas(service):
    with service.client() as client:
        listed = client.get("/v1/adapters").json()["adapters"]
        card = client.get(f"/v1/adapters/{listed[0]['name']}").json()
        base = client.get("/v1/base").json()
        absent = client.get("/v1/adapters/no-such")
    assert {entry["name"] for entry in listed} == set(DOMAINS)
    assert card["digest"] == listed[0]["digest"]
    assert base["digest"] == load_base(service.config.base).digest
    assert base["encoder"]["id"]
    assert (absent.status_code, absent.json()["code"]) == (404, "no_such_adapter")


def test_a_killed_segmenter_costs_no_request(service, images):
    """A wave of requests while the only replica dies: all are answered by the next one."""

    async def wave():
        async with service.async_client() as client:
            posts = [
                asyncio.create_task(
                    client.post(SEGMENT, content=png(images[n % len(images)]), timeout=60)
                )
                for n in range(16)
            ]
            await asyncio.sleep(0.05)
            for process in service.replicas("Segmenter"):
                process.kill()
            return await asyncio.gather(*posts)

    expected = [label_map(r.json()) for r in together(service, images)]
    for n, response in enumerate(asyncio.run(wave())):
        assert response.status_code == 200, response.text
        np.testing.assert_array_equal(label_map(response.json()), expected[n % len(images)])
    service.wait_ready()


def test_a_killed_gateway_tells_its_clients_to_ask_again(service, images):
    async def lose():
        async with service.async_client() as client:

            async def slow_body():
                yield png(images[0])[:50]
                await asyncio.sleep(1.0)
                for process in service.replicas("Gateway"):
                    process.kill()
                yield png(images[0])[50:]

            return await client.post(SEGMENT, content=slow_body())

    response = asyncio.run(lose())
    assert (response.status_code, response.json()["code"]) == (503, "replica_lost")
    assert int(response.headers["retry-after"]) >= 1
    service.wait_ready()
    assert together(service, images[:1])[0].status_code == 200


def test_what_is_published_and_rolled_back_is_served_within_seconds(
    start, tmp_path, models, images
):
    folder, base, encoder = tmp_path / "library", load_base(models[0]), load_clip(models[1])
    names = list(DOMAINS)
    publish(folder, base, encoder, names[:2])
    with start({"live": folder}) as service, service.client() as client:

        def versions():
            listed = client.get("/v1/adapters").json()["adapters"]
            return {entry["name"]: entry["version"] for entry in listed}

        assert versions() == {names[0]: 1, names[1]: 1}
        library = publish(folder, base, encoder, names[2:])
        eventually(lambda: versions() == dict.fromkeys(names, 1))
        files, card = library.load(names[1])
        library.publish(names[0], files, replace(card, name=names[0]))
        eventually(lambda: versions()[names[0]] == 2)
        library.rollback(names[0], 1)
        eventually(lambda: versions()[names[0]] == 1)
        for response in together(service, images):
            for used in response.json()["adapters"]:
                entry = library.entry(used["name"])
                assert (used["version"], used["digest"]) == (entry.version, entry.digest)


def test_beyond_its_queue_the_service_says_when_to_come_back(start, library, images):
    from loraseg.serving.config import Limits

    with start({"main": library}, batch=1, limits=Limits(queued=1)) as service:
        responses = together(service, images * 4)
    assert {response.status_code for response in responses} == {200, 503}
    for response in responses:
        if response.status_code == 503:
            assert response.json()["code"] == "overloaded"
            assert int(response.headers["retry-after"]) >= 1


def test_a_draining_gateway_finishes_what_it_has_and_takes_nothing_new(start, library, images):
    with start({"main": library}) as service:
        gateway = serve.get_deployment_handle("Gateway", service.name)
        image = np.tile(images[0], (20, 20, 1))

        async def drain():
            async with service.async_client() as client:
                path = f"{SEGMENT}&tiling=always"
                running = asyncio.create_task(client.post(path, content=png(image)))
                await asyncio.sleep(0.3)
                await gateway.broadcast("drain").results_async()
                refused = await client.get("/v1/adapters")
                return await running, refused

        running, refused = asyncio.run(drain())
        assert running.status_code == 200
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        assert gateway.broadcast("drain").results() == [0]


def test_metrics_are_exported_and_logs_are_json_with_the_request_id(service, images):
    with service.client() as client:
        client.post(
            SEGMENT,
            content=png(images[0]),
            headers={"Content-Type": "image/png", "X-Request-ID": "find-me"},
        )
    [node] = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    import httpx2 as httpx

    wanted = (
        "ray_loraseg_requests_total",
        "ray_loraseg_stage_seconds_bucket",
        "ray_loraseg_adapters_resident",
        "ray_loraseg_catalog_generation",
        "ray_loraseg_catalog_age_seconds",
        "ray_loraseg_batch_images_bucket",
        "ray_loraseg_images_total",
    )
    eventually(lambda: all(name in httpx.get(url).text for name in wanted), deadline_s=60)
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = list((session / "logs" / "serve").glob(f"replica_{service.name}_Gateway_*.log"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    [told] = [line for line in lines if line.get("request_id") == "find-me" and "route" in line]
    assert told["status"] == 200


def eventually(condition, deadline_s=20.0):
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
