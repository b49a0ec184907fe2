"""The page at ``/`` in a browser, with the real API and models."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from loraseg.miniature.world.render import render
from tests.e2e.conftest import TOKEN
from tests.e2e.page_actions import (
    CLASSES,
    SNOW,
    chart,
    choose_file,
    decode_png,
    frame,
    hover,
    overlay,
    png_bytes,
    segment_request,
    select_view,
    submit_image,
    tab_to,
    wait_answered,
    write_classes,
)
from tests.e2e.page_server import DOMAINS

pytestmark = pytest.mark.e2e


def test_an_upload_is_segmented_and_another_class_changes_the_overlay(visit, endpoint):
    page = visit()
    submit_image(page)
    reply = segment_request(endpoint)
    labels, palette = decode_png(reply["segmentation_mask"]), np.array(reply["palette"], np.uint8)
    before = overlay(page)
    np.testing.assert_array_equal(before[..., :3], palette[labels])
    assert (before[..., 3] == 255).all()

    page.get_by_label("Add a class", exact=True).fill("terrain, pavement,")
    wait_answered(page)
    assert (overlay(page) != before).any()
    rows = page.locator("#legend li .name").all_inner_texts()
    assert rows == [*CLASSES, "terrain", "pavement"]


def test_the_chart_shows_the_retrieved_adapters(visit, endpoint):
    page = visit()
    submit_image(page)
    adapters = segment_request(endpoint)["adapters"]
    assert list(chart(page)) == [used["name"] for used in adapters]
    assert set(chart(page)) <= set(DOMAINS)
    for used, weight in zip(adapters, chart(page).values(), strict=True):
        assert weight == pytest.approx(100 * used["weight"], abs=0.06)
    distances = page.locator("#chart .far b").all_inner_texts()
    assert distances == [f"{used['distance']:.3f}" for used in adapters]
    widths = [bar.bounding_box()["width"] for bar in page.locator("#chart .near .bar i").all()]
    assert widths == sorted(widths, reverse=True)
    page.locator("#chart summary").first.click()
    expect(page.locator("#chart .facts").first).to_contain_text(adapters[0]["digest"])
    expect(page.locator("#chart .facts").first).to_contain_text("miou")


def test_an_adapter_can_be_excluded_and_restored(visit):
    page = visit()
    submit_image(page)
    first = next(iter(chart(page)))
    page.locator("#chart summary").first.click()
    page.get_by_role("button", name=f"Segment without {first}").click()
    wait_answered(page)
    assert first not in chart(page)
    page.get_by_label(f"Put {first} back").click()
    wait_answered(page)
    assert first in chart(page)


def test_base_and_fused_alone_and_side_by_side(visit, endpoint):
    page = visit()
    submit_image(page)
    fused = overlay(page)
    select_view(page, "Base")
    wait_answered(page)
    base = overlay(page, "base")
    expect(page.locator("#adapters-none")).to_contain_text("no adapters were requested")
    assert chart(page) == {}
    select_view(page, "Side by side")
    wait_answered(page)
    np.testing.assert_array_equal(overlay(page, "base"), base)
    np.testing.assert_array_equal(overlay(page, "fused"), fused)
    changed = (fused != base).any(axis=2).mean()
    assert changed > 0
    expect(page.locator("figure[data-mode=fused]")).to_contain_text(f"{100 * changed:.1f} %")
    labels = decode_png(segment_request(endpoint, mode="base")["segmentation_mask"])
    shares = page.locator("#legend .share").all_inner_texts()
    assert [text.split(" → ")[0] for text in shares] == [
        f"{100 * (labels == index).mean():.1f} %" for index in range(len(CLASSES))
    ]
    hover(page, 40, 40, "base")
    expect(page.locator(".tip:visible")).to_have_count(2)


def test_hovering_shows_class_and_confidence(visit, endpoint):
    page = visit()
    submit_image(page)
    reply = segment_request(endpoint)
    labels, confidence = decode_png(reply["segmentation_mask"]), decode_png(reply["confidence"])
    for x, y in ((0, 0), (63, 63), (20, 40), (40, 10)):
        hover(page, x, y)
        tip = frame(page).locator(".tip")
        expect(tip).to_contain_text(f"{x}, {y}")
        name, sure = CLASSES[labels[y, x]], f"{100 * int(confidence[y, x]) / 255:.0f} %"
        expect(tip).to_contain_text(f"{name}{sure}")
    page.mouse.move(2, 2)
    expect(frame(page).locator(".tip")).to_be_hidden()


def test_classes_can_be_hidden_and_the_confidence_shown(visit, endpoint):
    page = visit()
    submit_image(page)
    labels = decode_png(segment_request(endpoint)["segmentation_mask"])
    page.locator("#legend").get_by_label("road").uncheck()
    np.testing.assert_array_equal(overlay(page)[..., 3] == 0, labels == CLASSES.index("road"))
    page.get_by_role("button", name="Hide all").click()
    assert not overlay(page).any()
    page.get_by_role("button", name="Show all").click()
    before = overlay(page)
    select_view(page, "Confidence")
    after = overlay(page)
    assert (before != after).any()
    assert (after[..., 3] == 255).all()
    page.get_by_label("Opacity").fill("20")
    expect(page.locator("canvas.over")).to_have_css("opacity", "0.2")


def test_downloads(visit, endpoint):
    page = visit()
    submit_image(page)
    reply = segment_request(endpoint)
    with page.expect_download() as download:
        page.get_by_role("button", name="PNG").click()
    assert download.value.suggested_filename == "snow-fused.png"
    label_map = Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))
    assert (label_map.mode, label_map.size) == ("P", (64, 64))
    np.testing.assert_array_equal(np.array(label_map), decode_png(reply["segmentation_mask"]))
    colors = np.reshape(label_map.getpalette(), (-1, 3))[: len(CLASSES)]
    np.testing.assert_array_equal(colors, reply["palette"])

    with page.expect_download() as download:
        page.get_by_role("button", name="JSON").click()
    saved = json.loads(Path(download.value.path()).read_text())
    for name in set(reply) - {"request_id", "timing_ms", "batch"}:
        assert saved[name] == reply[name]

    with page.expect_download() as download:
        page.get_by_role("button", name="Picture").click()
    assert download.value.suggested_filename == "snow-fused-overlay.png"
    with Image.open(download.value.path()) as picture:
        shown = np.array(picture.convert("RGB"), np.float64)
    image = np.array(Image.open(io.BytesIO(SNOW)), np.float64)
    colors = overlay(page)[..., :3]
    np.testing.assert_allclose(shown, image * 0.35 + colors * 0.65, atol=2)


def test_the_page_can_be_used_with_the_keyboard_only(visit):
    page = visit()
    expect(page.locator(".thumb canvas").first).to_be_visible()
    tab_to(page, ".thumb")
    page.keyboard.press("Enter")
    wait_answered(page)
    tab_to(page, "#word")
    page.keyboard.type("lamp")
    page.keyboard.press("Enter")
    wait_answered(page)
    expect(page.locator("#legend")).to_contain_text("lamp")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Delete")
    wait_answered(page)
    expect(page.locator("#legend")).not_to_contain_text("lamp")
    tab_to(page, "[name=view]")
    page.keyboard.press("ArrowRight")
    wait_answered(page)
    tab_to(page, ".frame")
    expect(page.locator("#spot")).to_have_text(re.compile(r".+, \d+ %"))
    page.keyboard.press("ArrowRight")
    expect(page.locator(".tip:visible")).to_contain_text("33, 32")
    page.keyboard.press("Shift+ArrowDown")
    expect(page.locator(".tip:visible")).to_contain_text("33, 40")
    tab_to(page, "#save-png")
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    assert download.value.suggested_filename.endswith("-base.png")


def test_errors_are_shown(visit):
    page = visit()
    submit_image(page)
    alert = page.get_by_role("alert")
    choose_file(page, b"text", "notes.txt")
    expect(alert).to_contain_text("“notes.txt” is not an image that can be read.")
    page.get_by_role("button", name="Dismiss").click()
    expect(alert).to_be_hidden()
    page.get_by_label("Add a class", exact=True).fill("x" * 101)
    page.keyboard.press("Enter")
    expect(alert).to_contain_text("A parameter is wrong. Classes: got a name of 101 characters")
    expect(page.get_by_role("button", name="PNG")).to_be_disabled()
    page.get_by_label(f"Remove {'x' * 101}").click()
    wait_answered(page)
    expect(alert).to_be_hidden()
    page.context.set_offline(True)
    page.get_by_role("button", name="Segment", exact=True).click()
    expect(alert).to_contain_text("The server did not respond.")
    page.context.set_offline(False)
    page.get_by_role("button", name="Segment", exact=True).click()
    wait_answered(page)
    expect(alert).to_be_hidden()


def test_requests_are_retried_after_retry_after(visit):
    page = visit()
    rejected = []

    def reject_once(route):
        if rejected:
            route.continue_()
            return
        rejected.append(route.request)
        body = json.dumps({"title": "The service is busy", "status": 503, "code": "overloaded"})
        route.fulfill(status=503, headers={"Retry-After": "2"}, body=body)

    page.route("**/v1/segment", reject_once)
    write_classes(page)
    choose_file(page)
    expect(page.locator("#notice")).to_contain_text("Retrying in 2 seconds")
    wait_answered(page)
    expect(page.locator("#notice")).to_be_hidden()
    assert len(rejected) == 1


def test_a_token_is_requested(visit, locked_endpoint):
    page = visit(locked_endpoint)
    dialog = page.get_by_role("dialog")
    expect(page.get_by_role("alert")).to_contain_text("token")
    dialog.get_by_label("Token", exact=True).fill("wrong")
    dialog.get_by_role("button", name="Use this token").click()
    expect(dialog).to_contain_text("The server rejected the token.")
    dialog.get_by_label("Token", exact=True).fill(TOKEN)
    dialog.get_by_role("button", name="Use this token").click()
    expect(dialog).to_be_hidden()
    submit_image(page)
    assert chart(page)
    page.reload()
    submit_image(page)
    page.get_by_role("button", name="Token").click()
    dialog.get_by_role("button", name="Forget").click()
    expect(dialog).to_be_visible()
    assert page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 0]


def test_large_images_are_drawn_smaller_and_downloaded_at_full_size(visit):
    page = visit()
    large = np.kron(render("night", 1, 5, "page")[0][0], np.ones((36, 32, 1), np.uint8))
    page.locator("#settings summary").click()
    page.get_by_label("Tiles").select_option("never")
    submit_image(page, data=png_bytes(large))
    height, width = overlay(page).shape[:2]
    assert height * width <= 4.1e6
    assert width / height == pytest.approx(large.shape[1] / large.shape[0], abs=0.01)
    with page.expect_download() as download:
        page.get_by_role("button", name="PNG").click()
    with Image.open(download.value.path()) as picture:
        assert picture.size == large.shape[1::-1]
