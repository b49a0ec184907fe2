import re
import shutil

import numpy as np
import pytest
from PIL import Image

from loraseg.batch.matchmask_pp.pseudo_masks import (
    SUMMARY_KEY,
    PseudoMaskConfig,
    PseudoMaskWriter,
    list_images,
    work_units,
    write_summary,
)
from loraseg.batch.synthesize.mask_sources import MaskSource
from loraseg.data.masks import read_mask
from loraseg.errors import ConfigError, DatasetError, StoreError
from loraseg.segment.closed_set.checkpoint import load_closed_set_segmenter
from loraseg.storage import LocalStore, open_store
from tests.tiny_synthesis import CLASSES, write_segmenter


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "data" / "images" / "train"
    folder.mkdir(parents=True)
    for number in range(3):
        random = np.random.default_rng(number)
        pixels = random.integers(0, 256, (32, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    write_segmenter(tmp_path / "s.safetensors")
    return PseudoMaskConfig(
        images=str(tmp_path / "data"),
        output=str(tmp_path / "masks"),
        segmenter=str(tmp_path / "s.safetensors"),
        threshold=0.32,
    )


def test_masks_say_what_the_segmenter_is_sure_of(config, tmp_path):
    keys = list_images(config.images)
    assert [key.rpartition("/")[2] for key in keys] == ["0.png", "1.png", "2.png", "broken.jpg"]
    refused = PseudoMaskWriter(config)(keys)
    assert list(refused) == ["images/train/broken.jpg"]
    segmenter = load_closed_set_segmenter(config.segmenter)
    for number in range(3):
        image = np.asarray(Image.open(tmp_path / "data" / "images" / "train" / f"{number}.png"))
        scores = segmenter.log_probabilities(image[None])[0].double().exp().numpy()
        expected = np.where(scores.max(0) >= 0.32, scores.argmax(0), 255)
        found = read_mask(tmp_path / "masks" / "masks" / "train" / f"{number}.png.png")
        assert np.mean(found == expected) > 0.999  # probabilities at the threshold may round
        assert 0 < np.mean(found == 255) < 1
    note = write_summary(config, refused)
    assert (note["masks"], note["segmenter"]) == (3, segmenter.digest)
    assert (tmp_path / "masks" / SUMMARY_KEY).is_file()
    source = MaskSource(config.output, (), "train")
    assert len(source.list_conditions()) == 3
    assert source.label_space().names == CLASSES


def test_an_image_that_nothing_is_sure_of_has_no_mask(config):
    sure = PseudoMaskConfig(
        images=config.images, output=config.output, segmenter=config.segmenter, threshold=1.0
    )
    refused = PseudoMaskWriter(sure)(list_images(sure.images))
    assert len(refused) == 4


def test_images_in_folders_keep_masks_of_their_own(config, tmp_path):
    folder = tmp_path / "data" / "images" / "train"
    (folder / "broken.jpg").unlink()
    for number, city in enumerate(("aachen", "bochum/west", "a\N{DIAERESIS} b"), start=1):
        (folder / city).mkdir(parents=True)
        shutil.copy(folder / f"{number % 3}.png", folder / city / "0.png")
    keys = list_images(config.images)
    assert len(keys) == 6
    assert PseudoMaskWriter(config)(keys) == {}
    masks = tmp_path / "masks" / "masks" / "train"
    for key in keys:
        path = key.removeprefix("images/train/")
        source = next(n for n in range(3) if _same(folder / path, folder / f"{n}.png"))
        assert _same(masks / f"{path}.png", masks / f"{source}.png.png")
    assert not _same(masks / "0.png.png", masks / "aachen" / "0.png.png")
    assert write_summary(config, {})["masks"] == 6
    assert len(MaskSource(config.output, (), "train").list_conditions()) == 6


def _same(one, other):
    return one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("back\\slash.png", "backslash"),
        ("new\nline.png", "control characters"),
        ("half\udc80.png", "not valid Unicode"),
        ("x" * 197 + ".png", "exceeds 200 bytes"),  # the mask's name is longer than the image's
        ("0.png.png/b.png", r"ends in \.png"),  # the mask of 0.png is in the way
        ("a.jpg.png/b.png", r"ends in \.png"),  # and so may be one that comes later
    ],
)
def test_an_image_whose_name_no_mask_can_have_is_refused_alone(name, reason, config, tmp_path):
    folder = tmp_path / "data" / "images" / "train"
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copy(folder / "0.png", folder / name)
    refused = PseudoMaskWriter(config)(list_images(config.images))
    assert set(refused) == {"images/train/broken.jpg", f"images/train/{name}"}
    assert re.search(reason, refused[f"images/train/{name}"])
    note = write_summary(config, refused)
    assert (note["masks"], len(note["refused"])) == (3, 2)


def test_a_store_that_fails_is_no_bad_image(config, monkeypatch):
    def fails(*_):
        raise StoreError("no space")

    work = PseudoMaskWriter(config)
    monkeypatch.setattr(LocalStore, "put", fails)
    with pytest.raises(StoreError, match="no space"):
        work(list_images(config.images))


def test_the_note_tells_the_masks(config):
    keys = list_images(config.images)
    PseudoMaskWriter(config)(keys)
    before = write_summary(config, {})
    assert write_summary(config, {}) == before
    store = open_store(config.output)
    store.put("masks/train/0.png.png", store.get("masks/train/1.png.png"))
    after = write_summary(config, {})
    assert after.pop("digest") != before.pop("digest")
    assert after == before


def test_images_are_cut_into_chunks_and_must_be_there(config, tmp_path):
    assert [len(one) for one in work_units([str(n) for n in range(130)])] == [64, 64, 2]
    with pytest.raises(DatasetError, match="no images; expected images/val/"):
        list_images(str(tmp_path / "data"), "val")
    with pytest.raises(ConfigError, match=r"threshold: got 2\.0"):
        PseudoMaskConfig(images="i", output="o", segmenter="s", threshold=2.0)
