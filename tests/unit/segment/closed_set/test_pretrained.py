import pytest
import safetensors.torch
import torch
import torchvision

from loraseg.compat import prepare_torchvision
from loraseg.errors import ConfigError, IntegrityError
from loraseg.segment.closed_set.networks import NetworkConfig, build_network
from loraseg.segment.closed_set.pretrained import load_pretrained

_DEEPLAB = NetworkConfig(name="deeplabv3plus-r101", backbone="resnet18", width=16)
_MASK_FORMER = NetworkConfig(name="mask2former-swin-b", backbone="swin-nano", width=32)


def _network(config, classes=4, seed=0):
    torch.manual_seed(seed)
    return build_network(config, classes)


def _write(path, state):
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path


def _equal(first, second, names):
    a, b = first.body.state_dict(), second.body.state_dict()
    return [torch.equal(a[name], b[name]) for name in names]


def test_resnet_of_torchvision(tmp_path):
    torch.manual_seed(9)
    resnet = torchvision.models.resnet18()
    network = _network(_DEEPLAB)
    load_pretrained(network, _write(tmp_path / "r.safetensors", resnet.state_dict()))
    loaded = network.body.encoder.state_dict()
    for name, value in resnet.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(loaded[name], value)
    fresh = _network(_DEEPLAB)
    heads = [n for n, _ in fresh.body.named_parameters() if not n.startswith("encoder.")]
    assert all(_equal(network, fresh, heads))


def test_complete_deeplab_with_another_head(tmp_path):
    trained = _network(_DEEPLAB, classes=7, seed=5)
    network = _network(_DEEPLAB)
    load_pretrained(network, _write(tmp_path / "d.safetensors", trained.body.state_dict()))
    names = list(network.body.state_dict())
    assert all(_equal(network, trained, [n for n in names if "segmentation_head" not in n]))
    fresh = _network(_DEEPLAB)
    assert all(_equal(network, fresh, [n for n in names if "segmentation_head" in n]))


def test_complete_mask2former_as_saved_by_transformers(tmp_path):
    trained = _network(_MASK_FORMER, classes=7, seed=5)
    trained.body.network.save_pretrained(tmp_path)
    network = _network(_MASK_FORMER)
    load_pretrained(network, tmp_path)
    names = [n for n in network.body.state_dict() if "class_predictor" not in n]
    assert all(_equal(network, trained, [n for n in names if "empty_weight" not in n]))


def test_swin_classifier_as_saved_by_transformers(tmp_path):
    prepare_torchvision()
    from transformers import SwinForImageClassification

    torch.manual_seed(9)
    network = _network(_MASK_FORMER)
    encoder = network.body.network.model.pixel_level_module.encoder
    classifier = SwinForImageClassification(encoder.config)
    classifier.save_pretrained(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert any("attention.self.query" in name for name in saved)  # the names of files on the hub
    load_pretrained(network, tmp_path)
    for name, value in classifier.swin.encoder.state_dict().items():
        assert torch.equal(encoder.swin.encoder.state_dict()[name], value)


def test_refuses_other_files(tmp_path):
    network = _network(_DEEPLAB)
    with pytest.raises(ConfigError, match="cannot read"):
        load_pretrained(network, tmp_path / "missing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"rubbish")
    with pytest.raises(IntegrityError, match="safetensors"):
        load_pretrained(network, tmp_path / "bad.safetensors")
    other = torchvision.models.resnet34().state_dict()
    load_pretrained(network, _write(tmp_path / "more.safetensors", other))
    del other["layer1.0.conv1.weight"]
    with pytest.raises(IntegrityError, match=r"layer1\.0\.conv1\.weight"):
        load_pretrained(network, _write(tmp_path / "less.safetensors", other))
    with pytest.raises(ConfigError, match="no backbone"):
        load_pretrained(_network(NetworkConfig(width=8)), tmp_path / "more.safetensors")
    with pytest.raises(IntegrityError, match="lacks"):
        load_pretrained(_network(_MASK_FORMER), tmp_path / "more.safetensors")
