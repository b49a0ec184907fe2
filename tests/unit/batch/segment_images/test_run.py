"""Segmentation of a folder without Ray: masks of the CLI, kills, changed inputs and settings."""

import contextlib
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.segment_images import segment_images
from loraseg.batch.segment_images.mask_names import key_id
from loraseg.cli.entry import main as loraseg
from loraseg.data.masks import read_mask
from loraseg.errors import ConfigError
from loraseg.library import Library
from loraseg.library.records import blob_key, read_record
from loraseg.storage import LocalStore, open_store
from loraseg.train.core.threads import fixed_threads
from tests.executors import UnusedExecutor
from tests.tiny_image_batch import (
    BAD,
    bad_images,
    good_images,
    png,
    put_all,
    read_all,
    write_inputs,
)
from tests.unit.tiny import CLASSES, DOMAINS, domain_images


@pytest.fixture(autouse=True)
def one_thread():
    with fixed_threads(1):
        yield


@pytest.fixture
def config(tmp_path):
    put_all(str(tmp_path / "images"), {**good_images(), **bad_images()})
    return write_inputs(tmp_path, tmp_path / "images", tmp_path / "out")


def rows(uri):
    """Return the rows of all explanation files by key."""
    all_rows = [
        row
        for key, data in read_all(uri).items()
        if key.endswith(".parquet")
        for row in pq.read_table(io.BytesIO(data)).to_pylist()
    ]
    assert len({row["key"] for row in all_rows}) == len(all_rows)
    return {row["key"]: row for row in all_rows}


def test_masks_and_explanations_equal_those_of_the_command_line(config, tmp_path):
    segment_images(config, LocalExecutor())
    by_key = rows(config.output)
    for name in DOMAINS:
        command = ["segment", *sorted(map(str, (tmp_path / "images" / name).glob("*.png")))]
        command += ["--classes", ", ".join(CLASSES), "--library", config.library]
        command += ["--base", config.base, "--encoder", config.encoder, "--top-k", "2"]
        command += ["--temperature", "0.3", "--out", str(tmp_path / "cli" / name)]
        assert loraseg(command) == 0
    for key in good_images():
        mask = tmp_path / "cli" / key
        assert (tmp_path / "out" / "masks" / key).read_bytes() == mask.read_bytes()
        expected, row = json.loads(mask.with_suffix(".json").read_text()), by_key[key]
        assert row["shares"] == list(expected["shares"].values())
        assert (row["mix"], row["base"]) == (expected["mix"], expected["base"])
        adapters = [{**a, "version": str(a["version"])} for a in expected["adapters"]]
        assert row["adapters"] == adapters
        assert len(row["adapters"]) == 2


def test_every_object_has_a_row(config, tmp_path):
    summary = segment_images(config, LocalExecutor())
    by_key = rows(config.output)
    assert summary.new_images == len(by_key) == 16
    assert summary.statuses == {"bad_image": 4, "ok": 12}
    for key in good_images():
        row = by_key[key]
        mask = read_mask(tmp_path / "out" / row["mask"], classes=3)
        assert (row["height"], row["width"]) == mask.shape
        counts = np.bincount(mask.reshape(-1), minlength=3)
        assert row["shares"] == pytest.approx(counts / mask.size, abs=1e-12)
        assert (row["status"], row["generation"], row["classes"]) == ("ok", 4, list(CLASSES))
        assert row["id"] == key_id(key)
    for key, status in BAD.items():
        assert by_key[key]["status"] == status
        assert by_key[key]["mask"] is None
        assert "0x" not in by_key[key]["error"]
    assert "30000 x 30000 pixels" in by_key["huge.png"]["error"]


def test_the_mask_is_an_indexed_png_with_the_class_colours(config, tmp_path):
    segment_images(config, LocalExecutor())
    image = Image.open(tmp_path / "out" / "masks" / "day" / "0 é.png")
    assert image.mode == "P"
    colours = np.array(image.getpalette()).reshape(-1, 3)[: len(CLASSES)]
    assert colours.tolist() == config.label_space().palette.tolist()


def test_a_second_run_does_nothing(config, monkeypatch):
    segment_images(config, LocalExecutor())
    before = read_all(config.output)
    for write in ("put", "put_if_absent", "put_if_match", "delete"):
        monkeypatch.setattr(LocalStore, write, _forbidden)
    summary = segment_images(config, UnusedExecutor())
    assert summary.new_images == 0
    assert read_all(config.output) == before


def _forbidden(*_):
    raise AssertionError("the store is written")


class _SimulatedKill(BaseException):
    pass


@pytest.mark.parametrize("writes_before_kill", [0, 6, 15])
def test_a_run_after_a_kill_writes_the_same_bytes(
    config, tmp_path, monkeypatch, writes_before_kill
):
    segment_images(config, LocalExecutor())
    expected = read_all(config.output)
    writes = 0

    def killing(method):
        def write(self, *arguments):
            nonlocal writes
            writes += 1
            if writes > writes_before_kill:
                raise _SimulatedKill
            return method(self, *arguments)

        return write

    again = replace(config, output=str(tmp_path / "again"))
    with monkeypatch.context() as patch:
        for name in ("put", "put_if_absent", "put_if_match"):
            patch.setattr(LocalStore, name, killing(getattr(LocalStore, name)))
        # A whole run writes 18 times: the state, 12 masks, 4 files and the manifest.
        with pytest.raises(_SimulatedKill):
            segment_images(again, LocalExecutor())
        assert not (tmp_path / "again" / "manifest.json").exists()
    segment_images(again, LocalExecutor())
    assert read_all(again.output) == expected


