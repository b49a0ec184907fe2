import io
import json

import numpy as np
import pytest
from PIL import Image

from loraseg.data.mask_encodings.rle import decode_rle
from loraseg.inference.config import SegmenterConfig
from loraseg.inference.loading import load_models
from loraseg.inference.selection import AdaptiveSettings
from loraseg.serving.http_api.parameters import RETURNS
from tests.unit.serving.api_client import FOG, NIGHT, decode_png, jpeg, png, status_and_code
from tests.unit.tiny import CLASSES, DOMAINS


@pytest.fixture(scope="module")
def offline(config):
    """Segments with the same models and library, without the API."""
    segmenter_config = SegmenterConfig(base=config.base, encoder=config.encoder)
    models = load_models(segmenter_config, config.libraries["main"])

    def segment(image, mode="fused", k=2):
        settings = AdaptiveSettings(k=k, temperature=0.05, mode=mode)
        return models.segmenter(settings).segment([image], CLASSES)[0]

    return segment


class TestSegment:
    @pytest.mark.parametrize("mode", ["fused", "base", "uniform"])
    def test_label_map_and_explanation_equal_the_offline_ones(self, api, offline, mode):
        expected = offline(NIGHT, mode)
        reply = api.segment(NIGHT, mode=mode).json()
        assert np.array_equal(decode_png(reply["segmentation_mask"]), expected.label_map)
        why = expected.explanation
        assert (reply["mode"], reply["base"], reply["mix"]) == (
            mode,
            why.base,
            why.mix,
        )
        assert [a["digest"] for a in reply["adapters"]] == [a.digest for a in why.adapters]
        assert [a["weight"] for a in reply["adapters"]] == [a.weight for a in why.adapters]

    def test_reply_has_image_classes_colours_and_library(self, api):
        reply = api.segment(NIGHT).json()
        assert reply["image"] == {"width": 24, "height": 20}
        assert reply["classes"] == ["road", "car", "sky"]
        assert reply["class_map"] == {"0": "road", "1": "car", "2": "sky"}
        assert reply["palette"][0] == [128, 64, 128]
        assert (reply["library"], reply["generation"]) == ("main", len(DOMAINS))
        assert reply["skipped"] == []
        assert reply["tiles"] == 1
        mask = decode_png(reply["segmentation_mask"])
        shares = {name: float((mask == n).mean()) for n, name in enumerate(CLASSES)}
        assert reply["shares"] == pytest.approx(shares, abs=1e-6)
        assert sum(a["weight"] for a in reply["adapters"]) == pytest.approx(1)
        assert {"decode", "segment", "encode", "total"} <= set(reply["timing_ms"])

    def test_all_representations_agree_with_the_mask(self, api):
        options = {"return": ",".join(RETURNS), "opacity": "1"}
        reply = api.segment(NIGHT, **options).json()
        mask = decode_png(reply["segmentation_mask"])
        for rle in reply["rle"]:
            assert np.array_equal(decode_rle(rle), mask == rle["class_id"])
        for name in ("confidence", "entropy"):
            assert decode_png(reply[name]).shape == mask.shape
        palette = np.array(reply["palette"], np.uint8)
        assert np.array_equal(decode_png(reply["overlay"]), palette[mask])
        assert {p["class_id"] for p in reply["polygons"]} == set(np.unique(mask).tolist())

    def test_only_requested_members_are_returned(self, api):
        reply = api.segment(NIGHT, **{"return": "rle"}).json()
        assert "rle" in reply
        assert not {"segmentation_mask", "adapters", "timing_ms", "confidence"} & set(reply)

    def test_png_is_indexed_and_its_headers_explain_it(self, api):
        reply = api.segment(NIGHT).json()
        response = api.segment(NIGHT, headers={"Accept": "image/png"})
        assert response.headers["content-type"] == "image/png"
        image = Image.open(io.BytesIO(response.content))
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), decode_png(reply["segmentation_mask"]))
        assert image.getpalette()[:9] == np.ravel(reply["palette"]).tolist()
        assert json.loads(response.headers["x-loraseg-adapters"]) == reply["adapters"]
        assert json.loads(response.headers["x-loraseg-classes"]) == reply["classes"]
        assert response.headers["x-loraseg-generation"] == str(reply["generation"])

    @pytest.mark.parametrize(
        ("accept", "kind"),
        [
            ("image/png", "image/png"),
            ("image/png, */*;q=0.5", "image/png"),
            ("image/png;q=0.5, application/json", "application/json"),
            ("image/png;q=0", "application/json"),
            ("image/png;q=x", "application/json"),
            ("*/*", "application/json"),
            ("", "application/json"),
        ],
    )
    def test_accept_decides_between_json_and_png(self, api, accept, kind):
        assert api.segment(NIGHT, headers={"Accept": accept}).headers["content-type"] == kind

    def test_headers_that_are_too_long_are_omitted(self, api):
        classes = json.dumps([f"{n} {'ü' * 90}" for n in range(100)])
        response = api.segment(NIGHT, classes=classes, headers={"Accept": "image/png"})
        assert response.status_code == 200
        assert "x-loraseg-classes" not in response.headers
        assert "x-loraseg-adapters" in response.headers

    @pytest.mark.parametrize("kind", ["image/png", "application/octet-stream"])
    def test_raw_body_with_query_equals_a_form(self, api, kind):
        response = api(
            "POST",
            "/v1/segment?classes=road,car,sky",
            content=png(NIGHT),
            headers={"Content-Type": kind},
        )
        form = api.segment(NIGHT).json()
        assert response.json()["segmentation_mask"] == form["segmentation_mask"]

    def test_query_and_form_can_be_combined(self, api):
        response = api(
            "POST",
            "/v1/segment?classes=road&mode=base",
            files={"image": ("x", png(NIGHT))},
            data={"classes": "car"},
        )
        assert response.json()["classes"] == ["road", "car"]
        assert response.json()["mode"] == "base"

    def test_adapters_can_be_selected_and_excluded_by_name(self, api):
        only = api.segment(NIGHT, adapters="fog, day").json()
        assert {a["name"] for a in only["adapters"]} == {"fog", "day"}
        without = api.segment(NIGHT, adapters="-night").json()
        assert "night" not in {a["name"] for a in without["adapters"]}
        none = api.segment(NIGHT, adapters=",".join(f"-{name}" for name in DOMAINS)).json()
        assert none["adapters"] == []
        assert none["fallback"]

    def test_unknown_adapter_and_library_are_not_found(self, api):
        assert status_and_code(api.segment(NIGHT, adapters="nigth")) == (404, "no_such_adapter")
        assert status_and_code(api.segment(NIGHT, library="other")) == (404, "no_such_library")

    def test_timeout_gives_deadline(self, api):
        assert status_and_code(api.segment(NIGHT, timeout_s="0.001")) == (504, "deadline")

    def test_jpeg_is_decoded_as_offline(self, api, offline):
        data = jpeg(FOG, quality=90)
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        mask = decode_png(api.segment(data).json()["segmentation_mask"])
        assert np.array_equal(mask, offline(image).label_map)


