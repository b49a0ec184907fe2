import numpy as np
import pytest
from PIL import Image

from loraseg.data.masks import read_mask
from loraseg.errors import ConfigError, DatasetError
from loraseg.factory.pseudo import PSEUDO, PseudoConfig, PseudoMasks, chunks, finish, unlabelled
from loraseg.factory.sources import MaskSource
from loraseg.segment.closed_checkpoint import load_segmenter
from tests.tiny_factory import CLASSES, write_segmenter


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
    return PseudoConfig(
        images=str(tmp_path / "data"),
        output=str(tmp_path / "masks"),
        segmenter=str(tmp_path / "s.safetensors"),
        threshold=0.32,
    )


def test_masks_say_what_the_segmenter_is_sure_of(config, tmp_path):
    keys = unlabelled(config)
    assert [key.rpartition("/")[2] for key in keys] == ["0.png", "1.png", "2.png", "broken.jpg"]
    refused = PseudoMasks(config)(keys)
    assert list(refused) == ["images/train/broken.jpg"]
    segmenter = load_segmenter(config.segmenter)
    for number in range(3):
        image = np.asarray(Image.open(tmp_path / "data" / "images" / "train" / f"{number}.png"))
        scores = segmenter.log_probabilities(image[None])[0].double().exp().numpy()
        expected = np.where(scores.max(0) >= 0.32, scores.argmax(0), 255)
        found = read_mask(tmp_path / "masks" / "masks" / "train" / f"{number}.png.png")
        assert np.mean(found == expected) > 0.999  # probabilities at the threshold may round
        assert 0 < np.mean(found == 255) < 1
    note = finish(config, refused)
    assert (note["masks"], note["segmenter"]) == (3, segmenter.digest)
    assert (tmp_path / "masks" / PSEUDO).is_file()
    source = MaskSource(config.output, (), "train")
    assert len(source.names()) == 3
    assert source.label_space().names == CLASSES


def test_an_image_that_nothing_is_sure_of_has_no_mask(config):
    sure = PseudoConfig(
        images=config.images, output=config.output, segmenter=config.segmenter, threshold=1.0
    )
    refused = PseudoMasks(sure)(unlabelled(sure))
    assert len(refused) == 4


def test_images_are_cut_into_chunks_and_must_be_there(config, tmp_path):
    assert [len(one) for one in chunks([str(n) for n in range(130)])] == [64, 64, 2]
    with pytest.raises(DatasetError, match="no images; expected images/val/"):
        unlabelled(
            PseudoConfig(images=str(tmp_path / "data"), output="o", segmenter="s", split="val")
        )
    with pytest.raises(ConfigError, match=r"threshold: got 2\.0"):
        PseudoConfig(images="i", output="o", segmenter="s", threshold=2.0)
