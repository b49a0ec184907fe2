"""Label filters against loops over pixels, kept shares and refused inputs."""

import numpy as np
import pytest

from loraseg.config import build
from loraseg.errors import ConfigError, DatasetError
from loraseg.synth.majority_vote import majority_vote
from loraseg.synth.vote import FilterConfig, PseudoLabels, apply_filter

IGNORED = {np.uint8: 255, np.uint16: 65535}
CLASSES = 6


def random_case(seed=0, *, k=4, dtype=np.uint8, classes=CLASSES, shape=(9, 11)):
    """Return a mask without its last class, and random predictions for k images."""
    random = np.random.default_rng(seed)
    mask = random.integers(0, classes - 1, size=shape).astype(dtype)
    labels = np.repeat(mask[None], k, axis=0)
    noise = random.random(labels.shape) < 0.4
    labels[noise] = random.integers(0, classes, size=int(noise.sum()))
    mask[random.random(shape) < 0.2] = IGNORED[dtype]
    confidence = random.random(labels.shape, dtype=np.float32)
    return mask, PseudoLabels(labels=labels, confidence=confidence, loss=-np.log(confidence))


def loop_filter(mask, pseudo_labels, keeps, classes):
    """Return labels and kept shares; ``keeps(k, y, x)`` is True where a label is kept."""
    ignore = IGNORED[mask.dtype.type]
    labels = np.full(pseudo_labels.labels.shape, ignore, dtype=mask.dtype)
    totals, kept = np.zeros(classes), np.zeros((len(labels), classes))
    for y, x in np.ndindex(mask.shape):
        if mask[y, x] == ignore:
            continue
        totals[mask[y, x]] += 1
        for k in range(len(labels)):
            if keeps(k, y, x):
                labels[k, y, x] = mask[y, x]
                kept[k, mask[y, x]] += 1
    by_class = [[s / t if t else np.nan for s, t in zip(row, totals, strict=True)] for row in kept]
    return labels, kept.sum(axis=1) / totals.sum(), np.array(by_class)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "config",
    [
        FilterConfig(),
        FilterConfig(ties="paper"),
        FilterConfig(method="none"),
        FilterConfig(method="confidence", threshold=0.6),
        FilterConfig(method="freemask", tolerance=1.1),
    ],
    ids=lambda config: f"{config.method}-{config.ties}",
)
def test_filters_against_loops(config, seed, dtype):
    mask, pseudo_labels = random_case(seed, dtype=dtype)
    class_loss = np.random.default_rng(seed).random(CLASSES) * 1.5
    prototype = majority_vote(pseudo_labels.labels, mask=mask, ties=config.ties)
    keeps = {
        "relative": lambda k, y, x: pseudo_labels.labels[k, y, x] == prototype[y, x],
        "none": lambda k, y, x: True,
        "confidence": lambda k, y, x: pseudo_labels.confidence[k, y, x] >= 0.6,
        "freemask": lambda k, y, x: pseudo_labels.loss[k, y, x] <= 1.1 * class_loss[mask[y, x]],
    }[config.method]
    got = apply_filter(mask, pseudo_labels, config, CLASSES, class_loss=class_loss)
    labels, kept, by_class = loop_filter(mask, pseudo_labels, keeps, CLASSES)
    assert got.labels.dtype == dtype
    assert (got.labels == labels).all()
    np.testing.assert_allclose(got.kept, kept, rtol=1e-12)
    np.testing.assert_allclose(got.kept_by_class, by_class, rtol=1e-12)
    assert np.isnan(got.kept_by_class[:, -1]).all()
    assert (got.dropped == (kept < 0.3)).all()
    if config.method == "none":
        assert (got.kept == 1).all()


def test_many_classes():
    mask, pseudo_labels = random_case(dtype=np.uint16, classes=65535, k=32, shape=(5, 6))
    mask[0, 0] = pseudo_labels.labels[:, 0, 0] = 65534
    got = apply_filter(mask, pseudo_labels, FilterConfig(), 65535)
    assert got.kept_by_class.shape == (32, 65535)
    assert (got.kept_by_class[:, 65534] == 1).all()
    assert (got.labels[:, 0, 0] == 65534).all()


def test_images_that_keep_too_few_labels_are_dropped():
    mask = np.repeat(np.arange(2, dtype=np.uint8), 5)[None]
    labels = np.stack([mask, mask, 1 - mask])
    labels[2, 0, :3] = 0  # three of ten pixels agree
    for min_kept, dropped in ((0.3, False), (0.31, True), (0.0, False), (1.0, True)):
        got = apply_filter(mask, PseudoLabels(labels=labels), FilterConfig(min_kept=min_kept), 2)
        assert got.kept.tolist() == [1.0, 1.0, 0.3]
        assert got.kept_by_class[2].tolist() == [0.6, 0.0]
        assert got.dropped.tolist() == [False, False, dropped]


