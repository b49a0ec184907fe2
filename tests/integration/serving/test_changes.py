"""Changed libraries, full queues and draining; each test has its own endpoint."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from ray import serve

from loraseg.backbones.clip import load_clip
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.serving.config import Limits
from tests.integration.serving.endpoint_requests import (
    PNG,
    SEGMENT,
    png,
    post_concurrently,
    wait_until,
)
from tests.unit.tiny import DOMAINS, publish

pytestmark = pytest.mark.ray


def test_published_and_rolled_back_versions_are_served_within_seconds(
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
        wait_until(lambda: versions() == dict.fromkeys(names, 1))
        files, card = library.load(names[1])
        library.publish(names[0], files, replace(card, name=names[0]))
        wait_until(lambda: versions()[names[0]] == 2)
        library.rollback(names[0], 1)
        wait_until(lambda: versions()[names[0]] == 1)
        for response in post_concurrently(service, images):
            for used in response.json()["adapters"]:
                entry = library.entry(used["name"])
                assert (used["version"], used["digest"]) == (entry.version, entry.digest)


def test_beyond_the_queue_limit_responses_have_retry_after(start, library, images):
    with start({"main": library}, batch=1, limits=Limits(queued=1)) as service:
        responses = post_concurrently(service, images * 4)
    assert {response.status_code for response in responses} == {200, 503}
    for response in responses:
        if response.status_code == 503:
            assert response.json()["code"] == "overloaded"
            assert int(response.headers["retry-after"]) >= 1


def test_a_draining_gateway_finishes_running_requests_and_rejects_new_ones(start, library, images):
    with start({"main": library}) as service:
        gateway = serve.get_deployment_handle("Gateway", service.name)
        image = np.tile(images[0], (20, 20, 1))

        async def drain():
            async with service.async_client() as client:
                path = f"{SEGMENT}&tiling=always"
                running = asyncio.create_task(client.post(path, content=png(image), headers=PNG))
                await asyncio.sleep(0.3)
                await gateway.broadcast("drain").results_async()
                rejected = await client.get("/v1/adapters")
                return await running, rejected

        running, rejected = asyncio.run(drain())
        assert running.status_code == 200
        assert (rejected.status_code, rejected.json()["code"]) == (503, "draining")
        assert gateway.broadcast("drain").results() == [0]
