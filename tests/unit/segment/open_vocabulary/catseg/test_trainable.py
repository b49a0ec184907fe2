"""Trainable parameters, parameter groups, and inputs that the loss refuses."""

import inspect

import pytest
import torch

from loraseg.errors import ConfigError, DatasetError, StageError
from loraseg.segment.open_vocabulary.catseg.official import load_official_checkpoint
from loraseg.segment.open_vocabulary.catseg.trainable import freeze_clip, parameter_groups
from loraseg.segment.open_vocabulary.losses import catseg_bce
from tests.unit.segment.open_vocabulary.catseg.official_layout import S, Sizes, layout, random_state


@pytest.fixture
def model():
    return load_official_checkpoint(random_state(Sizes()), vision_heads=2, text_heads=2, heads=2)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_attention_mode_trains_q_and_v_weights_of_both_encoders(model):
    freeze_clip(model, "attention")
    clip = {
        key.replace("_proj_weight", "_proj.weight")
        for key in layout(Sizes())
        if key.endswith((".q_proj_weight", ".v_proj_weight"))
    }
    assert len(clip) == 12
    rest = {key for key in layout(Sizes()) if not key.startswith(f"{S}clip_model.")}
    assert trainable(model) == clip | {key for key in rest if not key.endswith("attn_mask")}


def test_frozen_mode_trains_no_parameter_of_clip(model):
    freeze_clip(model, "frozen")
    assert not any(".clip_model." in name for name in trainable(model))
    with pytest.raises(ConfigError, match="freeze mode 'half'"):
        inspect.unwrap(freeze_clip)(model, "half")  # bypass the runtime type checks of tests


def test_groups_cover_every_trainable_parameter_once(model):
    freeze_clip(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = {}
    for group in parameter_groups(model, lr=1.0, weight_decay=0.5, clip_multiplier=0.25):
        for parameter in group["params"]:
            assert id(parameter) not in seen
            seen[id(parameter)] = group["lr"], group["weight_decay"]
    assert {names[key] for key in seen} == trainable(model)
    for key, (lr, decay) in seen.items():
        name = names[key]
        assert lr == (0.25 if ".clip_model." in name else 1.0), name
        norm = "norm" in name or "double_conv.1." in name or "double_conv.4." in name
        assert decay == (0.0 if norm else 0.5), name


def test_embeddings_have_no_weight_decay(model):
    model.requires_grad_(True)
    groups = parameter_groups(model)
    table = model.clip.token_embedding.weight
    (group,) = [g for g in groups if any(p is table for p in g["params"])]
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(2e-6), 0.0)


def test_ignored_pixels_have_no_gradient_only_if_masked():
    logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
    label = torch.full((1, 4, 4), 255)
    label[0, 0, 0] = 1
    for masked, share in ((False, 1 / 32), (True, 1 / 2)):
        (gradient,) = torch.autograd.grad(catseg_bce(logits, label, mask_ignored=masked), logits)
        assert gradient[0, 0, 0, 0] == pytest.approx(0.5 * share)
        assert gradient[0, 1, 0, 0] == pytest.approx(-0.5 * share)
        assert gradient[0, 0, 3, 3] == pytest.approx(0.0 if masked else 0.5 * share)


def test_loss_refuses_unknown_ids_and_fully_ignored_batches():
    logits = torch.zeros(1, 2, 4, 4)
    with pytest.raises(DatasetError, match=r"label ids \[2, 9\]: expected 0 to 1 or 255"):
        catseg_bce(logits, torch.tensor([[[0, 2], [9, 255]]]))
    nothing = torch.full((1, 4, 4), 255)
    assert catseg_bce(logits, nothing) == pytest.approx(0.6931472)
    with pytest.raises(StageError, match="every pixel of the batch is ignored"):
        catseg_bce(logits, nothing, mask_ignored=True)
