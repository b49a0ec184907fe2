"""Configs of synthesis, pseudo-labels and filters."""

import numpy as np
import pytest
from PIL import Image

from loraseg.batch.core.executor import LocalExecutor
from loraseg.batch.pseudo_labels import predict_pseudo_labels
from loraseg.batch.synthesize.config import SynthesisConfig
from loraseg.batch.synthesize.models import resolve_models
from loraseg.batch.synthesize.run import synthesize
from loraseg.data import LabelSpace
from loraseg.data.masks import decode_mask
from loraseg.data.untrusted_images import decode_image
from loraseg.errors import ConfigError
from loraseg.segment.closed_set.checkpoint import load_closed_set_segmenter
from loraseg.synth.sampling import SamplingConfig
from loraseg.synth.vote import FilterConfig
from tests.tiny_synthesis import CLASSES, all_rows, mask, settings, write_inputs, write_segmenter

PLAIN = {"masks": "a", "output": "b", "segmenter": "s"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segmenter": None}, "segmenter: expected one for filter.method=relative"),
        ({"masks_per_shard": 0}, "masks_per_shard"),
        ({"limit": 0}, "limit"),
        ({"weights": (0.5,)}, "weights: got 1, expected one for each of 0 adapters"),
        ({"real": "x"}, "freemask"),
        ({"filter": FilterConfig(method="freemask")}, "labelled images belong to"),
        ({"sampling": SamplingConfig(images=2)}, "fewer than 3 images cannot outvote"),
    ],
)
def test_wrong_settings_are_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        SynthesisConfig(**{**PLAIN, **changes})


def test_masks_and_output_within_each_other_are_errors(tmp_path):
    for masks, output in (("m", "m/out"), ("m/in", "m"), ("m", "m")):
        config = SynthesisConfig(
            **{**PLAIN, "masks": str(tmp_path / masks), "output": str(tmp_path / output)}
        )
        with pytest.raises(ConfigError, match="within each other"):
            config.resolved()


def test_a_segmenter_of_other_classes_is_an_error(tmp_path):
    write_inputs(tmp_path, masks=1)
    config = settings(tmp_path, tmp_path / "out", classes=("a", "b", "c", "d"))
    with pytest.raises(ConfigError, match="its classes are road, sky, car, sidewalk"):
        synthesize(config, LocalExecutor())


def test_pseudo_labels_have_the_confidence_and_the_loss_of_the_mask(tmp_path):
    segmenter = load_closed_set_segmenter(write_segmenter(tmp_path / "s"))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    labels = mask(2)
    predicted = predict_pseudo_labels(segmenter, images, labels, outputs=("confidence", "loss"))
    scores = segmenter.log_probabilities(images).double().exp().numpy()
    assert np.array_equal(predicted.labels, scores.argmax(1))
    assert np.allclose(predicted.confidence, scores.max(1), atol=1e-6)
    for k in range(2):
        for y, x in np.ndindex(32, 32):
            known = labels[y, x] != 255
            expected = -np.log(scores[k, labels[y, x], y, x]) if known else 0
            assert predicted.loss[k, y, x] == pytest.approx(expected, abs=1e-5)
    assert predict_pseudo_labels(segmenter, images, labels).loss is None


@pytest.mark.parametrize("method", ["freemask", "confidence"])
def test_other_filters_keep_the_expected_pixels(method, tmp_path):
    write_inputs(tmp_path, masks=2)
    write_images(tmp_path / "masks")
    real = {"real": str(tmp_path / "masks"), "real_images": 1} if method == "freemask" else {}
    filter_config = FilterConfig(method=method, min_kept=0.0, threshold=0.3)
    config = settings(tmp_path, tmp_path / "out", filter=filter_config, **real)
    synthesize(config, LocalExecutor())
    segmenter = load_closed_set_segmenter(config.segmenter)
    means = resolve_models(config, LabelSpace(CLASSES)).class_loss
    for row in all_rows(tmp_path / "out"):
        mask_ids, label = decode_mask(row.mask, where="t"), decode_mask(row.label, where="t")
        scores = segmenter.log_probabilities(decode_image(row.image)[None])[0].numpy()
        if method == "confidence":
            keeps = np.exp(scores.max(0)) >= 0.3
        else:
            mask_scores = np.take_along_axis(
                scores, np.where(mask_ids == 255, 0, mask_ids)[None].astype(int), 0
            )[0]
            limits = np.array([np.nan if mean is None else mean for mean in means] + [np.nan] * 252)
            keeps = -mask_scores <= 1.25 * limits[mask_ids]
        assert np.array_equal(label, np.where(keeps & (mask_ids != 255), mask_ids, 255))


def write_images(folder):
    (folder / "images" / "train").mkdir(parents=True)
    for path in (folder / "masks" / "train").iterdir():
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "train" / path.name)
