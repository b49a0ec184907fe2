"""Tiled inference against a dense blend in float64; seams and memory."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from loraseg.errors import AdapterMismatchError, ConfigError, DatasetError
from loraseg.fuse.mix import fuse
from loraseg.miniature.world.render import CLASSES, render
from loraseg.segment.open_vocabulary.base import load_base
from loraseg.segment.open_vocabulary.pixel_maps import MAPS, pixel_maps
from loraseg.segment.open_vocabulary.predictor import Predictor
from loraseg.segment.open_vocabulary.tiled_inference import needs_tiling, segment_tiled, tile_count
from tests.unit.tiny import random_adapter, tiny_base

THREE = ("a", "b", "c")
SHAPES = [(16, 16), (24, 24), (25, 40), (100, 37), (9, 70), (70, 9), (5, 5), (1, 1), (1, 50)]


class FakePredictor(Predictor):
    """A predictor whose scores are a function of a window's pixels, at any resolution."""

    def __init__(self, function, *, window=16, coarse=8, mode="plain"):
        self.function, self.coarse, self.mode = function, coarse, mode
        self.base = type("Base", (), {"window": window})
        self.windows_per_batch = 64
        self.batches = []
        self.alive = weakref.WeakSet()
        self.most_alive = 0

    def score_windows(self, windows, classes, mix=None):
        self.batches.append(len(windows))
        result = [self.function(window, len(classes), self.coarse) for window in windows]
        self.alive.update(result)
        self.most_alive = max(self.most_alive, len(self.alive))
        return result


class RecordingPredictor(Predictor):
    """A predictor that records its inputs and outputs."""

    def __init__(self, base):
        super().__init__(base)
        self.seen = []

    def score_windows(self, windows, classes, mix=None):
        result = super().score_windows(windows, classes, mix)
        self.seen += zip(windows, result, strict=True)
        return result


def noise(window, classes, side):
    """Return random scores that are the same for the same pixels."""
    seed = int(window.astype(np.int64).sum()) % 2**31
    return torch.rand(classes, side, side, generator=torch.Generator().manual_seed(seed))


def local(window, classes, side):
    """Return scores that depend only on the colour of each pixel, at the size of the window."""
    planes = torch.from_numpy(window.transpose(2, 0, 1).astype(np.float32) / 255)
    return torch.sigmoid(4 * planes[:classes])


def run_to_completion(generator):
    yields = 0
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value, yields
        yields += 1


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mosaic(rows, columns, seed=1):
    scenes, masks = render("clear-day", rows * columns, seed, "large")
    grid = [slice(row * columns, (row + 1) * columns) for row in range(rows)]
    image, mask = (
        np.concatenate([np.concatenate(list(part[some]), axis=1) for some in grid])
        for part in (scenes, masks)
    )
    return image, mask


