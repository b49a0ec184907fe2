"""The endpoint on Ray: results equal those of the local engine; losses, metrics and logs."""

import asyncio
import json
import time
from pathlib import Path

import httpx2 as httpx
import numpy as np
import pytest
import ray

from loraseg.inference.request import SegmentRequest
from loraseg.inference.selection import AdapterQuery
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.serving.build import build_local_engine
from tests.integration.serving.endpoint_requests import (
    CLASSES,
    PNG,
    SEGMENT,
    label_map,
    png,
    post_concurrently,
    wait_until,
)
from tests.unit.tiny import DOMAINS, domain_images

pytestmark = pytest.mark.ray


def same_explanation(one, other):
    """Compare the parts of two replies that do not depend on timing."""
    keys = ("mode", "base", "generation", "fallback", "adapters", "mix")
    return all(one[key] == other[key] for key in keys)


def test_results_equal_the_local_engine_alone_and_concurrently(service, images):
    alone = [post_concurrently(service, [image])[0].json() for image in images]
    concurrent = [response.json() for response in post_concurrently(service, images)]
    with build_local_engine(service.config) as engine:
        assert engine.wait_until_ready(30.0)
        local = asyncio.run(segment_locally(engine, service.config, images))
    assert len({reply["mix"] for reply in alone}) > 1
    for one, many, expected in zip(alone, concurrent, local, strict=True):
        assert same_explanation(one, many)
        assert one["mix"] == expected.explanation.mix
        np.testing.assert_array_equal(label_map(one), expected.label_map)
        np.testing.assert_array_equal(label_map(many), expected.label_map)


async def segment_locally(engine, config, images):
    query = AdapterQuery(settings=config.adaptive_settings())
    return [
        await engine.segment(
            SegmentRequest(
                image=image,
                classes=CLASSES,
                library="main",
                query=query,
                deadline=time.time() + 30,
            )
        )
        for image in images
    ]


def test_concurrent_images_share_a_batch(service, images):
    replies = [response.json() for response in post_concurrently(service, images)]
    assert max(reply["batch"] for reply in replies) > 1


def test_images_of_a_batch_request_go_through_the_model_in_two_halves(service, images):
    files = [("images", (f"{n}.png", png(image), "image/png")) for n, image in enumerate(images)]

    def batch_sizes():
        with service.client() as client:
            fields = {"classes": ",".join(CLASSES)}
            response = client.post("/v1/segment/batch", files=files, data=fields)
        *lines, counts = map(json.loads, response.text.splitlines())
        assert counts == {"done": len(images), "failed": 0}
        return [line["batch"] for line in lines]

    half = service.config.batch // 2
    # On a busy machine a half may be split.
    wait_until(lambda: set(batch_sizes()) <= {half, 2 * half}, deadline_s=60)


def test_large_images_are_sent_through_the_object_store(service):
    image = np.tile(domain_images(next(iter(DOMAINS)), 1)[0], (12, 12, 1))
    [whole] = post_concurrently(service, [image], f"{SEGMENT}&tiling=never")
    [tiled] = post_concurrently(service, [image], f"{SEGMENT}&tiling=always")
    assert whole.status_code == tiled.status_code == 200, (whole.text, tiled.text)
    assert label_map(whole.json()).shape == label_map(tiled.json()).shape == image.shape[:2]
    assert tiled.json()["tiles"] > 1


def test_an_invalid_request_id_is_replaced(service):
    with service.client() as client:
        accepted = client.get("/healthz", headers={"X-Request-ID": "mine-1"})
        replaced = client.get("/nothing", headers={"X-Request-ID": "<script>"})
    assert accepted.headers.get_list("x-request-id") == ["mine-1"]
    assert replaced.headers.get_list("x-request-id") == [replaced.json()["request_id"]]
    assert "<" not in replaced.text


def test_a_missed_deadline_gives_504(service, images):
    [response] = post_concurrently(service, images[:1], f"{SEGMENT}&timeout_s=0.001")
    assert (response.status_code, response.json()["code"]) == (504, "deadline")


def test_catalog_card_and_base(service):
    with service.client() as client:
        listed = client.get("/v1/adapters").json()["adapters"]
        card = client.get(f"/v1/adapters/{listed[0]['name']}").json()
        base = client.get("/v1/base").json()
        unknown = client.get("/v1/adapters/no-such")
    assert {entry["name"] for entry in listed} == set(DOMAINS)
    assert card["digest"] == listed[0]["digest"]
    assert base["digest"] == load_base(service.config.base).digest
    assert base["encoder"]["id"]
    assert (unknown.status_code, unknown.json()["code"]) == (404, "no_such_adapter")


def test_a_killed_segmenter_loses_no_request(service, images):
    """The only replica is killed during 16 requests; the next replica completes all of them."""

    async def post_and_kill():
        async with service.async_client() as client:
            posts = [
                asyncio.create_task(
                    client.post(
                        SEGMENT, content=png(images[n % len(images)]), headers=PNG, timeout=60
                    )
                )
                for n in range(16)
            ]
            await asyncio.sleep(0.05)
            for process in service.replicas("Segmenter"):
                process.kill()
            return await asyncio.gather(*posts)

    expected = [label_map(r.json()) for r in post_concurrently(service, images)]
    for n, response in enumerate(asyncio.run(post_and_kill())):
        assert response.status_code == 200, response.text
        np.testing.assert_array_equal(label_map(response.json()), expected[n % len(images)])
    service.wait_ready()


def test_a_killed_gateway_gives_replica_lost_with_retry_after(service, images):
    async def post_and_kill():
        async with service.async_client() as client:

            async def slow_body():
                yield png(images[0])[:50]
                await asyncio.sleep(1.0)
                for process in service.replicas("Gateway"):
                    process.kill()
                yield png(images[0])[50:]

            return await client.post(SEGMENT, content=slow_body(), headers=PNG)

    response = asyncio.run(post_and_kill())
    assert (response.status_code, response.json()["code"]) == (503, "replica_lost")
    assert int(response.headers["retry-after"]) >= 1
    service.wait_ready()
    assert post_concurrently(service, images[:1])[0].status_code == 200


def test_metrics_are_exported_and_logs_have_the_request_id(service, images):
    with service.client() as client:
        client.post(
            SEGMENT,
            content=png(images[0]),
            headers={**PNG, "X-Request-ID": "find-me"},
        )
    [node] = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    names = (
        "ray_loraseg_requests_total",
        "ray_loraseg_stage_seconds_bucket",
        "ray_loraseg_adapters_resident",
        "ray_loraseg_catalog_generation",
        "ray_loraseg_catalog_age_seconds",
        "ray_loraseg_batch_images_bucket",
        "ray_loraseg_images_total",
    )
    wait_until(lambda: all(name in httpx.get(url).text for name in names), deadline_s=60)
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = list((session / "logs" / "serve").glob(f"replica_{service.name}_Gateway_*.log"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    [entry] = [line for line in lines if line.get("request_id") == "find-me" and "route" in line]
    assert entry["status"] == 200
