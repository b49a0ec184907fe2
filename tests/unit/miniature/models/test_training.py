import logging

import numpy as np
import pytest
import torch

from loraseg.data import IGNORE
from loraseg.miniature.models.catseg import training as catseg_training
from loraseg.miniature.models.clip import training as clip_training
from loraseg.miniature.models.clip.batches import NO_LABEL, ScenePool, crop_size_shares, draw_batch
from loraseg.miniature.models.clip.model import build_clip
from loraseg.miniature.models.weights_io import write_clip
from loraseg.miniature.world.canvas import class_id
from loraseg.miniature.world.captions import tokenizer
from loraseg.miniature.world.domains import DOMAINS, LABELLED_DOMAINS
from loraseg.miniature.world.render import presence


@pytest.fixture(scope="module")
def pool():
    return ScenePool(2, 0)


def test_crop_shares_are_probabilities_and_end_with_whole_images():
    for progress in np.linspace(0, 1, 21):
        assert sum(crop_size_shares(progress)) == pytest.approx(1)
    assert crop_size_shares(0.95) == (0.0, 0.0, 1.0)


def test_patch_labels_are_clear_majorities_of_labelled_domains(pool):
    for row in range(0, len(pool.masks), 7):
        labelled = list(DOMAINS)[row // 2] in LABELLED_DOMAINS
        for top in range(0, 16, 5):
            for left in range(0, 16, 5):
                patch = pool.masks[row, 4 * top : 4 * top + 4, 4 * left : 4 * left + 4]
                counts = np.bincount(patch.ravel(), minlength=12)
                expected = counts.argmax() if labelled and counts.max() >= 7 else NO_LABEL
                assert pool.patch_labels[row, top, left] == expected


@pytest.mark.parametrize("seed", range(6))
def test_the_parts_of_a_batch_are_consistent(pool, seed):
    batch = draw_batch(pool, 0.3, np.random.default_rng(seed))
    count, _, side, _ = batch.images.shape
    assert batch.patch_labels.shape == (count, side // 4, side // 4)
    assert max(batch.offset) + side // 4 <= 16
    labelled = [list(DOMAINS).index(name) for name in LABELLED_DOMAINS]
    outside = ~np.isin(batch.domains, labelled)
    assert (batch.patch_labels[outside] == NO_LABEL).all()
    for label in range(12):
        visible = (batch.patch_labels == label).reshape(count, -1).sum(1) * 7 >= 12
        assert batch.present[visible, label].all()
    assert 0 < len(batch.captions) <= count


def test_early_batches_come_from_labelled_domains(pool):
    labelled = {list(DOMAINS).index(name) for name in LABELLED_DOMAINS}
    for seed in range(5):
        assert set(draw_batch(pool, 0.1, np.random.default_rng(seed)).domains) <= labelled


def test_clip_training_is_reproducible(caplog):
    config = clip_training.ClipTrainingConfig(steps=1, scenes=2, log_every=1)
    with caplog.at_level(logging.INFO):
        first, second = clip_training.train_clip(config), clip_training.train_clip(config)
    assert caplog.text.count("caption class dense region domain") == 2
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[name], rtol=0, atol=0)
        assert torch.isfinite(tensor).all()


def test_clip_training_continues_from_weights(tmp_path):
    clip = build_clip(tokenizer().vocab_size)
    write_clip(clip, tmp_path / "clip.safetensors")
    config = clip_training.ClipTrainingConfig(
        steps=2, scenes=2, init=tmp_path / "clip.safetensors", first_step=2, learning_rate=1e-6
    )
    after = clip_training.train_clip(config).state_dict()
    for name, tensor in clip.state_dict().items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_held_out_class_never_reaches_the_loss():
    config = catseg_training.CatsegTrainingConfig(scenes=4)
    images, labels = catseg_training._scenes(config)
    masks = np.concatenate(
        [
            catseg_training.render(domain, 4, config.seed, "pretrain-catseg")[1]
            for domain in catseg_training.BASE_DOMAINS
        ]
    )
    assert len(images) == len(labels) == 16
    held = masks == class_id("bus")
    assert presence(masks)[:, class_id("bus")].any()
    assert ((labels == IGNORE) == held).all()
    assert labels[~held].max() == 10
    prompts = catseg_training._prompts(np.random.default_rng(0))
    assert len(prompts) == 11
    assert not any("bus" in prompt or "coach" in prompt for prompt in prompts)


def test_catseg_training_changes_only_trainable_weights():
    torch.manual_seed(0)
    clip = build_clip(tokenizer().vocab_size)
    config = catseg_training.CatsegTrainingConfig(steps=2, scenes=4, batch=2)
    model = catseg_training.train_catseg(config, clip)
    own = model.clip.state_dict()
    torch.testing.assert_close(own["visual.conv1.weight"], clip.visual.conv1.weight)
    torch.testing.assert_close(own["token_embedding.weight"], clip.token_embedding.weight)
    query = clip.visual.transformer.resblocks[0].attn.in_proj_weight[:128]
    assert not torch.equal(own["visual.transformer.resblocks.0.attn.q_proj.weight"], query)
    again = catseg_training.train_catseg(config, clip).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, again[name], rtol=0, atol=0)
