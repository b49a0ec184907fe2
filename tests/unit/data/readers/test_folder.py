import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loraseg.data.datasets import check_samples, digest_samples, load_pair
from loraseg.data.labels import LabelSpace, write_classes
from loraseg.data.masks import write_mask
from loraseg.data.readers.opening import open_dataset
from loraseg.errors import DatasetError

SPACE = LabelSpace(("road", "sky", "car"))
STEMS = ("0001", "0002", "0003")


def arrays(stem):
    generator = np.random.default_rng(int(stem))
    image = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    mask = generator.choice(np.array([0, 1, 2, 255], dtype=np.uint8), (6, 8))
    return image, mask


@pytest.fixture(params=["folders", "lists"])
def layout(request):
    return request.param


@pytest.fixture
def folder(tmp_path, layout):
    """A dataset with splits "train" and "val" of three samples, in one of the two layouts."""
    root = tmp_path / "set"
    root.mkdir()
    write_classes(root / "classes.json", SPACE)
    for split, offset in (("train", 0), ("val", 10)):
        inner = split if layout == "folders" else "."
        for kind in ("images", "masks"):
            (root / kind / inner).mkdir(parents=True, exist_ok=True)
        stems = [f"{int(stem) + offset:04d}" for stem in STEMS]
        for stem in stems:
            image, mask = arrays(stem)
            Image.fromarray(image).save(root / "images" / inner / f"{stem}.png")
            write_mask(root / "masks" / inner / f"{stem}.png", mask, SPACE)
        if layout == "lists":
            (root / f"{split}.txt").write_text("\n".join(reversed(stems)) + "\n\n")
    return root


@pytest.fixture
def path_of(folder, layout):
    """Return the path of a file of the split "train"."""
    inner = "train" if layout == "folders" else "."
    return lambda kind, name: folder / kind / inner / name


def break_sample(target, how):
    if how == "truncated":
        path = target("images", "0002.png")
        path.write_bytes(path.read_bytes()[:60])
    elif how == "not an image":
        target("images", "0002.png").write_text("hello")
    elif how == "no mask":
        target("masks", "0002.png").unlink()
    elif how == "size":
        write_mask(target("masks", "0002.png"), np.zeros((8, 6), np.uint8))
    elif how == "ids":
        write_mask(target("masks", "0002.png"), np.full((6, 8), 7, np.uint8))
    elif how == "colours":
        Image.new("RGB", (8, 6)).save(target("masks", "0002.png"))


BROKEN = {
    "truncated": r"images.*0002\.png: the image is broken or cut off",
    "not an image": r"images.*0002\.png: the image is neither a PNG nor a JPEG",
    "no mask": r"0002\.png: no mask; expected it at .*masks.*0002\.png",
    "size": r"masks.*0002\.png: 6 x 8 pixels; expected 8 x 6 as in its image .*0002\.png",
    "ids": r"masks.*0002\.png: ids \[7\] outside the class list; expected 0 to 2 or 255",
    "colours": r"masks.*0002\.png: a mask of mode RGB",
}


def test_reads_both_layouts(folder):
    data = open_dataset(folder)
    assert data.label_space == SPACE
    assert data.splits == ("train", "val")
    assert [sample.id for sample in data.samples("train")] == list(STEMS)
    assert [sample.id for sample in data.samples("val")] == ["0011", "0012", "0013"]
    for sample in data.samples("train"):
        image, mask = load_pair(data, sample)
        expected_image, expected_mask = arrays(sample.id)
        np.testing.assert_array_equal(image, expected_image)
        np.testing.assert_array_equal(mask, expected_mask)
    check_samples(data, data.samples("val"))
    assert data.skipped == ()


def test_a_file_uri_is_a_path(folder):
    spaced = folder.rename(folder.with_name("a set"))
    assert len(open_dataset(spaced.as_uri()).samples("train")) == 3


@pytest.mark.parametrize("how", BROKEN)
def test_broken_samples_are_named(folder, path_of, how):
    break_sample(path_of, how)
    data = open_dataset(folder)
    with pytest.raises(DatasetError, match=BROKEN[how]):
        check_samples(data, data.samples("train"))
    check_samples(data, data.samples("val"))


@pytest.mark.parametrize("how", BROKEN)
def test_broken_samples_can_be_skipped(folder, path_of, how):
    break_sample(path_of, how)
    data = open_dataset(folder, skip_bad=True)
    assert [sample.id for sample in data.samples("train")] == ["0001", "0003"]
    data.samples("train")
    ((path, reason),) = data.skipped
    assert Path(path).resolve() == path_of("images", "0002.png").resolve()
    assert reason
    with pytest.raises(DatasetError, match=BROKEN[how]):
        raise DatasetError(reason)


def test_a_split_without_usable_samples_is_an_error(folder, path_of):
    for stem in STEMS:
        path_of("images", f"{stem}.png").write_bytes(b"")
    data = open_dataset(folder, skip_bad=True)
    with pytest.raises(DatasetError, match="split 'train' has no usable image"):
        data.samples("train")
    assert len(data.skipped) == 3


