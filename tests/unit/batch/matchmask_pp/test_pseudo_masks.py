import dataclasses
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.matchmask_pp.pseudo_masks import (
    SUMMARY_KEY,
    PseudoMaskConfig,
    PseudoMaskWriter,
    list_images,
    plan_units,
    write_pseudo_masks,
    write_summary,
)
from loraseg.batch.synthesize.mask_sources import MaskSource
from loraseg.data.masks import read_mask
from loraseg.errors import ConfigError, DatasetError, StoreError
from loraseg.segment.closed_set.checkpoint import load_closed_set_segmenter
from loraseg.storage import LocalStore, open_store
from tests.tiny_synthesis import CLASSES, write_segmenter


def write_masks(config):
    """Write the masks of all images; return why an image has none, by key."""
    rejected = {}
    for unit in plan_units(list_images(config.images)):
        rejected |= PseudoMaskWriter(config)(unit)
    return rejected


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "data" / "images" / "train"
    folder.mkdir(parents=True)
    for number in range(3):
        random = np.random.default_rng(number)
        pixels = random.integers(0, 256, (32, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"not an image")
    write_segmenter(tmp_path / "s.safetensors")
    return PseudoMaskConfig(
        images=str(tmp_path / "data"),
        output=str(tmp_path / "masks"),
        segmenter=str(tmp_path / "s.safetensors"),
        threshold=0.32,
    )


def test_masks_hold_the_confident_predictions(config, tmp_path):
    keys = list_images(config.images)
    assert [key.rpartition("/")[2] for key in keys] == ["0.png", "1.png", "2.png", "broken.jpg"]
    rejected = write_masks(config)
    assert list(rejected) == ["images/train/broken.jpg"]
    segmenter = load_closed_set_segmenter(config.segmenter)
    for number in range(3):
        image = np.asarray(Image.open(tmp_path / "data" / "images" / "train" / f"{number}.png"))
        scores = segmenter.log_probabilities(image[None])[0].double().exp().numpy()
        expected = np.where(scores.max(0) >= 0.32, scores.argmax(0), 255)
        mask = read_mask(tmp_path / "masks" / "masks" / "train" / f"{number}.png.png")
        assert np.mean(mask == expected) > 0.999  # probabilities at the threshold may round
        assert 0 < np.mean(mask == 255) < 1
    summary = write_summary(config, rejected)
    assert (summary["masks"], summary["segmenter"]) == (3, segmenter.digest)
    assert (tmp_path / "masks" / SUMMARY_KEY).is_file()
    source = MaskSource(config.output, (), "train")
    assert len(source.list_conditions()) == 3
    assert source.label_space().names == CLASSES


def test_an_image_without_a_confident_pixel_has_no_mask(config):
    strict = PseudoMaskConfig(
        images=config.images, output=config.output, segmenter=config.segmenter, threshold=1.0
    )
    assert len(write_masks(strict)) == 4


def test_equal_names_in_different_folders_have_their_own_masks(config, tmp_path):
    folder = tmp_path / "data" / "images" / "train"
    (folder / "broken.jpg").unlink()
    for number, city in enumerate(("aachen", "bochum/west", "a\N{DIAERESIS} b"), start=1):
        (folder / city).mkdir(parents=True)
        shutil.copy(folder / f"{number % 3}.png", folder / city / "0.png")
    keys = list_images(config.images)
    assert len(keys) == 6
    assert write_masks(config) == {}
    masks = tmp_path / "masks" / "masks" / "train"
    for key in keys:
        path = key.removeprefix("images/train/")
        source = next(n for n in range(3) if _same(folder / path, folder / f"{n}.png"))
        assert _same(masks / f"{path}.png", masks / f"{source}.png.png")
    assert not _same(masks / "0.png.png", masks / "aachen" / "0.png.png")
    assert write_summary(config, {})["masks"] == 6
    assert len(MaskSource(config.output, (), "train").list_conditions()) == 6


def _same(path, other):
    return path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("back\\slash.png", "backslash"),
        ("new\nline.png", "control characters"),
        ("half\udc80.png", "not valid Unicode"),
        (
            "x" * 197 + ".png",
            "exceeds 200 bytes",
        ),  # the key of the mask is longer than that of the image
        ("0.png.png/b.png", r"ends in \.png"),  # clashes with the mask of 0.png
        ("a.jpg.png/b.png", r"ends in \.png"),  # could clash with the mask of a.jpg
    ],
)
def test_an_image_without_a_valid_mask_key_is_rejected(name, reason, config, tmp_path):
    folder = tmp_path / "data" / "images" / "train"
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copy(folder / "0.png", folder / name)
    rejected = write_masks(config)
    assert set(rejected) == {"images/train/broken.jpg", f"images/train/{name}"}
    assert re.search(reason, rejected[f"images/train/{name}"])
    summary = write_summary(config, rejected)
    assert (summary["masks"], len(summary["refused"])) == (3, 2)


def test_a_store_error_ends_the_run(config, monkeypatch):
    def fail(*_):
        raise StoreError("no space")

    monkeypatch.setattr(LocalStore, "put", fail)
    with pytest.raises(StoreError, match="no space"):
        write_masks(config)


def test_an_executor_writes_the_same_masks_and_summary(config, tmp_path):
    summary = write_pseudo_masks(config, LocalExecutor())
    other = dataclasses.replace(config, output=str(tmp_path / "other"))
    assert write_summary(other, write_masks(other)) == summary
    for path in (tmp_path / "masks").rglob("*"):
        copy = tmp_path / "other" / path.relative_to(tmp_path / "masks")
        assert path.is_dir() or path.read_bytes() == copy.read_bytes()


def test_the_digest_of_the_summary_depends_on_the_masks(config):
    write_masks(config)
    before = write_summary(config, {})
    assert write_summary(config, {}) == before
    store = open_store(config.output)
    store.put("masks/train/0.png.png", store.get("masks/train/1.png.png"))
    after = write_summary(config, {})
    assert after.pop("digest") != before.pop("digest")
    assert after == before


def test_images_are_cut_into_units():
    units = plan_units([str(number) for number in range(130)])
    assert [len(unit.keys) for unit in units] == [64, 64, 2]
    assert len({unit.id for unit in units}) == 3
    assert str(units[0]) == "images '0' to '63'"


def test_missing_images_and_a_wrong_threshold_are_errors(config, tmp_path):
    with pytest.raises(DatasetError, match="no images; expected images/val/"):
        list_images(str(tmp_path / "data"), "val")
    with pytest.raises(ConfigError, match=r"threshold: got 2\.0"):
        PseudoMaskConfig(images="i", output="o", segmenter="s", threshold=2.0)
