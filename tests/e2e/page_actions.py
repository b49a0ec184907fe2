"""Actions of a user on the page, and requests to the API for comparison."""

import base64
import io
import json
import urllib.request
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from loraseg.miniature.world.render import render

CLASSES = ("sky", "road", "building")


def png_bytes(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


SNOW = png_bytes(render("snow", 1, 5, "page")[0][0])


def segment_request(endpoint, **parameters):
    """Return the API's reply without the page."""
    query = urlencode({"classes": json.dumps(CLASSES), "return": "mask,confidence,explanation"})
    request = urllib.request.Request(
        f"{endpoint}v1/segment?{query}&{urlencode(parameters)}",
        data=SNOW,
        headers={"Content-Type": "image/png"},
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def decode_png(text):
    return np.array(Image.open(io.BytesIO(base64.b64decode(text))))


def choose_file(page, data=SNOW, name="snow.png"):
    media_type = "image/png" if name.endswith(".png") else "text/plain"
    page.locator("#file").set_input_files({"name": name, "mimeType": media_type, "buffer": data})


def write_classes(page, names=CLASSES):
    # The page sets the classes of the library when it has loaded them.
    expect(page.get_by_label("Remove sky")).to_be_visible()
    page.get_by_role("button", name="Clear", exact=True).click()
    for name in names:
        page.get_by_label("Add a class", exact=True).fill(name)
        page.keyboard.press("Enter")


def wait_answered(page):
    """Wait until all results in view are current."""
    expect(page.locator("main")).to_have_attribute("data-answered", "true")


def submit_image(page, classes=CLASSES, data=SNOW):
    write_classes(page, classes)
    choose_file(page, data)
    wait_answered(page)


OVERLAY = """
(canvas) => {
  const copy = document.createElement("canvas");
  Object.assign(copy, { width: canvas.width, height: canvas.height });
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(canvas, 0, 0);
  const { data } = context.getImageData(0, 0, copy.width, copy.height);
  let text = "";
  for (let i = 0; i < data.length; i += 32768) {
    text += String.fromCharCode(...data.subarray(i, i + 32768));
  }
  return [copy.height, copy.width, btoa(text)];
}
"""


def overlay(page, mode="fused"):
    """Return the overlay's canvas, RGBA uint8 (h, w, 4)."""
    height, width, text = page.locator(f"figure[data-mode={mode}] canvas.over").evaluate(OVERLAY)
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)


def chart(page):
    """Return the adapters in the chart with their weights in percent."""
    names = page.locator("#chart .who strong").all_inner_texts()
    weights = page.locator("#chart .near b").all_inner_texts()
    return {
        name: float(weight.removesuffix(" %")) for name, weight in zip(names, weights, strict=True)
    }


def frame(page, mode="fused"):
    return page.locator(f"figure[data-mode={mode}] .frame")


def hover(page, x, y, mode="fused"):
    box = frame(page, mode).bounding_box()
    page.mouse.move(
        box["x"] + (x + 0.5) / 64 * box["width"], box["y"] + (y + 0.5) / 64 * box["height"]
    )


def select_view(page, label):
    page.get_by_label(label, exact=True).check()


def tab_to(page, selector):
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    pytest.fail(f"the tab key does not reach {selector}")