def test_pixels_with_nan_are_not_kept():
    mask, pseudo_labels = random_case()
    pseudo_labels.confidence[0, 0], pseudo_labels.loss[0, 0] = np.nan, np.nan
    for method in ("confidence", "freemask"):
        config = FilterConfig(method=method, threshold=0.0, tolerance=1e9)
        class_loss = np.ones(CLASSES)
        class_loss[2] = np.nan  # absent from the real images
        got = apply_filter(mask, pseudo_labels, config, CLASSES, class_loss=class_loss)
        assert (got.labels[0, 0] == 255).all()
        rest = got.labels[1:]
        lost = mask == 2 if method == "freemask" else np.zeros_like(mask, dtype=bool)
        assert (rest == np.where(lost, np.uint8(255), mask)).all()


def test_comparisons_at_the_threshold():
    mask = np.zeros((1, 2), dtype=np.uint8)
    edge = PseudoLabels(
        labels=np.zeros((1, 1, 2), dtype=np.uint8),
        confidence=np.array([[[0.75, np.nextafter(0.75, 0)]]]),
        loss=np.array([[[2.5, np.nextafter(2.5, 3)]]]),
    )
    for method in ("confidence", "freemask"):
        config = FilterConfig(method=method, threshold=0.75)
        got = apply_filter(mask, edge, config, 1, class_loss=np.array([2.0]))
        assert got.labels.ravel().tolist() == [0, 255]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "vote"}, "method.*got 'vote'"),
        ({"ties": "first"}, "ties.*got 'first'"),
        ({"threshold": 1.01}, r"threshold: got 1\.01, expected 0 to 1"),
        ({"threshold": float("nan")}, "threshold: got nan"),
        ({"min_kept": -0.1}, r"min_kept: got -0\.1, expected 0 to 1"),
        ({"tolerance": 0.0}, r"tolerance: got 0\.0, expected a finite number above 0"),
        ({"tolerance": float("inf")}, "tolerance: got inf"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(FilterConfig, settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.full((9, 11), 255, np.uint8)}, "mask: every pixel is ignored"),
        ({"mask": np.full((9, 11), 6, np.uint8)}, r"got class ids \[6\], expected 0 to 5 or 255"),
        ({"mask": np.zeros((9, 11), np.int32)}, "class ids: got int32, expected uint8 or uint16"),
        ({"mask": np.zeros((1, 9, 11), np.uint8)}, r"mask: got \(1, 9, 11\), expected \(h, w\)"),
        ({"mask": np.zeros((9, 12), np.uint8)}, r"got uint8 \(4, 9, 11\), expected uint8 \(k, h, "),
        ({"mask": np.zeros((9, 11), np.uint16)}, r"got uint8 \(4, 9, 11\), expected uint16"),
        ({"mask": np.zeros((0, 11), np.uint8)}, "mask: every pixel is ignored"),
        ({"labels": np.full((4, 9, 11), 255, np.uint8)}, "with ids up to 255, expected ids 0 to 5"),
        ({"labels": np.zeros((0, 9, 11), np.uint8)}, "got 0 maps with ids up to 0"),
        ({"labels": np.zeros((257, 9, 11), np.uint8)}, "expected 1 to 256 maps"),
        ({"classes": 256}, "classes: got 256, expected 1 to 255 in uint8 maps"),
        ({"classes": 0}, "classes: got 0"),
    ],
)
def test_invalid_maps_are_refused(change, message):
    mask, pseudo_labels = random_case()
    arguments = {"mask": mask, "labels": pseudo_labels.labels, "classes": CLASSES, **change}
    with pytest.raises(DatasetError, match=message):
        apply_filter(
            arguments["mask"],
            PseudoLabels(labels=arguments["labels"]),
            FilterConfig(),
            arguments["classes"],
        )


def test_missing_inputs_of_a_filter_are_refused():
    mask, pseudo_labels = random_case()
    bare = PseudoLabels(labels=pseudo_labels.labels)
    confidence, freemask = FilterConfig(method="confidence"), FilterConfig(method="freemask")
    losses = np.ones(CLASSES)
    with pytest.raises(ConfigError, match="got no confidence of each pixel"):
        apply_filter(mask, bare, confidence, CLASSES)
    with pytest.raises(ConfigError, match="got no loss of each pixel"):
        apply_filter(mask, bare, freemask, CLASSES, class_loss=losses)
    with pytest.raises(ConfigError, match="expected the mean loss of each class on real images"):
        apply_filter(mask, pseudo_labels, freemask, CLASSES)
    short = PseudoLabels(labels=pseudo_labels.labels, confidence=pseudo_labels.confidence[:1])
    with pytest.raises(DatasetError, match=r"confidence: got \(1, 9, 11\), expected \(4, 9, 11\)"):
        apply_filter(mask, short, confidence, CLASSES)
    with pytest.raises(ConfigError, match="relative filtering: got 1 image of a mask"):
        apply_filter(mask, PseudoLabels(labels=pseudo_labels.labels[:1]), FilterConfig(), CLASSES)
    with pytest.raises(ConfigError, match=r"class_loss: got \(7,\), expected \(6,\)"):
        apply_filter(mask, pseudo_labels, freemask, CLASSES, class_loss=np.ones(CLASSES + 1))
