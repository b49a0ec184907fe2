import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from loraseg.backbones.clip import load_clip
from loraseg.errors import IntegrityError
from loraseg.miniature.models import weights_io
from loraseg.miniature.models.catseg.training import catseg_config
from loraseg.miniature.models.clip.checks import auc
from loraseg.miniature.models.clip.model import build_clip, encode_dense, encode_text, normalise
from loraseg.miniature.models.clip.training import contrastive_loss, multi_positive_loss
from loraseg.miniature.world.captions import tokenizer
from loraseg.miniature.world.render import render
from loraseg.segment.open_vocabulary.catseg.from_clip import catseg_from_clip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_clip(tokenizer().vocab_size).eval()


@pytest.fixture(scope="module")
def images():
    return normalise(torch.from_numpy(render("clear-day", 3, 0)[0]))


@torch.inference_mode()
def test_whole_images_and_texts_are_embedded_as_by_open_clip(model, images):
    ids = tokenizer()(["a photo of a tree", "a street with a car and a bus in the rain", "zebra"])
    whole, _ = encode_dense(model, images)
    torch.testing.assert_close(whole, model.encode_image(images), rtol=1e-4, atol=1e-5)
    texts = encode_text(model, ids)
    torch.testing.assert_close(texts, model.encode_text(ids), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_dense_features_equal_those_of_the_catseg_tower(model, images):
    catseg = catseg_from_clip(model, catseg_config(tokenizer().vocab_size)).eval()
    features, _ = catseg.clip.visual(images)
    _, dense = encode_dense(model, images)
    torch.testing.assert_close(
        dense.transpose(1, 2).unflatten(2, (16, 16)), features, rtol=1e-4, atol=1e-5
    )


@torch.inference_mode()
def test_a_crop_uses_its_window_of_the_position_table(model, images):
    crop, offset = images[:, :, 8:24, 20:36], (2, 5)
    _, expected = encode_dense(model, crop, offset)
    table = model.visual.positional_embedding
    saved = table.data.clone()
    rows = [0] + [1 + (2 + r) * 16 + 5 + c for r in range(4) for c in range(4)]
    corner = [0] + [1 + r * 16 + c for r in range(4) for c in range(4)]
    table.data[corner] = saved[rows]
    try:
        _, dense = encode_dense(model, crop, (0, 0))
    finally:
        table.data.copy_(saved)
    torch.testing.assert_close(dense, expected)


def test_pixels_are_scaled_to_mean_half_and_deviation_quarter():
    image = torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)
    assert normalise(image).flatten().tolist() == pytest.approx([-2, 2, -1.2])


def test_contrastive_loss_equals_an_explicit_sum():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 6, dtype=torch.float64, generator=generator)
    logits = (5 * a @ b.T).tolist()
    total = 0.0
    for i in range(4):
        row = math.log(sum(math.exp(logits[i][j]) for j in range(4))) - logits[i][i]
        column = math.log(sum(math.exp(logits[j][i]) for j in range(4))) - logits[i][i]
        total += (row + column) / 8
    assert contrastive_loss(a, b, torch.tensor(5.0)).item() == pytest.approx(total, abs=1e-12)


def test_multi_positive_loss_is_the_divergence_from_uniform_targets():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    positive = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1]]).double()
    expected = 0.0
    for table, truth in ((logits, positive), (logits.T, positive.T)):
        for row, target in zip(table, truth, strict=True):
            if target.sum():
                log_p, uniform = row.log_softmax(0), target / target.sum()
                expected += (
                    functional.kl_div(log_p, uniform, reduction="sum").item() / len(table) / 2
                )
    assert multi_positive_loss(logits, positive).item() == pytest.approx(expected, abs=1e-12)


def test_multi_positive_loss_is_zero_for_perfect_logits():
    positive = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert multi_positive_loss(200 * positive, positive).item() == pytest.approx(0, abs=1e-6)


def test_auc_counts_pairs_and_half_of_the_ties():
    generator = np.random.default_rng(0)
    scores, positive = generator.integers(0, 6, 60).astype(float), generator.random(60) < 0.4
    pairs = [
        1.0 if high > low else 0.5 if high == low else 0.0
        for high in scores[positive]
        for low in scores[~positive]
    ]
    assert auc(scores, positive) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert math.isnan(auc(scores, np.ones(60, bool)))


def test_written_weights_load_here_and_as_an_encoder(tmp_path, model, monkeypatch):
    path = tmp_path / "clip.safetensors"
    weights_io.write_clip(model, path)
    again = weights_io.read_clip(path)
    for name, tensor in again.state_dict().items():
        expected = model.state_dict()[name].half().float()
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    encoder = load_clip(str(path))
    images = render("clear-day", 2, 0)[0]
    with torch.inference_mode():
        whole, _ = encode_dense(again, normalise(torch.from_numpy(images)))
    np.testing.assert_allclose(encoder.encode_images(list(images)), whole, rtol=1e-4, atol=1e-5)
    ids = tokenizer()(["a zebra on the road"])
    assert torch.equal(encoder.tokenizer(["a zebra on the road"]), ids)
    monkeypatch.setattr(weights_io, "tokenizer", lambda: type(tokenizer())(["other"]))
    with pytest.raises(IntegrityError, match="vocabulary differs"):
        weights_io.read_clip(path)
