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
def offline(world):
    """The same images, classes and library without the endpoint."""
    config = SegmenterConfig(base=world.base, encoder=world.encoder)
    models = load_models(config, world.libraries["main"])

    def segment(image, mode="fused", k=2):
        settings = AdaptiveSettings(k=k, temperature=0.05, mode=mode)
        return models.segmenter(settings).segment([image], CLASSES)[0]

    return segment


class TestSegment:
    @pytest.mark.parametrize("mode", ["fused", "base", "uniform"])
    def test_pixels_and_reasons_are_those_of_the_offline_segmenter(self, talk, offline, mode):
        expected = offline(NIGHT, mode)
        reply = talk.segment(NIGHT, mode=mode).json()
        assert np.array_equal(decode_png(reply["segmentation_mask"]), expected.label_map)
        why = expected.explanation
        assert (reply["mode"], reply["base"], reply["mix"]) == (mode, why.base, why.mix)
        assert [a["digest"] for a in reply["adapters"]] == [a.digest for a in why.adapters]
        assert [a["weight"] for a in reply["adapters"]] == [a.weight for a in why.adapters]

    def test_reply_names_image_classes_colours_and_library(self, talk):
        reply = talk.segment(NIGHT).json()
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

    def test_everything_that_can_be_returned_agrees_with_the_mask(self, talk):
        wanted = {"return": ",".join(RETURNS), "opacity": "1"}
        reply = talk.segment(NIGHT, **wanted).json()
        mask = decode_png(reply["segmentation_mask"])
        for rle in reply["rle"]:
            assert np.array_equal(decode_rle(rle), mask == rle["class_id"])
        for name in ("confidence", "entropy"):
            assert decode_png(reply[name]).shape == mask.shape
        palette = np.array(reply["palette"], np.uint8)
        assert np.array_equal(decode_png(reply["overlay"]), palette[mask])
        assert {p["class_id"] for p in reply["polygons"]} == set(np.unique(mask).tolist())

    def test_only_what_was_asked_for_is_returned(self, talk):
        reply = talk.segment(NIGHT, **{"return": "rle"}).json()
        assert "rle" in reply
        assert not {"segmentation_mask", "adapters", "timing_ms", "confidence"} & set(reply)

    def test_png_is_indexed_and_its_headers_explain_it(self, talk):
        reply = talk.segment(NIGHT).json()
        answer = talk.segment(NIGHT, headers={"Accept": "image/png"})
        assert answer.headers["content-type"] == "image/png"
        picture = Image.open(io.BytesIO(answer.content))
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), decode_png(reply["segmentation_mask"]))
        assert picture.getpalette()[:9] == np.ravel(reply["palette"]).tolist()
        assert json.loads(answer.headers["x-loraseg-adapters"]) == reply["adapters"]
        assert json.loads(answer.headers["x-loraseg-classes"]) == reply["classes"]
        assert answer.headers["x-loraseg-generation"] == str(reply["generation"])

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
    def test_accept_decides_between_json_and_png(self, talk, accept, kind):
        assert talk.segment(NIGHT, headers={"Accept": accept}).headers["content-type"] == kind

    def test_headers_that_would_be_too_long_are_left_out(self, talk):
        classes = json.dumps([f"{n} {'ü' * 90}" for n in range(100)])
        answer = talk.segment(NIGHT, classes=classes, headers={"Accept": "image/png"})
        assert answer.status_code == 200
        assert "x-loraseg-classes" not in answer.headers
        assert "x-loraseg-adapters" in answer.headers

    @pytest.mark.parametrize("kind", ["image/png", "application/octet-stream"])
    def test_raw_body_with_query_is_the_same_as_a_form(self, talk, kind):
        answer = talk(
            "POST",
            "/v1/segment?classes=road,car,sky",
            content=png(NIGHT),
            headers={"Content-Type": kind},
        )
        form = talk.segment(NIGHT).json()
        assert answer.json()["segmentation_mask"] == form["segmentation_mask"]

    def test_query_and_form_may_be_mixed(self, talk):
        answer = talk(
            "POST",
            "/v1/segment?classes=road&mode=base",
            files={"image": ("x", png(NIGHT))},
            data={"classes": "car"},
        )
        assert answer.json()["classes"] == ["road", "car"]
        assert answer.json()["mode"] == "base"

    def test_adapters_are_forced_and_excluded_by_name(self, talk):
        only = talk.segment(NIGHT, adapters="fog, day").json()
        assert {a["name"] for a in only["adapters"]} == {"fog", "day"}
        without = talk.segment(NIGHT, adapters="-night").json()
        assert "night" not in {a["name"] for a in without["adapters"]}
        none = talk.segment(NIGHT, adapters=",".join(f"-{name}" for name in DOMAINS)).json()
        assert none["adapters"] == []
        assert none["fallback"]

    def test_unknown_adapter_and_library_are_not_found(self, talk):
        assert status_and_code(talk.segment(NIGHT, adapters="nigth")) == (404, "no_such_adapter")
        assert status_and_code(talk.segment(NIGHT, library="other")) == (404, "no_such_library")

    def test_deadline_is_kept(self, talk):
        assert status_and_code(talk.segment(NIGHT, timeout_s="0.001")) == (504, "deadline")

    def test_jpeg_is_read_as_offline(self, talk, offline):
        data = jpeg(FOG, quality=90)
        image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        mask = decode_png(talk.segment(data).json()["segmentation_mask"])
        assert np.array_equal(mask, offline(image).label_map)


