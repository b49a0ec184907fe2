"""Contrast of the page, layout on phones, and its PNG decoder."""

import base64
import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.e2e.page_actions import (
    CLASSES,
    choose_file,
    frame,
    select_view,
    submit_image,
    wait_answered,
)

pytestmark = pytest.mark.e2e

CONTRAST = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = rgba(getComputedStyle(node).backgroundColor);
      if (color[3] === 255) return color;
    }
  };
  const seen = [...document.querySelectorAll("body *")].filter((node) =>
    [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())
    && node.checkVisibility() && !node.closest(".unseen, .skip, :disabled, noscript, option"));
  return seen.map((node) => {
    return [node.textContent.trim(), rgba(getComputedStyle(node).color), behind(node)];
  });
}
"""


def luminance(color):
    """Return the relative luminance of WCAG 2.2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast_in_light_and_dark(visit, theme):
    page = visit(color_scheme=theme)
    submit_image(page)
    page.locator("#settings summary").click()
    page.locator("#how summary").click()
    page.locator("#chart summary").first.click()
    expect(page.locator("#chart .facts").first).to_contain_text("digest")
    texts = page.evaluate(CONTRAST)
    assert len(texts) > 40
    for text, foreground, background in texts:
        light, dark = sorted(luminance(np.array(c[:3]) / 255) for c in (foreground, background))[
            ::-1
        ]
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text!r}: {foreground} on {background}"
    is_dark = luminance(np.array(texts[0][2][:3]) / 255) < 0.2
    assert is_dark == (theme == "dark")


def test_the_theme_can_be_set_and_is_stored(visit):
    page = visit(color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    for _ in ("light", "dark"):
        page.get_by_role("button", name=re.compile("Theme")).click()
    dark = page.evaluate(background)
    assert dark != light
    page.reload()
    assert page.evaluate(background) == dark


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_never_scrolls_sideways(visit, width):
    size = {"width": width, "height": 800}
    page = visit(viewport=size, has_touch=True, is_mobile=True, color_scheme="dark")
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    submit_image(page, (*CLASSES, "a very long name of a class " * 3, "w" * 90))
    page.locator("#settings summary").tap()
    page.locator("#how summary").tap()
    page.locator("#chart summary").first.tap()
    expect(page.locator("#chart .facts").first).to_contain_text("digest")
    assert page.evaluate(fits)
    select_view(page, "Side by side")
    wait_answered(page)
    assert page.evaluate(fits)
    frame(page, "base").tap()
    expect(page.locator(".tip:visible")).to_have_count(2)
    assert page.evaluate(fits)
    choose_file(page, b"no image", f"{'n' * 120}.txt")
    expect(page.get_by_role("alert")).to_be_visible()
    assert page.evaluate(fits)


def read_in_page(page, data):
    script = "async (text) => Array.from((await decodePng(bytesOf(text))).pixels)"
    return page.evaluate(script, base64.b64encode(data).decode())


def filtered_png(values, kind):
    """Encode a grey PNG whose rows all have one filter (PNG specification, section 9.2)."""
    rows = np.pad(values.astype(int), ((1, 0), (1, 0)))
    left, above, corner = rows[1:, :-1], rows[:-1, 1:], rows[:-1, :-1]
    distances = [abs(above - corner), abs(left - corner), abs(left + above - 2 * corner)]
    paeth = np.choose(np.argmin(distances, axis=0), [left, above, corner])
    guess = [0 * left, left, above, (left + above) // 2, paeth][kind]
    lines = np.pad(
        ((values - guess) % 256).astype(np.uint8), ((0, 0), (1, 0)), constant_values=kind
    )

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", *values.shape[::-1], 8, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_the_page_decodes_label_maps_of_every_depth_and_filter(visit):
    page = visit()
    random = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(37), np.arange(29))
    for bits in (1, 2, 4, 8):
        values = (x * y // 7 + random.integers(0, 2, x.shape)) % 2**bits
        image = Image.fromarray(values.astype(np.uint8))
        image.putpalette(bytes(range(256)) * 3)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", bits=bits)
        assert buffer.getvalue()[24] == bits
        np.testing.assert_array_equal(
            np.reshape(read_in_page(page, buffer.getvalue()), x.shape), values
        )
    for kind in range(5):
        data = filtered_png(values, kind)
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(data))), values)
        np.testing.assert_array_equal(np.reshape(read_in_page(page, data), x.shape), values)