def expected_starts(length, window):
    """Return the starts of the fewest evenly spaced windows that overlap by half."""
    window = min(window, length)
    count = 1
    while count > 1 or length > window:
        count += 1
        starts = [(length - window) * index // (count - 1) for index in range(count)]
        if max(np.diff(starts)) <= max(window // 2, 1):
            return starts
    return [0]


def expected_weights(length, window, starts):
    """Return the weight of every window at every pixel, from the two centres around it."""
    window = min(window, length)
    centres = [start + window / 2 for start in starts]
    weights = np.zeros((len(starts), length))
    for pixel in range(length):
        middle = pixel + 0.5
        after = sum(centre <= middle for centre in centres)
        if after in (0, len(centres)):
            weights[max(after - 1, 0), pixel] = 1
            continue
        share = (middle - centres[after - 1]) / (centres[after] - centres[after - 1])
        weights[after - 1, pixel] = np.cos(np.pi / 2 * share) ** 2
        weights[after, pixel] = np.sin(np.pi / 2 * share) ** 2
    return weights


def dense_blend(image, window, scores_of):
    """Return the weighted sum of all tiles at full size in float64."""
    height, width = image.shape[:2]
    rows, columns = expected_starts(height, window), expected_starts(width, window)
    down = expected_weights(height, window, rows)
    across = expected_weights(width, window, columns)
    total = 0
    for row, top in enumerate(rows):
        for column, left in enumerate(columns):
            part = image[top : top + window, left : left + window]
            size = part.shape[:2]
            coarse = scores_of(part)[None].double()
            fine = torch.nn.functional.interpolate(
                coarse, size, mode="bilinear", align_corners=False
            )[0]
            canvas = torch.zeros(len(fine), height, width, dtype=torch.float64)
            canvas[:, top : top + size[0], left : left + size[1]] = fine
            total = total + canvas * torch.from_numpy(np.outer(down[row], across[column]))
    return total


def check_against(total, result):
    expected = pixel_maps(total, MAPS)
    np.testing.assert_allclose(result.confidence, expected.confidence, rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.entropy, expected.entropy, rtol=0, atol=1e-5)
    shown = total.numpy()
    chosen = np.take_along_axis(shown, result.label_map[None].astype(int), axis=0)[0]
    # Labels may differ only where both scores are equal up to rounding.
    np.testing.assert_allclose(chosen, shown.max(axis=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("window", "coarse"), [(16, 8), (16, 16), (15, 4), (16, 21)])
def test_tiles_equal_the_dense_blend(shape, window, coarse):
    image, fake = picture(*shape), FakePredictor(noise, window=window, coarse=coarse)
    result, _ = run_to_completion(segment_tiled(fake, image, THREE, None, MAPS))
    assert result.label_map.shape == shape
    check_against(dense_blend(image, window, lambda part: noise(part, 3, coarse)), result)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_tiny_windows(window):
    image, fake = picture(7, 5), FakePredictor(noise, window=window, coarse=2)
    result, _ = run_to_completion(segment_tiled(fake, image, THREE, None, MAPS))
    check_against(dense_blend(image, window, lambda part: noise(part, 3, 2)), result)


@pytest.mark.parametrize("length", [16, 17, 24, 31, 32, 33, 100, 1000])
def test_weights_sum_to_one_and_vanish_outside_their_windows(length):
    starts = expected_starts(length, 16)
    weights = expected_weights(length, 16, starts)
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=0, atol=1e-12)
    assert (weights > 0).sum(axis=0).max() <= 2
    for start, weight in zip(starts, weights, strict=True):
        outside = np.ones(length, bool)
        outside[start : start + 16] = False
        assert not weight[outside].any()


def test_overlap_of_one_half_is_a_hann_window():
    starts = expected_starts(48, 16)
    assert starts == [0, 8, 16, 24, 32]
    hann = np.sin(np.pi * (np.arange(16) + 0.5) / 16) ** 2
    np.testing.assert_allclose(expected_weights(48, 16, starts)[2, 16:32], hann, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_constant_scores_stay_constant(shape):
    levels = torch.tensor([0.2, 0.9, 0.4])

    def constant(window, classes, side):
        return levels[:, None, None].expand(3, side, side).contiguous()

    result, _ = run_to_completion(
        segment_tiled(FakePredictor(constant), picture(*shape), THREE, None, MAPS)
    )
    assert (result.label_map == 1).all()
    np.testing.assert_allclose(result.confidence, 0.9, rtol=0, atol=1e-6)
    assert np.ptp(result.entropy) < 1e-6


def test_ties_go_to_the_first_class_in_the_whole_image():
    def alike(window, classes, side):
        return noise(window, 1, side).expand(classes, side, side).contiguous()

    result, _ = run_to_completion(segment_tiled(FakePredictor(alike), picture(60, 45), THREE))
    assert (result.label_map == 0).all()


def test_scores_stay_between_zero_and_one():
    def extreme(window, classes, side):
        return noise(window, classes, side).round()

    result, _ = run_to_completion(
        segment_tiled(FakePredictor(extreme), picture(60, 45), THREE, None, MAPS)
    )
    assert 0 <= result.confidence.min() <= result.confidence.max() <= 1
    assert 0 <= result.entropy.min() <= result.entropy.max() <= 1


@pytest.fixture(scope="module")
def miniature():
    return Predictor(load_base("miniature"))


def test_an_image_of_one_window_equals_plain_prediction(miniature):
    scenes, _ = render("clear-day", 4, 1, "large")
    for scene in scenes:
        (scores,) = miniature.predict([scene], CLASSES)
        expected = pixel_maps(scores, MAPS)
        result, _ = run_to_completion(segment_tiled(miniature, scene, CLASSES, None, MAPS))
        np.testing.assert_array_equal(result.label_map, expected.label_map)
        np.testing.assert_allclose(result.confidence, expected.confidence, rtol=0, atol=1e-6)
        np.testing.assert_allclose(result.entropy, expected.entropy, rtol=0, atol=1e-6)


def test_an_image_smaller_than_a_window_equals_plain_prediction(miniature):
    scene = mosaic(1, 1)[0][:41, :50]
    (scores,) = miniature.predict([scene], CLASSES)
    result, _ = run_to_completion(segment_tiled(miniature, scene, CLASSES, None, MAPS))
    check_against(scores.double(), result)


def test_tiles_of_a_model_with_adapters_equal_the_dense_blend():
    base = replace(tiny_base(), window=24, pad_multiple=1)
    mix = fuse([random_adapter(base, "rain", 5)], [1.0])
    predictor, image = Predictor(base), picture(40, 49)
    result, _ = run_to_completion(segment_tiled(predictor, image, THREE, mix, MAPS))
    total = dense_blend(image, 24, lambda part: predictor.score_windows([part], THREE, mix)[0])
    check_against(total, result)
    plain, _ = run_to_completion(segment_tiled(predictor, image, THREE, None, MAPS))
    assert np.abs(plain.confidence - result.confidence).max() > 1e-3


def test_scores_change_smoothly_between_tiles():
    # Constant tiles with contradicting scores are the worst case for a seam.
    fake, image = FakePredictor(noise, window=64, coarse=1), picture(200, 230)
    result, _ = run_to_completion(segment_tiled(fake, image, THREE, None, {"confidence"}))
    for axis, length in enumerate((200, 230)):
        distance = np.diff(expected_starts(length, 64)).min()
        steps = np.abs(np.diff(result.confidence, axis=axis))
        # The slope of a raised cosine is at most pi / 2 over the distance between centres.
        assert steps.max() <= np.pi / 2 / distance


def agreement(labels, borders):
    """Return the share of equal neighbours across these column borders, and across all others."""
    same = (labels[..., 1:] == labels[..., :-1]).reshape(-1, labels.shape[-1] - 1).mean(axis=0)
    at = np.isin(np.arange(1, labels.shape[-1]), borders)
    return same[at].mean(), same[~at].mean()


def cut_hard(tiles):
    """Return the labels of nine tiles without blending, each pixel from the nearest centre."""
    edges = {0: slice(0, 48), 32: slice(48, 80), 64: slice(80, 128)}
    labels = np.empty((128, 128), np.uint8)
    corners = [(top, left) for top in edges for left in edges]
    for (top, left), (_, scores) in zip(corners, tiles, strict=True):
        whole = np.zeros((128, 128), np.uint8)
        whole[top : top + 64, left : left + 64] = pixel_maps(scores).label_map
        labels[edges[top], edges[left]] = whole[edges[top], edges[left]]
    return labels


def test_no_seams(miniature):
    scenes = render("clear-day", 8, 1, "seams")[0].repeat(2, axis=1).repeat(2, axis=2)
    blended, cut = [], []
    for scene in scenes:
        predictor = RecordingPredictor(miniature.base)
        result, _ = run_to_completion(segment_tiled(predictor, scene, CLASSES))
        blended.append(result.label_map)
        cut.append(cut_hard(predictor.seen))
    # Windows start, end and have their centres at these columns.
    at, elsewhere = agreement(np.stack(blended), (32, 64, 96))
    assert at >= elsewhere - 0.01
    # Without blending the same tiles have seams, so the test can detect them.
    at, elsewhere = agreement(np.stack(cut), (48, 80))
    assert at < elsewhere - 0.03


def test_the_grid_is_invisible_if_scores_depend_on_pixels_only():
    # If scores depend only on the pixel, the result must not depend on the grid.
    smooth = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 140, 150), 9)[0]
    pixels = torch.nn.functional.interpolate(smooth[None], (120, 130), mode="bicubic")[0]
    image = (pixels.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    fake = FakePredictor(local)
    whole, _ = run_to_completion(segment_tiled(fake, image, THREE))
    shifted, _ = run_to_completion(segment_tiled(fake, image[5:, 3:], THREE))
    assert (whole.label_map[5:, 3:] == shifted.label_map).mean() >= 0.995
    assert (whole.label_map == image.argmax(axis=2)).mean() >= 0.995


def test_tiles_keep_details_that_resizing_loses(miniature):
    image, mask = mosaic(4, 4)
    assert needs_tiling(*image.shape[:2], miniature)
    tiled, _ = run_to_completion(segment_tiled(miniature, image, CLASSES))
    (squeezed,) = miniature.predict([image], CLASSES)
    squeezed = pixel_maps(squeezed).label_map
    assert (tiled.label_map == mask).mean() > (squeezed == mask).mean() + 0.1


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (240, 40), (40, 240)])
def test_memory_does_not_grow_with_the_longer_side(shape):
    fake = FakePredictor(noise)
    gc.collect()
    run_to_completion(segment_tiled(fake, picture(*shape), THREE))
    assert sum(fake.batches) == len(expected_starts(40, 16)) * len(expected_starts(max(shape), 16))
    # A line of four tiles plus one, the current batch and the previous one.
    assert fake.most_alive <= 4 + 1 + 8 + 8


