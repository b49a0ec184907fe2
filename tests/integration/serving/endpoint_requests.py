"""Requests to an endpoint."""

import asyncio
import base64
import io
import time

import numpy as np
from PIL import Image

CLASSES = ("road", "car", "sky")
PNG = {"Content-Type": "image/png"}
SEGMENT = f"/v1/segment?classes={','.join(CLASSES)}"


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def label_map(reply):
    data = base64.b64decode(reply["segmentation_mask"])
    return np.asarray(Image.open(io.BytesIO(data)))


def post_concurrently(service, images, path=SEGMENT):
    """Send all images concurrently; return the responses."""

    async def send():
        async with service.async_client() as client:
            posts = [client.post(path, content=png(image), headers=PNG) for image in images]
            return await asyncio.gather(*posts)

    return asyncio.run(send())


def wait_until(condition, deadline_s=20.0):
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)
