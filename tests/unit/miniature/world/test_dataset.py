import numpy as np
import pytest
from PIL import Image

from loraseg.data import open_dataset, read_mask
from loraseg.errors import ConfigError
from loraseg.miniature.world.captions import LABEL_NAMES
from loraseg.miniature.world.dataset import write_dataset, write_world
from loraseg.miniature.world.render import render


def test_the_folder_holds_the_rendered_scenes(tmp_path):
    write_dataset("snow", tmp_path, train=3, val=2, seed=5)
    folder = open_dataset(tmp_path)
    assert folder.label_space.names == LABEL_NAMES
    for split, count in (("train", 3), ("val", 2)):
        images, masks = render("snow", count, 5, split)
        samples = folder.samples(split)
        assert len(samples) == count
        for sample, image, mask in zip(samples, images, masks, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(sample.image)), image)
            np.testing.assert_array_equal(read_mask(sample.mask), mask)


def test_splits_share_no_scene_and_a_larger_split_keeps_its_scenes(tmp_path):
    small = write_dataset("rain", tmp_path / "small", train=2, val=2, seed=0)
    large = write_dataset("rain", tmp_path / "large", train=4, val=2, seed=0)
    pictures = {path.read_bytes() for path in small.glob("images/*/*.png")}
    assert len(pictures) == 4
    assert pictures <= {path.read_bytes() for path in large.glob("images/*/*.png")}


def test_a_world_has_one_folder_per_domain(tmp_path):
    folders = write_world(tmp_path, ["rain", "night"], train=1, val=1)
    assert folders == {"rain": tmp_path / "rain", "night": tmp_path / "night"}
    assert all((path / "classes.json").is_file() for path in folders.values())
    with pytest.raises(ConfigError, match="named twice"):
        write_world(tmp_path, ["rain", "rain"], train=1, val=1)
    with pytest.raises(ConfigError, match="unknown domain"):
        write_world(tmp_path, ["hail"], train=1, val=1)