def test_a_split_without_mask_folder_is_unlabelled(folder, path_of):
    for path in (folder / "masks").rglob("*.png"):
        path.unlink()
    path_of("masks", "x").parent.rmdir()
    data = open_dataset(folder)
    sample = data.samples("train")[0]
    assert sample.mask is None
    assert data.load_image(sample).shape == (6, 8, 3)
    assert data.digest(sample)[1] is None
    with pytest.raises(DatasetError, match="has no mask"):
        load_pair(data, sample)
    check_samples(data, [sample])


def test_absent_splits_and_folders(folder, tmp_path):
    data = open_dataset(folder)
    with pytest.raises(DatasetError, match=r"no split 'test': .* \(splits: train, val\)"):
        data.samples("test")
    for split in ("../train", "", "a/b"):
        with pytest.raises(DatasetError, match="not a plain file name"):
            data.samples(split)
    with pytest.raises(DatasetError, match="not a dataset; expected a folder 'images'"):
        open_dataset(tmp_path / "nowhere")
    (folder / "classes.json").unlink()
    with pytest.raises(DatasetError, match=r"classes\.json: cannot read the class list"):
        open_dataset(folder)


@pytest.mark.parametrize("layout", ["folders"], indirect=True)
def test_empty_folder_and_stray_files(folder, path_of):
    path_of("images", ".DS_Store").write_bytes(b"x")
    path_of("images", "._0001.png").write_bytes(b"x")
    path_of("images", "readme.md").write_bytes(b"x")
    assert len(open_dataset(folder).samples("train")) == 3
    (folder / "images" / "empty").mkdir()
    with pytest.raises(DatasetError, match="split 'empty' has no usable image"):
        open_dataset(folder).samples("empty")


def test_images_with_equal_stems_are_rejected(folder, path_of):
    Image.new("RGB", (8, 6)).save(path_of("images", "0001.jpg"))
    with pytest.raises(DatasetError, match=r"0001\.png: 0001\.jpg has the same stem"):
        open_dataset(folder).samples("train")


@pytest.mark.parametrize("layout", ["lists"], indirect=True)
@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("0099", r"train\.txt: stem '0099' has no image in images/"),
        ("../masks/0001", r"train\.txt: '\.\./masks/0001' is not a plain file name"),
        ("..", "'..' is not a plain file name"),
        ("/etc/passwd", "is not a plain file name"),
        ("a\\b", "is not a plain file name"),
        ("a\x07b", "is not a plain file name"),
    ],
)
def test_invalid_stems_in_lists(folder, line, match):
    (folder / "train.txt").write_text(f"0001\n{line}\n")
    with pytest.raises(DatasetError, match=match):
        open_dataset(folder).samples("train")
    data = open_dataset(folder, skip_bad=True)
    assert [sample.id for sample in data.samples("train")] == ["0001"]
    assert len(data.skipped) == 1


@pytest.mark.parametrize("layout", ["lists"], indirect=True)
def test_unreadable_lists(folder):
    (folder / "train.txt").write_text("0001\n0002\n0001\n")
    with pytest.raises(DatasetError, match=r"train\.txt: stem '0001' is listed twice"):
        open_dataset(folder, skip_bad=True).samples("train")
    (folder / "train.txt").write_bytes(b"0001\n\xff\n")
    with pytest.raises(DatasetError, match=r"train\.txt: expected UTF-8"):
        open_dataset(folder).samples("train")
    (folder / "train.txt").write_text("\n \n")
    with pytest.raises(DatasetError, match="split 'train' has no usable image"):
        open_dataset(folder).samples("train")


def test_digest_depends_only_on_content(folder, path_of, tmp_path):
    data = open_dataset(folder)
    samples = data.samples("train")
    digest = digest_samples(data, samples)
    assert digest_samples(data, samples[::-1]) == digest
    moved = folder.rename(tmp_path / "moved")
    there = open_dataset(moved)
    assert digest_samples(there, there.samples("train")) == digest
    moved.rename(folder)
    assert digest_samples(data, samples[:2]) != digest
    assert digest_samples(data, data.samples("val")) != digest
    write_classes(folder / "classes.json", LabelSpace(("road", "sky", "bus")))
    assert digest_samples(open_dataset(folder), samples) != digest
    for kind in ("images", "masks"):
        path = path_of(kind, "0001.png")
        before = path.read_bytes()
        path.write_bytes(before + b"\0")
        assert digest_samples(data, samples) != digest
        path.write_bytes(before)
    assert digest_samples(data, samples) == digest
    path_of("images", "0001.png").unlink()
    with pytest.raises(DatasetError, match=r"0001\.png: cannot be read"):
        digest_samples(data, samples)


def test_digest_is_pinned(folder):
    """Adapters' task digests contain it, so it must never change."""
    data = open_dataset(folder)
    sample = data.samples("train")[0]
    image, mask = (
        hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in (sample.image, sample.mask)
    )
    text = f'[["road","sky","car"],[["0001","{image}","{mask}"]]]'
    assert digest_samples(data, [sample]) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.skipif("LORASEG_TEST_DATA" not in os.environ, reason="LORASEG_TEST_DATA names no sets")
def test_every_sample_of_real_datasets_is_readable():
    roots = sorted(
        path.parent for path in Path(os.environ["LORASEG_TEST_DATA"]).glob("*/classes.json")
    )
    assert roots
    for root in roots:
        data = open_dataset(root)
        for split in data.splits:
            check_samples(data, data.samples(split))