class TestBatch:
    def test_every_image_is_answered_as_if_it_came_alone(self, talk):
        images = [NIGHT, FOG, png(NIGHT)[:200], FOG[::-1], b"nothing"]
        answer, lines = talk.batch(images)
        assert answer.headers["content-type"] == "application/x-ndjson"
        assert lines[-1] == {"done": 3, "failed": 2}
        by_index = {line["index"]: line for line in lines[:-1]}
        assert set(by_index) == set(range(5))
        for index in (0, 1, 3):
            alone = talk.segment(images[index]).json()
            together = by_index[index]
            assert together["file"] == f"{index}.png"
            # A batch rounds otherwise, and this random model's scores have many near-ties.
            masks = [decode_png(reply["segmentation_mask"]) for reply in (together, alone)]
            assert (masks[0] == masks[1]).mean() > 0.98
            assert together["adapters"] == alone["adapters"]
        for index in (2, 4):
            assert by_index[index]["error"]["code"] == "bad_image"

    def test_deadline_ends_every_image_that_is_not_done(self, talk):
        _, lines = talk.batch([NIGHT] * 5, timeout_s="0.001")
        assert {line["error"]["code"] for line in lines[:-1]} == {"deadline"}
        assert lines[-1] == {"done": 0, "failed": 5}

    def test_parameters_are_checked_before_the_stream_begins(self, talk):
        answer, _ = talk.batch([NIGHT], mode="best")
        assert status_and_code(answer) == (422, "invalid")

    def test_image_count_is_bounded(self, talk):
        answer, _ = talk.batch([b"x"] * 65)
        assert status_and_code(answer) == (422, "invalid")

    def test_raw_bodies_are_not_taken(self, talk):
        headers = {"Content-Type": "image/png"}
        answer = talk("POST", "/v1/segment/batch", content=png(NIGHT), headers=headers)
        assert status_and_code(answer) == (415, "unsupported_media_type")


class TestLibraries:
    def test_adapters_are_listed_by_name_with_what_they_are(self, talk):
        told = talk("GET", "/v1/adapters").json()
        assert (told["library"], told["generation"]) == ("main", len(DOMAINS))
        assert [a["name"] for a in told["adapters"]] == sorted(DOMAINS)
        assert told["adapters"][0]["classes"] == list(CLASSES)

    def test_card_is_shown_without_centroids(self, talk):
        card = talk("GET", "/v1/adapters/fog?library=main").json()
        assert card["name"] == "fog"
        assert "centroids" not in card

    @pytest.mark.parametrize("name", ["nix", "FOG", "..%2f..%2fetc%2fpasswd", "fog%00", "%ff"])
    def test_other_names_are_not_found(self, talk, name):
        answer = talk("GET", f"/v1/adapters/{name}")
        assert answer.status_code == 404

    def test_library_tells_its_state(self, talk):
        told = talk("GET", "/v1/library").json()
        assert told["adapters"] == len(DOMAINS)
        assert told["unavailable"] == told["misfits"] == 0
        assert told["libraries"] == [{"library": "main"}]
        assert told["problem"] is None

    def test_base_tells_what_is_frozen(self, talk):
        told = talk("GET", "/v1/base").json()
        assert len(told["digest"]) == 64

    def test_unknown_parameters_are_refused_with_a_hint(self, talk):
        answer = talk("GET", "/v1/adapters?libary=main")
        assert status_and_code(answer) == (422, "invalid")
        assert "did you mean 'library'?" in answer.json()["detail"]

    def test_refresh_is_closed_without_tokens(self, talk):
        assert status_and_code(talk("POST", "/v1/library/refresh")) == (403, "forbidden")


class TestOpenRoutes:
    def test_ready_and_healthy(self, talk):
        assert talk("GET", "/readyz").json() == {"ready": True, "waiting_for": []}
        assert talk("GET", "/healthz").json() == {"status": "ok"}

    def test_head_is_get_without_a_body(self, talk):
        answer = talk("HEAD", "/healthz")
        assert answer.status_code == 200
        assert answer.content == b""

    def test_examples_are_pictures_that_can_be_segmented(self, talk):
        examples = talk("GET", "/v1/examples").json()["examples"]
        answer = talk("GET", f"/{examples[3]['url']}")
        assert answer.headers["content-type"] == "image/png"
        assert talk.segment(answer.content, ",".join(examples[3]["classes"])).status_code == 200

    @pytest.mark.parametrize("n", ["99", "-1", "x", "1e3", "٣", "9" * 5000])
    def test_other_examples_are_not_found(self, talk, n):
        assert status_and_code(talk("GET", f"/v1/examples/{n}.png")) == (404, "not_found")

    def test_unknown_paths_and_methods_are_problems_too(self, talk):
        assert status_and_code(talk("GET", "/v2/segment")) == (404, "not_found")
        assert status_and_code(talk("GET", "/v1/base/", headers={"Host": "evil.example"}))[0] == 404
        answer = talk("GET", "/v1/segment")
        assert status_and_code(answer) == (405, "method_not_allowed")
        assert answer.headers["allow"] == "POST"
