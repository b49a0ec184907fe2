import numpy as np
import pytest
import torch
from torch.nn import functional

from loraseg.config import build
from loraseg.errors import ConfigError
from loraseg.segment.closed_set.mask_loss import set_loss
from loraseg.segment.closed_set.networks import NETWORKS, NetworkConfig, build_network

_CONFIGS = [
    NetworkConfig(width=8),
    NetworkConfig(name="deeplabv3plus-r101", backbone="resnet18", width=16),
    NetworkConfig(name="mask2former-swin-b", backbone="swin-nano", width=32),
]
_UNET, _DEEPLAB, _MASK_FORMER = _CONFIGS


def _network(config, classes=4):
    torch.manual_seed(3)
    return build_network(config, classes)


def _images(count=2, height=45, width=38):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("config", _CONFIGS, ids=lambda config: config.name)
def test_logits_have_the_size_of_any_image(config):
    network = _network(config).eval()
    for size in ((1, 1), (45, 38), (64, 32)):
        with torch.no_grad():
            logits = network(network.normalise(_images(2, *size)))
        assert logits.shape == (2, 4, *size)
        assert logits.isfinite().all()


def test_padding_replicates_the_edge():
    network = _network(_UNET).eval()
    images = _images(1, 45, 38)
    larger = np.pad(images.numpy(), ((0, 0), (0, 3), (0, 2), (0, 0)), mode="edge")
    with torch.no_grad():
        logits = network(network.normalise(images))
        expected = network(network.normalise(torch.from_numpy(larger)))[..., :45, :38]
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("config", _CONFIGS[:2], ids=lambda config: config.name)
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_is_cross_entropy_over_labelled_pixels(config, weighted):
    network = _network(config).eval()
    pixels = network.normalise(_images())
    targets = torch.randint(0, 4, (2, 45, 38), generator=torch.Generator().manual_seed(2))
    targets[0, :30] = 255
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0]) if weighted else None
    with torch.no_grad():
        loss = network.loss(pixels, targets, weights)
        log_p = network(pixels).double().log_softmax(1)
    valid = targets != 255
    losses = -log_p.gather(1, torch.where(valid, targets, 0)[:, None])[:, 0][valid]
    weight = torch.ones(len(losses)) if weights is None else weights[targets[valid]]
    torch.testing.assert_close(
        loss.double(), (losses * weight).sum() / weight.sum(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("config", _CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_without_labels_has_zero_loss_and_gradient(config, weighted):
    network = _network(config).train()
    targets = torch.full((2, 45, 38), 255)
    weights = torch.ones(4) if weighted else None
    loss = network.loss(network.normalise(_images()), targets, weights)
    loss.backward()
    assert loss.detach() == 0
    assert all((p.grad == 0).all() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", _CONFIGS, ids=lambda config: config.name)
def test_every_trainable_parameter_has_a_gradient(config):
    # Otherwise DistributedDataParallel fails at the second step.
    network = _network(config).train()
    targets = torch.zeros(2, 45, 38, dtype=torch.int64)
    network.loss(network.normalise(_images()), targets).backward()
    assert not [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None]


def test_the_semantic_map_is_the_normalised_sum_over_queries():
    network = _network(_MASK_FORMER).eval()
    pixels = network.normalise(_images(2, 64, 96))
    with torch.no_grad():
        out = network.body.network(pixel_values=pixels)
        log_p = network(pixels)
    shares = out.class_queries_logits.double().softmax(-1)[..., :-1]
    masks = functional.interpolate(
        out.masks_queries_logits.double(), (64, 96), mode="bilinear", align_corners=False
    )
    semantic = (shares[..., None, None] * masks.sigmoid()[:, :, None]).sum(1)
    expected = (semantic / semantic.sum(1, keepdim=True)).log()
    torch.testing.assert_close(log_p.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_mask_loss_equals_that_of_transformers_without_ignored_pixels(weighted):
    network = _network(_MASK_FORMER).eval()
    inner = network.body.network
    pixels = network.normalise(_images(2, 64, 64))
    targets = torch.randint(0, 4, (2, 4, 4), generator=torch.Generator().manual_seed(2))
    targets[1][targets[1] == 2] = 0
    targets = targets.repeat_interleave(16, 1).repeat_interleave(16, 2)
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0]) if weighted else None
    with torch.no_grad():
        torch.manual_seed(0)
        loss = network.loss(pixels, targets, weights)
        if weights is not None:
            inner.criterion.empty_weight[:-1] = weights
        shown = [image.unique() for image in targets]
        masks = [
            (image[None] == ids[:, None, None]).float()
            for image, ids in zip(targets, shown, strict=True)
        ]
        torch.manual_seed(0)
        expected = inner(pixel_values=pixels, mask_labels=masks, class_labels=shown).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


class TestIgnoredPixels:
    """The mask loss on free logits does not depend on predictions at ignored pixels."""

    @staticmethod
    def _loss(masks, targets):
        network = _network(_MASK_FORMER)
        generator = torch.Generator().manual_seed(4)
        classes = torch.randn(2, 6, 5, generator=generator)
        torch.manual_seed(0)
        return set_loss([(classes, masks)], targets, torch.ones(5), network.body.network.config)

    @staticmethod
    def _case():
        masks = torch.randn(2, 6, 16, 16, generator=torch.Generator().manual_seed(5))
        targets = torch.zeros(2, 64, 64, dtype=torch.int64)
        targets[:, :, 20:40] = 1
        targets[:, 32:] = 255
        return masks, targets

    def test_predictions_on_them_do_not_change_the_loss(self):
        masks, targets = self._case()
        other = masks.clone()
        other[:, :, 9:] = 50 * torch.randn(2, 6, 7, 16)
        torch.testing.assert_close(
            self._loss(masks, targets), self._loss(other, targets), rtol=1e-6, atol=0
        )
        assert self._loss(masks, targets) != self._loss(
            other, torch.where(targets == 255, 0, targets)
        )

    def test_they_have_no_gradient(self):
        masks, targets = self._case()
        masks.requires_grad_(True)
        self._loss(masks, targets).backward()
        assert (masks.grad[:, :, 9:] == 0).all()
        assert (masks.grad[:, :, :7] != 0).any()

    def test_the_loss_is_that_of_the_labelled_part(self):
        # The loss of the labelled half alone, with the same density of points, is about the same.
        masks, targets = self._case()
        whole, half = self._loss(masks, targets), self._loss(masks[:, :, :8], targets[:, :32])
        torch.testing.assert_close(whole, half, rtol=0.05, atol=0)


@pytest.mark.parametrize("config", _CONFIGS, ids=lambda config: config.name)
def test_groups_contain_every_parameter_once(config):
    network = _network(config)
    groups = network.parameter_groups(0.1, 10.0)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in network.parameters())
    rates = {group["lr"] for group in groups}
    assert rates == ({0.1} if config is _UNET else {0.1, 1.0})
    prefix = network.backbone_prefix()
    slow = {id(p) for group in groups if group["lr"] == 0.1 for p in group["params"]}
    assert slow == {id(p) for name, p in network.body.named_parameters() if name.startswith(prefix)}


def test_norms_and_embeddings_of_mask2former_have_no_weight_decay():
    network = _network(_MASK_FORMER)
    bare = {
        id(p)
        for group in network.parameter_groups(0.1)
        if group.get("weight_decay") == 0
        for p in group["params"]
    }
    names = {name for name, p in network.body.named_parameters() if id(p) in bare}
    assert any("relative_position_bias_table" in name for name in names)
    assert any("queries_features" in name for name in names)
    assert any("norm" in name for name in names)
    assert not any("q_proj.weight" in name or "class_predictor" in name for name in names)


@pytest.mark.parametrize(
    "values",
    [
        {"name": "other"},
        {"width": 0},
        {"width": 12},
        {"width": 8192},
        {"backbone": "resnet18"},
        {"name": "deeplabv3plus-r101", "backbone": "swin-b"},
        {"name": "mask2former-swin-b", "width": 16},
    ],
)
def test_refuses_invalid_configs(values):
    with pytest.raises(ConfigError, match=r"name|width|backbone"):
        build(NetworkConfig, values)


def test_refuses_invalid_numbers_of_classes():
    for classes in (0, 256):
        with pytest.raises(ConfigError, match="classes"):
            build_network(_UNET, classes)


def test_parameter_counts_are_those_of_the_papers():
    sizes = {}
    for name in NETWORKS:
        with torch.device("meta"):
            network = build_network(NetworkConfig(name=name), 21)
        sizes[name] = sum(p.numel() for p in network.parameters()) / 1e6
    assert sizes["unet-small"] == pytest.approx(0.26, abs=0.1)
    # DeepLabV3+ with separable convolutions; Mask2Former reports 107 M for Swin-B.
    assert sizes["deeplabv3plus-r101"] == pytest.approx(45.7, abs=1)
    assert sizes["mask2former-swin-b"] == pytest.approx(107, abs=1)
