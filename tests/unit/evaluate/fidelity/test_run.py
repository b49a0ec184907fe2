"""All figures of a dataset against dense formulas."""

import itertools
import json

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from loraseg.backbones.clip import load_clip
from loraseg.data import digest_samples, open_dataset
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.untrusted_images import decode_image
from loraseg.errors import DatasetError
from loraseg.evaluate.fidelity.embeddings import (
    centre_crop_square,
    embed_images,
    resize_to_square,
    view_encoder_id,
)
from loraseg.evaluate.fidelity.run import NearDuplicate, measure_fidelity
from tests.unit.evaluate.fidelity.sample_data import pair, picture, write_real, write_shards
from tests.unit.tiny import write_models

REAL = [picture(seed) for seed in range(12)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    encoder = load_clip(write_models(tmp_path_factory.mktemp("models"))[1])
    encoder.batch_size = 5  # gives full batches and a partial one
    return encoder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return open_dataset(write_real(tmp_path_factory.mktemp("real"), REAL))


@pytest.fixture(scope="module")
def rows():
    """Three masks of three images, two copies of real images, and a dropped pair."""
    pairs = [
        pair(n, picture(100 + n), mask=n // 3, prompt=("road", "sky")[n % 2]) for n in range(9)
    ]
    pairs[8] = pair(8, picture(108, (24, 24)), mask=2, prompt=None, height=24)
    copies = [pair(20, REAL[7], mask=7), pair(21, REAL[2], mask=8)]
    dropped = pair(30, b"no image", mask=0, status="dropped", reason="kept 0.1")
    return pairs, [*copies, dropped]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, rows):
    return ShardDataset.open(write_shards(tmp_path_factory.mktemp("synthetic"), *rows))


@pytest.fixture(scope="module")
def result(dataset, real, encoder):
    return measure_fidelity(dataset, real, "train", encoder)


def dense(encoder, images, frame):
    """Unit embeddings, computed one image at a time."""
    size = encoder.preprocessing.size
    rows = np.stack([encoder.encode_images([frame(image, size)])[0] for image in images])
    return rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)


@pytest.fixture(scope="module")
def synthetic_images(dataset):
    return [decode_image(row.image) for row in dataset.rows()]


@pytest.fixture(scope="module")
def embedded(encoder, synthetic_images):
    return dense(encoder, REAL, centre_crop_square), dense(
        encoder, synthetic_images, centre_crop_square
    )


@pytest.mark.parametrize(("height", "width"), [(40, 73), (73, 40), (33, 33), (5, 9)])
def test_resizing_is_bicubic_with_antialiasing(height, width):
    image = picture(1, (height, width))
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = image[top : top + side, left : left + side]
    for resized, source in (
        (centre_crop_square(image, 16), middle),
        (resize_to_square(image, 16), image),
    ):
        pixels = torch.from_numpy(source.copy()).permute(2, 0, 1)[None].double()
        expected = torch.nn.functional.interpolate(
            pixels, (16, 16), mode="bicubic", antialias=True, align_corners=False
        )
        difference = resized - expected[0].permute(1, 2, 0).clamp(0, 255).numpy()
        assert resized.dtype == np.uint8
        assert np.abs(difference).max() < 2.01  # Pillow rounds between the two passes
        assert np.abs(difference).mean() < 0.5


def test_every_image_is_embedded_in_both_views(encoder):
    images = [picture(0), picture(1, (16, 16)), picture(2, (30, 9)), *REAL[:4]]
    got = embed_images(encoder, ((str(n), image) for n, image in enumerate(images)))
    assert got.names == ("0", "1", "2", "3", "4", "5", "6")
    for embeddings, frame in ((got.cropped, centre_crop_square), (got.whole, resize_to_square)):
        np.testing.assert_allclose(embeddings, dense(encoder, images, frame), rtol=0, atol=1e-6)
    assert np.array_equal(got.cropped[1], got.whole[1])
    assert np.abs(got.cropped[2] - got.whole[2]).max() > 1e-3


def test_cmmd_with_and_without_the_crop(result, encoder, synthetic_images):
    def kernel(x, y):
        return np.exp(-cdist(x, y, "sqeuclidean") / 200).mean()

    for name, frame in (("cmmd", centre_crop_square), ("cmmd_no_crop", resize_to_square)):
        x, y = dense(encoder, REAL, frame), dense(encoder, synthetic_images, frame)
        expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
        assert result.figures[name].value == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert result.figures[name].settings == {"sigma": 10.0, "scale": 1000.0}
    assert result.figures["cmmd"].value != result.figures["cmmd_no_crop"].value


def test_coverage_in_both_directions(result, embedded):
    for name, (first, second) in (
        ("coverage_of_real", embedded),
        ("coverage_of_synthetic", embedded[::-1]),
    ):
        radii = np.sort(cdist(first, first), axis=1)[:, 5]  # column 0 is the point itself
        expected = (cdist(first, second).min(axis=1) <= radii).mean()
        assert result.figures[name].value == pytest.approx(expected, abs=1e-12)
        assert result.figures[name].settings == {"k": 5.0}