class TestBatch:
    def test_each_image_gets_the_reply_of_a_single_request(self, api):
        images = [NIGHT, FOG, png(NIGHT)[:200], FOG[::-1], b"nothing"]
        response, lines = api.batch(images)
        assert response.headers["content-type"] == "application/x-ndjson"
        assert lines[-1] == {"done": 3, "failed": 2}
        by_index = {line["index"]: line for line in lines[:-1]}
        assert set(by_index) == set(range(5))
        for index in (0, 1, 3):
            alone = api.segment(images[index]).json()
            together = by_index[index]
            assert together["file"] == f"{index}.png"
            # A batch changes rounding, and scores of this random model have many near-ties.
            masks = [decode_png(reply["segmentation_mask"]) for reply in (together, alone)]
            assert (masks[0] == masks[1]).mean() > 0.98
            assert together["adapters"] == alone["adapters"]
        for index in (2, 4):
            assert by_index[index]["error"]["code"] == "bad_image"

    def test_deadline_applies_to_each_unfinished_image(self, api):
        _, lines = api.batch([NIGHT] * 5, timeout_s="0.001")
        assert {line["error"]["code"] for line in lines[:-1]} == {"deadline"}
        assert lines[-1] == {"done": 0, "failed": 5}

    def test_parameters_are_checked_before_the_stream_starts(self, api):
        response, _ = api.batch([NIGHT], mode="best")
        assert status_and_code(response) == (422, "invalid")

    def test_image_count_is_limited(self, api):
        response, _ = api.batch([b"x"] * 65)
        assert status_and_code(response) == (422, "invalid")

    def test_raw_bodies_are_rejected(self, api):
        headers = {"Content-Type": "image/png"}
        response = api("POST", "/v1/segment/batch", content=png(NIGHT), headers=headers)
        assert status_and_code(response) == (415, "unsupported_media_type")


