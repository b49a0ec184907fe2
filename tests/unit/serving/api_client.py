"""Sends requests to an API in this process and checks what holds for all responses."""

import asyncio
import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote_plus

import httpx2
import numpy as np
from PIL import Image

from loraseg.serving.http_api.app import build_api
from loraseg.serving.http_api.problems import PROBLEM_TYPES
from tests.unit.tiny import domain_images

# Text that would reveal details of the server.
ROOT = str(Path(__file__).parents[3])
LEAKS = (
    ROOT,
    "/etc",
    "/tmp",
    "/root",
    "/home",
    "Traceback",
    'File "',
    "0x",
    "site-packages",
    "s3://",
)


def png(image, **options):
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def jpeg(image, **options):
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, format="JPEG", **options)
    return buffer.getvalue()


NIGHT = domain_images("night", 1)[0]
FOG = domain_images("fog", 1)[0]


class ApiClient:
    """Sends requests through the whole app and checks each response."""

    def __init__(self, engine, config, *, tokens=None, limits=None, **options):
        if limits:
            config = replace(config, limits=replace(config.limits, **limits))
        self.contexts = []
        self.api = build_api(
            engine, config, tokens=tokens, on_complete=self.contexts.append, **options
        )

    def __call__(self, method, path, **options):
        return asyncio.run(self.send(method, path, **options))

    async def send(self, method, path, **options):
        transport = httpx2.ASGITransport(app=self.api)
        async with httpx2.AsyncClient(transport=transport, base_url="http://service") as client:
            response = await client.request(method, path, timeout=600, **options)
        check_response(response)
        return response

    def segment(self, image=NIGHT, classes="road, car, sky", headers=None, **fields):
        """Send one image as a form."""
        data = image if isinstance(image, bytes) else png(image)
        return self(
            "POST",
            "/v1/segment",
            files={"image": ("street.png", data)},
            data={"classes": classes, **fields},
            headers=headers,
        )

    def batch(self, images, classes="road, car, sky", **fields):
        """Send several images; return the response and its lines."""
        files = [
            ("images", (f"{n}.png", image if isinstance(image, bytes) else png(image)))
            for n, image in enumerate(images)
        ]
        response = self(
            "POST", "/v1/segment/batch", files=files, data={"classes": classes, **fields}
        )
        return response, [json.loads(line) for line in response.text.splitlines()]


def check_response(response):
    """Check the request id and, for an error, that its problem details reveal nothing."""
    assert response.headers["x-request-id"]
    assert response.headers["x-content-type-options"] == "nosniff"
    if response.status_code == 200:
        return
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    problem_type = PROBLEM_TYPES[problem["code"]]
    assert response.status_code == problem["status"] == problem_type.status
    assert problem["title"] == problem_type.title
    assert problem["type"] == f"urn:loraseg:problem:{problem['code']}"
    assert problem["request_id"] == response.headers["x-request-id"]
    assert len(response.content) < 2000
    assert leaks(problem["detail"], response.request) == []
    assert problem["code"] != "internal"


def leaks(detail, request):
    """Return the revealing texts in ``detail`` that the request did not contain."""
    sent = unquote_plus(str(request.url)) + request.read().decode(errors="replace")
    return [leak for leak in LEAKS if leak in detail and leak not in sent]


def status_and_code(response):
    return response.status_code, response.json()["code"]


def decode_png(base64_png):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(base64_png))))