def test_planted_copies_are_found(result, embedded):
    assert {(s.pair_id, s.real) for s in result.suspects} == {("0014", "real7"), ("0015", "real2")}
    assert all(isinstance(s, NearDuplicate) and s.distance < 1e-6 for s in result.suspects)
    assert result.figures["copies"].value == pytest.approx(2 / 11, abs=1e-12)
    own = np.sort(cdist(embedded[0], embedded[0]), axis=1)[:, 1]
    limit = result.figures["copies"].settings["copy_limit"]
    assert limit == pytest.approx(np.percentile(own, 1), abs=1e-6)
    nearest = cdist(embedded[1], embedded[0]).min(axis=1)
    assert result.figures["nearest_real"].value == pytest.approx(np.median(nearest), abs=1e-6)


def test_clip_score_covers_the_images_with_a_prompt(result, encoder, dataset, embedded):
    cosines = []
    for row, image in zip(dataset.rows(), embedded[1], strict=True):
        if row.prompt is not None:
            text = encoder.encode_texts([row.prompt])[0].astype(np.float64)
            cosines.append(image @ text / np.linalg.norm(text))
    figure = result.figures["clip_score"]
    assert figure.value == pytest.approx(100 * np.mean(cosines), abs=1e-4)
    assert (figure.real, figure.synthetic) == (0, 10)


def test_diversity_of_the_images_of_one_mask(result, dataset, embedded):
    masks = [row.mask_id for row in dataset.rows()]
    means = []
    for mask in sorted(set(masks)):
        members = [n for n, other in enumerate(masks) if other == mask]
        pairs = [1 - embedded[1][a] @ embedded[1][b] for a, b in itertools.combinations(members, 2)]
        means += [np.mean(pairs)] if pairs else []
    figure = result.figures["sibling_distance"]
    assert figure.value == pytest.approx(np.mean(means), abs=1e-6)
    assert (figure.synthetic, figure.settings) == (9, {"masks": 3.0})
    pairs = [1 - a @ b for a, b in itertools.combinations(embedded[0], 2)]
    assert result.figures["real_distance"].value == pytest.approx(np.mean(pairs), abs=1e-6)


def test_every_figure_names_its_encoder_and_counts(result, encoder, real):
    digest = encoder.digest[:16]
    assert view_encoder_id(encoder, "crop") == f"clip:sha256-{digest}:square16-bicubic-crop"
    for name, figure in result.figures.items():
        view = "whole" if name == "cmmd_no_crop" else "crop"
        assert figure.encoder == f"clip:sha256-{digest}:square16-bicubic-{view}"
        assert figure.real in (0, 12)
        assert figure.synthetic in (0, 9, 10, 11)
        assert figure.real + figure.synthetic > 0
    assert result.real == {"split": "train", "digest": digest_samples(real, real.samples("train"))}
    assert result.synthetic == {"generation": 1, "dataset_sha256": "ab" * 32}


def test_json_is_complete_and_repeatable(result, dataset, real, encoder):
    text = result.to_json()
    assert measure_fidelity(dataset, real, "train", encoder).to_json() == text
    content = json.loads(text)
    assert content["figures"]["fid"]["value"] == result.figures["fid"].value > 0
    assert content["figures"]["copies"]["synthetic"] == 11
    assert len(content["suspects"]) == 2


def test_real_images_as_synthetic_ones(tmp_path, real, encoder):
    rows = [pair(n, image, mask=n, prompt=None) for n, image in enumerate(REAL)]
    dataset = ShardDataset.open(write_shards(tmp_path, rows))
    figures = measure_fidelity(dataset, real, "train", encoder).figures
    for name in ("cmmd", "cmmd_no_crop", "fid"):
        assert figures[name].value == pytest.approx(0, abs=1e-6)
    for name in ("coverage_of_real", "coverage_of_synthetic", "copies"):
        assert figures[name].value == 1.0
    # Without prompts and without two images of one mask the figures are undefined.
    for name in ("clip_score", "sibling_distance"):
        assert (figures[name].value, figures[name].real, figures[name].synthetic) == (None, 0, 0)


def test_too_few_images(tmp_path, real, encoder):
    rows = [pair(n, picture(n), mask=n) for n in range(5)]
    dataset = ShardDataset.open(write_shards(tmp_path, rows))
    with pytest.raises(DatasetError, match="12 real and 5 synthetic images, expected at least 6"):
        measure_fidelity(dataset, real, "train", encoder)


def test_a_broken_image_is_named(tmp_path, real, encoder):
    rows = [pair(n, picture(n), mask=n) for n in range(6)]
    rows[3] = pair(3, b"no image", mask=3)
    dataset = ShardDataset.open(write_shards(tmp_path, rows))
    with pytest.raises(DatasetError, match="pair 0003: the image is neither a PNG nor a JPEG"):
        measure_fidelity(dataset, real, "train", encoder)
    with pytest.raises(DatasetError, match="there are no images"):
        embed_images(encoder, [])