class TestLibraries:
    def test_adapters_are_listed_by_name_with_their_classes(self, api):
        body = api("GET", "/v1/adapters").json()
        assert (body["library"], body["generation"]) == ("main", len(DOMAINS))
        assert [a["name"] for a in body["adapters"]] == sorted(DOMAINS)
        assert body["adapters"][0]["classes"] == list(CLASSES)

    def test_card_has_no_centroids(self, api):
        card = api("GET", "/v1/adapters/fog?library=main").json()
        assert card["name"] == "fog"
        assert "centroids" not in card

    @pytest.mark.parametrize("name", ["nix", "FOG", "..%2f..%2fetc%2fpasswd", "fog%00", "%ff"])
    def test_other_names_are_not_found(self, api, name):
        response = api("GET", f"/v1/adapters/{name}")
        assert response.status_code == 404

    def test_library_state(self, api):
        body = api("GET", "/v1/library").json()
        assert body["adapters"] == len(DOMAINS)
        assert body["unavailable"] == body["misfits"] == 0
        assert body["libraries"] == [{"library": "main"}]
        assert body["problem"] is None

    def test_base_has_a_digest(self, api):
        body = api("GET", "/v1/base").json()
        assert len(body["digest"]) == 64

    def test_unknown_parameters_are_rejected_with_a_suggestion(self, api):
        response = api("GET", "/v1/adapters?libary=main")
        assert status_and_code(response) == (422, "invalid")
        assert "did you mean 'library'?" in response.json()["detail"]

    def test_refresh_is_forbidden_without_tokens(self, api):
        assert status_and_code(api("POST", "/v1/library/refresh")) == (403, "forbidden")


class TestPublicRoutes:
    def test_ready_and_healthy(self, api):
        assert api("GET", "/readyz").json() == {"ready": True, "waiting_for": []}
        assert api("GET", "/healthz").json() == {"status": "ok"}

    def test_head_is_get_without_a_body(self, api):
        response = api("HEAD", "/healthz")
        assert response.status_code == 200
        assert response.content == b""

    def test_examples_can_be_segmented(self, api):
        examples = api("GET", "/v1/examples").json()["examples"]
        response = api("GET", f"/{examples[3]['url']}")
        assert response.headers["content-type"] == "image/png"
        assert api.segment(response.content, ",".join(examples[3]["classes"])).status_code == 200

    @pytest.mark.parametrize("n", ["99", "-1", "x", "1e3", "٣", "9" * 5000])
    def test_other_examples_are_not_found(self, api, n):
        assert status_and_code(api("GET", f"/v1/examples/{n}.png")) == (404, "not_found")

    def test_unknown_paths_and_methods_give_problem_details(self, api):
        assert status_and_code(api("GET", "/v2/segment")) == (404, "not_found")
        assert status_and_code(api("GET", "/v1/base/", headers={"Host": "evil.example"}))[0] == 404
        response = api("GET", "/v1/segment")
        assert status_and_code(response) == (405, "method_not_allowed")
        assert response.headers["allow"] == "POST"