def test_new_images_are_added(config, tmp_path):
    segment_images(config, LocalExecutor())
    before = read_all(config.output)
    put_all(config.images, {"day/0 é.jpg": png(domain_images("fog", 1)[0], "JPEG")})
    assert segment_images(config, LocalExecutor()).new_images == 1
    after = read_all(config.output)
    manifest = before.pop("manifest.json")
    assert before.items() <= after.items()
    assert json.loads(manifest)["images"] == 16
    assert json.loads(after["manifest.json"])["images"] == 17
    # It sorts before the PNG of the same name, which has the plain mask name from the first run.
    assert (
        rows(config.output)["day/0 é.jpg"]["mask"] == f"masks/day/0 é~{key_id('day/0 é.jpg')}.png"
    )


def test_a_replaced_image_is_segmented_again(config, tmp_path):
    segment_images(config, LocalExecutor())
    replaced = {"day/1 é.png": png(domain_images("night", 2)[1][:, :16])}
    store = put_all(config.images, replaced)
    assert 1 <= segment_images(config, LocalExecutor()).new_images <= config.images_per_file
    assert rows(config.output)["day/1 é.png"]["width"] == 16
    fresh = replace(config, output=str(tmp_path / "fresh"))
    segment_images(fresh, LocalExecutor())
    assert masks(fresh) == masks(config)
    assert rows(fresh.output) == rows(config.output)
    assert store.exists("day/1 é.png")


@pytest.mark.parametrize("deletes_before_kill", [0, 2, 5])
def test_a_kill_while_files_are_invalidated(config, tmp_path, monkeypatch, deletes_before_kill):
    segment_images(config, LocalExecutor())
    put_all(config.images, {"day/1 é.png": png(domain_images("night", 2)[1][:, :16])})
    deletes = 0

    def delete(self, key, whole=LocalStore.delete):
        nonlocal deletes
        deletes += 1
        if deletes > deletes_before_kill:
            raise _SimulatedKill
        whole(self, key)

    with monkeypatch.context() as patch, contextlib.suppress(_SimulatedKill):
        patch.setattr(LocalStore, "delete", delete)
        segment_images(config, LocalExecutor())
    segment_images(config, LocalExecutor())
    fresh = replace(config, output=str(tmp_path / "fresh"))
    segment_images(fresh, LocalExecutor())
    assert masks(fresh) == masks(config)
    assert rows(fresh.output) == rows(config.output)


def masks(config):
    return {key: data for key, data in read_all(config.output).items() if "masks" in key}


def test_results_of_deleted_images_are_kept(config, tmp_path):
    segment_images(config, LocalExecutor())
    before = read_all(config.output)
    shutil.rmtree(tmp_path / "images" / "day")
    assert segment_images(config, LocalExecutor()).new_images == 0
    assert read_all(config.output) == before


def test_other_settings_are_refused(config):
    segment_images(config, LocalExecutor())
    for change, message in (
        ({"classes": ("road", "car")}, r'classes was \["road", "car", "sky"\] and is'),
        ({"k": 1}, "k was 2 and is 1"),
        ({"temperature": 0.4}, "temperature was 0.3 and is 0.4"),
        ({"generation": 3}, "generation was 4 and is 3"),
        ({"mode": "uniform"}, 'mode was "fused" and is "uniform"'),
        ({"images_per_file": 5}, "images_per_file was 4 and is 5"),
    ):
        with pytest.raises(ConfigError, match=message):
            segment_images(replace(config, **change), LocalExecutor())


def test_other_threads_are_refused(config):
    segment_images(config, LocalExecutor())
    with pytest.raises(ConfigError, match="threads was 1 and is 2"):
        segment_images(config, LocalExecutor(2))


def test_another_base_under_the_same_name_is_refused(config, tmp_path):
    segment_images(config, LocalExecutor())
    put_all(config.images, good_images(["day"], 4))
    data = bytearray((tmp_path / "base.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "base.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match="was created with base"):
        segment_images(config, LocalExecutor())


def test_the_generation_of_the_first_run_is_kept(config):
    segment_images(config, LocalExecutor())
    put_all(config.images, good_images(["day"], 4))
    library = Library(open_store(config.library))
    files, card = library.load("night")
    library.publish("day", files, replace(card, name="day"))
    assert library.generation() == 5
    assert segment_images(config, LocalExecutor()).generation == 4
    assert rows(config.output)["day/3 é.png"]["generation"] == 4
    with pytest.raises(ConfigError, match="generation was 4 and is 5"):
        segment_images(replace(config, generation=5), LocalExecutor())


def test_images_that_failed_are_segmented_again(config, tmp_path, monkeypatch):
    whole = replace(config, output=str(tmp_path / "whole"))
    segment_images(whole, LocalExecutor())
    monkeypatch.setenv("LORASEG_CACHE", str(tmp_path / "another cache"))
    store = open_store(config.library)
    used = [part["name"] for row in rows(whole.output).values() for part in row["adapters"] or ()]
    rare = min(sorted(set(used)), key=used.count)
    record = read_record(store, Library(store).entry(rare))
    weights = record.files["adapter_model.safetensors"].sha256
    blob = tmp_path / "library" / blob_key(weights)
    kept = blob.read_bytes()
    blob.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    first = segment_images(config, LocalExecutor())
    assert first.statuses["failed"] > 0
    assert first.statuses["ok"] > 0
    failed = [row for row in rows(config.output).values() if row["status"] == "failed"]
    assert "is damaged" in failed[0]["error"]
    blob.write_bytes(kept)
    assert segment_images(config, LocalExecutor()).statuses == {
        "bad_image": 4,
        "ok": 12,
    }
    assert masks(config) == masks(whole)
    assert rows(config.output) == rows(whole.output)
