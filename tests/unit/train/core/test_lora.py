import copy

import numpy as np
import peft
import pytest
import torch

from loraseg.adapters.targets.catseg import target_modules
from loraseg.errors import AdapterMismatchError
from loraseg.train.core.lora import apply_lora, freeze, init_pairs
from loraseg.train.segmenter_adapters.samples import (
    encode_image_features,
    encode_text,
    segmentation_loss,
)
from tests.unit.tiny import tiny_base

CLASSES = ["sky", "road", "car"]


def random_pairs(base, rule="semla", dtype=torch.float32):
    """Random pairs, whose gradients are all non-zero."""
    pairs = init_pairs(base.model, target_modules(base.model, rule), rank=3, alpha=1.5, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in pairs.parameters().values():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(dtype)
    return pairs


def inputs():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    return images, generator.integers(0, 3, (2, 16, 16), dtype=np.uint8)


def gradients(base, parameters, precision):
    """Loss and gradients of all parameters on one batch."""
    images, labels = inputs()
    text = encode_text(base, base.tokenize(CLASSES), precision)
    side = encode_image_features(base, images, precision)
    loss = segmentation_loss(base, text, side, labels, precision=precision)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return loss.detach(), dict(zip(parameters, found, strict=True))


def ours(base, pairs, precision="fp32"):
    with freeze(base.model, training=False), apply_lora(base.model, pairs):
        return gradients(base, pairs.parameters(), precision)


def by_peft(base, pairs, precision="fp32"):
    """Loss and gradients of stock peft, which modifies the model permanently."""
    config = peft.LoraConfig(r=3, lora_alpha=1.5, target_modules=list(pairs.pairs))
    peft.LoraModel(base.model, config, "default")
    parameters = {}
    for name, (down, up) in pairs.pairs.items():
        layer = base.model.get_submodule(name)
        for side, value in (("lora_A", down), ("lora_B", up)):
            parameter = getattr(layer, side)["default"].weight
            parameter.data = value.detach().clone()
            parameters[f"{name}.{side}"] = parameter
    return gradients(base, parameters, precision)


@pytest.mark.parametrize("rule", ["semla", "aggregator"])
def test_loss_and_gradients_are_those_of_stock_peft(rule, monkeypatch):
    base, theirs = tiny_base(), tiny_base()
    # The base normalises in float32; replaced so that float64 digits can be compared.
    monkeypatch.setattr(type(base), "normalise", lambda self, x: (x.double() - 120) / 60)
    for one in (base, theirs):
        one.model.double()
    pairs = random_pairs(base, rule, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    (loss, found), (expected_loss, expected) = ours(base, pairs), by_peft(theirs, pairs)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        if gradient is None or found[name] is None:
            # The last vision block of CAT-Seg has values but no attention.
            assert gradient is found[name] is None
            assert ".resblocks.1.attn." in name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


def test_in_bf16_the_gradients_are_as_near_to_the_exact_ones_as_pefts():
    base = tiny_base()
    pairs = random_pairs(base)
    _, exact = ours(base, pairs)
    _, found = ours(base, pairs, "bf16")
    _, theirs = by_peft(base, pairs, "bf16")

    def error(gradients):
        parts = [(gradients[n] - e).square().sum() for n, e in exact.items() if e is not None]
        return float(sum(parts)) ** 0.5

    assert 0 < error(found) < 1.2 * error(theirs)


def test_initial_pairs_change_nothing_and_follow_the_reference():
    base = tiny_base()
    names = target_modules(base.model)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pairs, others = (
        init_pairs(base.model, names, rank=64, alpha=8.0, seed=seed) for seed in (0, 1)
    )
    with torch.no_grad():
        text = base.encode_classes(["sky", "road"])
        plain = base.model(x, text)
        with apply_lora(base.model, pairs):
            torch.testing.assert_close(base.model(x, text), plain, rtol=1e-5, atol=1e-5)
    for name, (parameter, up) in pairs.pairs.items():
        down = parameter.detach()
        # Kaiming uniform with a = sqrt(5): uniform within 1 / sqrt(d_in), variance 1 / (3 d_in).
        bound = down.shape[1] ** -0.5
        assert float(down.abs().max()) <= bound
        assert float(down.var()) == pytest.approx(bound**2 / 3, rel=0.2)
        assert not up.any()
        assert not torch.equal(others.pairs[name][0], down)
    assert pairs.scale == 8.0 / 64


def test_several_sets_alternate_and_the_base_stays_unchanged():
    base = tiny_base()
    state = copy.deepcopy(base.model.state_dict())
    images, _ = inputs()
    plain = encode_image_features(base, images).features
    pairs = random_pairs(base)
    for _ in range(2):
        with apply_lora(base.model, pairs):
            assert not torch.equal(encode_image_features(base, images).features, plain)
        assert torch.equal(encode_image_features(base, images).features, plain)
    assert all(torch.equal(value, state[key]) for key, value in base.model.state_dict().items())


def test_only_one_set_of_pairs_can_be_applied():
    base = tiny_base()
    pairs = random_pairs(base)
    with (
        apply_lora(base.model, pairs),
        pytest.raises(AdapterMismatchError, match="LoRA pairs already"),
        apply_lora(base.model, pairs),
    ):
        pass


def test_freeze_restores_the_model():
    model = tiny_base().model
    model.upsample1.requires_grad_(True)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with freeze(model, training=True):
        assert model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cached_features_give_the_bits_of_new_features(precision):
    base = tiny_base()
    pairs = random_pairs(base, "aggregator")
    images, labels = inputs()
    with freeze(base.model, training=False):
        with torch.no_grad():
            side = encode_image_features(base, images, precision)
            text = encode_text(base, base.tokenize(CLASSES), precision)
        with apply_lora(base.model, pairs):
            loss = segmentation_loss(base, text, side, labels, precision=precision)
            parameters = pairs.parameters()
            kept = torch.autograd.grad(loss, list(parameters.values()))
            again, anew = gradients(base, parameters, precision)
    assert torch.equal(loss, again)
    assert all(torch.equal(x, y) for x, y in zip(kept, anew.values(), strict=True))
