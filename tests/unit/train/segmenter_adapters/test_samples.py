import dataclasses

import numpy as np
import pytest
import torch

from loraseg.data import open_dataset
from loraseg.data.transforms import AugmentConfig
from loraseg.errors import DatasetError
from loraseg.train.core.threads import fixed_threads
from loraseg.train.segmenter_adapters.samples import (
    TrainingImages,
    encode_image_features,
    encode_text,
    has_labels,
    network_input,
    segmentation_loss,
)
from tests.tiny_training import write_domain
from tests.unit.tiny import tiny_base

PLAIN = AugmentConfig(crop=64, shortest_edge=(), flip=0.0, jitter=False)
FULL = AugmentConfig(crop=24, shortest_edge=(24, 32))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(write_domain(tmp_path_factory.mktemp("data"), "fog", train=5))


def loss_of(base, classes, batch, precision="fp32", **options):
    """The loss on a batch, from pixels and class names."""
    images, labels = batch
    text = encode_text(base, base.tokenize(classes), precision)
    side = encode_image_features(base, images, precision)
    return segmentation_loss(base, text, side, labels, precision=precision, **options)


def batches(dataset, augmentation=FULL, **options):
    return TrainingImages(dataset, dataset.samples("train"), augmentation, **options)


def test_a_batch_depends_on_seed_keys_and_step_only(dataset):
    images, again = batches(dataset, keys=("a",)), batches(dataset, keys=("a",))
    later = [again.batch(step, 3) for step in (4, 0, 2)]
    for step, expected in zip((4, 0, 2), later, strict=True):
        got = images.batch(step, 3)
        assert all(np.array_equal(x, y) for x, y in zip(got, expected, strict=True))
    first = images.batch(0, 3)[0]
    assert first.shape == (3, 24, 24, 3)
    assert not np.array_equal(first, images.batch(1, 3)[0])
    for other in ({"keys": ("b",)}, {"keys": ("a",), "seed": 1}):
        assert not np.array_equal(first, batches(dataset, **other).batch(0, 3)[0])


def test_every_image_occurs_once_per_epoch(dataset):
    images = batches(dataset, PLAIN)
    originals = {dataset.load_image(s).tobytes(): s.id for s in dataset.samples("train")}
    seen = [originals[i.tobytes()] for step in range(6) for i in images.batch(step, 5)[0]]
    rounds = [seen[start : start + 5] for start in range(0, 30, 5)]
    assert all(sorted(ids) == ["0", "1", "2", "3", "4"] for ids in rounds)
    assert len({tuple(ids) for ids in rounds}) > 1
    # Another batch size divides the same sequence.
    assert [originals[i.tobytes()] for step in range(10) for i in images.batch(step, 3)[0]] == seen


def test_resizing_once_equals_resizing_each_time(dataset, monkeypatch):
    augmentation = AugmentConfig(crop=24, shortest_edge=(32,), jitter=False)
    cached = batches(dataset, augmentation)
    monkeypatch.setattr("loraseg.train.segmenter_adapters.samples._CACHE_BYTES", 0)
    again = batches(dataset, augmentation)
    for step in (0, 1, 2):
        for x, y in zip(cached.batch(step, 4), again.batch(step, 4), strict=True):
            assert np.array_equal(x, y)


@pytest.mark.parametrize("size", [(32, 48), (64, 64), (80, 33)])
def test_first_resize_takes_the_nearest_pixel_of_image_and_mask(dataset, size):
    side = max(size)
    images = batches(dataset, dataclasses.replace(PLAIN, crop=side), first_resize=size)
    got = images.batch(0, 5)
    originals = batches(dataset, PLAIN).batch(0, 5)
    for new, old in zip(got, originals, strict=True):
        maps = torch.from_numpy(old).reshape(5, 64, 64, -1).permute(0, 3, 1, 2).float()
        exact = torch.nn.functional.interpolate(maps, size, mode="nearest-exact")
        expected = exact.permute(0, 2, 3, 1).reshape(5, *size, *old.shape[3:]).numpy()
        assert np.array_equal(new[:, : size[0], : size[1]], expected)


def test_images_without_masks_are_refused(dataset):
    samples = [dataclasses.replace(s, mask=None) for s in dataset.samples("train")]
    with pytest.raises(DatasetError, match="5 images, 5 without a mask"):
        TrainingImages(dataset, samples, PLAIN)
    with pytest.raises(DatasetError, match="got 0 images"):
        TrainingImages(dataset, [], PLAIN)


@pytest.mark.parametrize("mask_ignored", [False, True])
def test_the_loss_is_catsegs_mean_over_all_pixels(dataset, mask_ignored):
    base = tiny_base()
    images, labels = batches(dataset, PLAIN).batch(0, 2)
    labels[:, :9] = 255
    loss = loss_of(base, ["sky", "road", "car"], (images, labels), mask_ignored=mask_ignored)
    mean, std = np.array(base.mean), np.array(base.std)
    pixels = torch.from_numpy((images - mean) / std).permute(0, 3, 1, 2).float()
    side = base.model.config.image_size
    small = torch.nn.functional.interpolate(pixels, (side, side), mode="bilinear")
    logits = base.model(small, base.encode_classes(["sky", "road", "car"]))
    scores = torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear").double().sigmoid()
    total, count = 0.0, 0
    for c in range(3):
        hit = torch.from_numpy(labels == c)
        each = -torch.where(hit, scores[:, c].log(), (1 - scores[:, c]).log())
        keep = torch.from_numpy(labels != 255) if mask_ignored else torch.ones_like(hit)
        total, count = total + float(each[keep].sum()), count + int(keep.sum())
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


def test_a_batch_has_labels_if_a_single_pixel_has_one():
    labels = np.full((2, 4, 4), 255, np.uint8)
    assert not has_labels(labels)
    labels[1, 3, 2] = 0
    assert has_labels(labels)


def test_bf16_is_close_to_fp32(dataset):
    base, classes = tiny_base(), ["sky", "road", "car"]
    batch = batches(dataset, PLAIN).batch(0, 2)
    exact, rough = (loss_of(base, classes, batch, precision) for precision in ("fp32", "bf16"))
    assert rough.dtype == torch.float32
    assert 0 < abs(float(rough) - float(exact)) < 0.02 * float(exact)


def test_images_of_clips_own_size_are_not_resampled():
    base = tiny_base()
    images = np.random.default_rng(0).integers(0, 255, (1, 16, 16, 3), dtype=np.uint8)
    expected = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 120) / 60
    assert torch.equal(network_input(base, images), expected)


def test_images_move_to_the_device_of_the_model():
    base = tiny_base()
    base.model.to("meta")
    images = np.zeros((1, 24, 24, 3), dtype=np.uint8)
    assert network_input(base, images).device == base.device == torch.device("meta")


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with fixed_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with pytest.raises(ZeroDivisionError, match="zero"), fixed_threads(before + 1):
        _ = 1 / 0
    assert torch.get_num_threads() == before
