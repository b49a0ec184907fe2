"""The endpoint on Ray against the engine of one process, and what Ray adds to it."""

import asyncio
import json
import time
from pathlib import Path

import numpy as np
import pytest
import ray

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
    """Compare what was used and why, whatever the order of arrival."""
    keys = ("mode", "base", "generation", "fallback", "adapters", "mix")
    return all(one[key] == other[key] for key in keys)


def test_answers_are_those_of_one_process_alone_and_in_a_mixed_crowd(service, images):
    alone = [post_concurrently(service, [image])[0].json() for image in images]
    crowd = [response.json() for response in post_concurrently(service, images)]
    with build_local_engine(service.config) as engine:
        assert engine.wait_until_ready(30.0)
        local = asyncio.run(_locally(engine, service.config, images))
    assert len({reply["mix"] for reply in alone}) > 1
    for one, many, outcome in zip(alone, crowd, local, strict=True):
        assert same_explanation(one, many)
        assert one["mix"] == outcome.result.explanation.mix
        np.testing.assert_array_equal(label_map(one), outcome.result.label_map)
        np.testing.assert_array_equal(label_map(many), outcome.result.label_map)


async def _locally(engine, config, images):
    from loraseg.inference.request import SegmentRequest
    from loraseg.inference.selection import AdapterQuery

    wish = AdapterQuery(settings=config.adaptive_settings())
    return [
        await engine.segment(
            SegmentRequest(
                image=image,
                classes=CLASSES,
                library="main",
                query=wish,
                deadline=time.time() + 30,
            )
        )
        for image in images
    ]


def test_a_crowd_goes_through_the_model_together(service, images):
    replies = [response.json() for response in post_concurrently(service, images)]
    assert max(reply["batch"] for reply in replies) > 1


def test_large_images_travel_through_the_object_store(service):
    image = np.tile(domain_images(next(iter(DOMAINS)), 1)[0], (12, 12, 1))
    [whole] = post_concurrently(service, [image], f"{SEGMENT}&tiling=never")
    [tiled] = post_concurrently(service, [image], f"{SEGMENT}&tiling=always")
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
    [response] = post_concurrently(service, images[:1], f"{SEGMENT}&timeout_s=0.001")
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

            return await client.post(SEGMENT, content=slow_body(), headers=PNG)

    response = asyncio.run(lose())
    assert (response.status_code, response.json()["code"]) == (503, "replica_lost")
    assert int(response.headers["retry-after"]) >= 1
    service.wait_ready()
    assert post_concurrently(service, images[:1])[0].status_code == 200


def test_metrics_are_exported_and_logs_are_json_with_the_request_id(service, images):
    with service.client() as client:
        client.post(
            SEGMENT,
            content=png(images[0]),
            headers={**PNG, "X-Request-ID": "find-me"},
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
    wait_until(lambda: all(name in httpx.get(url).text for name in wanted), deadline_s=60)
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = list((session / "logs" / "serve").glob(f"replica_{service.name}_Gateway_*.log"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    [told] = [line for line in lines if line.get("request_id") == "find-me" and "route" in line]
    assert told["status"] == 200