def test_it_yields_after_each_batch_and_can_be_cancelled():
    fake = FakePredictor(noise)
    generator = segment_tiled(fake, picture(100, 37), THREE)
    assert fake.batches == []
    next(generator)
    assert fake.batches == [8]
    generator.close()
    assert fake.batches == [8]
    _, yields = run_to_completion(segment_tiled(fake, picture(100, 37), THREE))
    assert yields == len(fake.batches) - 1


@pytest.mark.parametrize(("classes", "batch"), [(1, 8), (64, 8), (65, 7), (255, 2), (600, 1)])
def test_batches_are_smaller_with_many_classes(classes, batch):
    fake = FakePredictor(noise, coarse=2)
    result, _ = run_to_completion(
        segment_tiled(fake, picture(60, 60), [str(i) for i in range(classes)])
    )
    assert fake.batches[0] == batch
    assert result.label_map.dtype == (np.uint8 if classes <= 255 else np.int32)


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("plain", (1228, 900), False),
        ("plain", (900, 1229), True),
        ("sliding", (1024, 2048), False),
        ("sliding", (2049, 100), True),
    ],
)
def test_images_are_tiled_above_the_published_downscaling(mode, size, expected):
    fake = FakePredictor(noise, window=384, mode=mode)
    assert needs_tiling(*size, fake) is expected


@pytest.mark.parametrize("shape", SHAPES)
def test_tile_count_equals_the_number_of_windows(shape):
    fake = FakePredictor(noise)
    run_to_completion(segment_tiled(fake, picture(*shape), THREE))
    assert tile_count(*shape, fake) == sum(fake.batches)


def test_invalid_inputs_are_refused(miniature):
    def start(image, classes=CLASSES, maps=(), mix=None):
        next(segment_tiled(miniature, image, classes, mix, maps))

    with pytest.raises(DatasetError, match="expected uint8 RGB"):
        start(np.zeros((70, 70, 4), np.uint8))
    with pytest.raises(DatasetError, match="expected uint8 RGB"):
        start(np.zeros((0, 70, 3), np.uint8))
    with pytest.raises(ConfigError, match="at least one name"):
        start(picture(70, 70), classes=[])
    with pytest.raises(ConfigError, match="maps: got"):
        start(picture(70, 70), maps={"depth"})
    foreign = fuse([random_adapter(tiny_base(), "x", 1)], [1.0])
    with pytest.raises(AdapterMismatchError):
        start(picture(70, 70), mix=foreign)
