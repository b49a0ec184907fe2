import hashlib
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import loraseg
from loraseg.errors import ConfigError, DatasetError, IntegrityError
from loraseg.miniature.world.canvas import CLASSES
from loraseg.segment.closed_set.checkpoint import (
    decode_closed_set_segmenter,
    encode_closed_set_segmenter,
    load_closed_set_segmenter,
)
from loraseg.segment.closed_set.networks import NetworkConfig, build_network
from loraseg.segment.closed_set.unet import UNet
from loraseg.storage import open_store
from loraseg.storage.safetensors_io import encode_safetensors

_NAMES = ["road", "car", "sky"]
_CONFIGS = [
    NetworkConfig(width=8),
    NetworkConfig(name="deeplabv3plus-r101", backbone="resnet18", width=16),
    NetworkConfig(name="mask2former-swin-b", backbone="swin-nano", width=32),
]
_JUDGE = Path(loraseg.__file__).parent / "miniature" / "weights" / "judge.safetensors"


def _network(config):
    torch.manual_seed(3)
    return build_network(config, len(_NAMES))


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 37, 50, 3), dtype=np.uint8)


@pytest.mark.parametrize("config", _CONFIGS, ids=lambda config: config.name)
def test_file_round_trip(config, images, tmp_path):
    network = _network(config)
    data = encode_closed_set_segmenter(network, _NAMES)
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / "s.safetensors").write_bytes(data)
    segmenter = load_closed_set_segmenter(tmp_path / "s.safetensors")
    assert (segmenter.digest, segmenter.name) == (digest, config.name)
    assert segmenter.label_space.names == tuple(_NAMES)
    assert encode_closed_set_segmenter(segmenter.network, _NAMES) == data
    network.eval()
    with torch.no_grad():
        expected = torch.cat([network(network.normalise(torch.tensor(i)[None])) for i in images])
    log_p = segmenter.log_probabilities(images)
    assert log_p.shape == (2, 3, 37, 50)
    torch.testing.assert_close(log_p, expected.log_softmax(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(2, 37, 50), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(segmenter.labels(images), log_p.argmax(1).numpy())


def test_one_image_does_not_depend_on_the_others(images):
    segmenter = decode_closed_set_segmenter(
        encode_closed_set_segmenter(_network(_CONFIGS[0]), _NAMES), "here"
    )
    together, alone = segmenter.log_probabilities(images), segmenter.log_probabilities(images[1:])
    assert torch.equal(together[1], alone[0])
    assert segmenter.log_probabilities(images[:0]).shape == (0, 3, 37, 50)


def test_reads_from_a_store(tmp_path):
    data = encode_closed_set_segmenter(_network(_CONFIGS[0]), _NAMES)
    open_store(str(tmp_path)).put("runs/a/segmenter.safetensors", data)
    path = tmp_path / "runs" / "a" / "segmenter.safetensors"
    unusual = tmp_path / "a b#c%20.safetensors"
    unusual.write_bytes(data)
    for spec in (path, str(path), f"file://{path}", str(unusual), unusual.as_uri()):
        assert load_closed_set_segmenter(spec).digest == hashlib.sha256(data).hexdigest()


def test_reads_the_judge_of_the_miniature():
    images = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    segmenter = load_closed_set_segmenter(_JUDGE)
    assert segmenter.label_space.names == tuple(CLASSES)
    judge = UNet(len(CLASSES))
    state = safetensors.torch.load_file(_JUDGE)
    judge.load_state_dict({name: value.float() for name, value in state.items()})
    with torch.no_grad():
        logits = judge(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
    assert (segmenter.labels(images) == logits.argmax(1).numpy()).mean() > 0.999
    digest = "150b5bac8643d02a284c879a725cabb755c9da2a3ce116b0730f5f5c7c54a72f"
    assert segmenter.digest == digest


def test_files_in_half_precision(images):
    network = _network(_CONFIGS[0])
    data = encode_closed_set_segmenter(network, _NAMES, dtype=torch.float16)
    assert len(data) < 0.6 * len(encode_closed_set_segmenter(network, _NAMES))
    segmenter = decode_closed_set_segmenter(data, "here")
    assert not any(parameter.requires_grad for parameter in segmenter.network.parameters())
    rounded = network.half().float().eval()
    pixels = rounded.normalise(torch.tensor(images))
    assert torch.equal(segmenter.network(pixels), rounded(pixels))
    assert encode_closed_set_segmenter(segmenter.network, _NAMES, dtype=torch.float16) == data


@pytest.mark.parametrize("spec", ["missing.safetensors", "s3://bucket", "s3:///x"])
def test_missing_files_are_named(spec):
    with pytest.raises(ConfigError, match=r"segmenter|expected a file"):
        load_closed_set_segmenter(spec)


def test_class_names_must_fit_the_network():
    with pytest.raises(ConfigError, match="2 class names for a network of 3"):
        encode_closed_set_segmenter(_network(_CONFIGS[0]), _NAMES[:2])
    with pytest.raises(DatasetError, match="twice"):
        encode_closed_set_segmenter(_network(_CONFIGS[0]), ["a", "b", "A"])


def _file(header, state=None):
    state = _network(_CONFIGS[0]).body.state_dict() if state is None else state
    return encode_safetensors(state, header)


def _header(**changes):
    header = {
        "format": "loraseg-segmenter-1",
        "network": json.dumps({"name": "unet-small", "width": 8}),
        "classes": json.dumps(_NAMES),
    }
    return {k: v for k, v in {**header, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    "header",
    [
        {"format": "other"},
        {"classes": None},
        {"classes": "{"},
        {"classes": "3"},
        {"classes": json.dumps([1, 2, 3])},
        {"classes": json.dumps([[], [], []])},
        {"classes": json.dumps(["a"])},
        {"classes": json.dumps({"a": 1, "b": 2, "c": 3})},
        {"classes": "[" * 100_000},
        {"network": None},
        {"network": "[]"},
        {"network": json.dumps({"name": "other"})},
        {"network": json.dumps({"name": "unet-small", "width": 4096})},
        {"network": json.dumps({"name": "unet-small", "width": -8})},
        {"network": json.dumps({"name": "unet-small", "width": 10**9})},
        {"network": json.dumps({"name": "unet-small", "width": 8, "more": 1})},
        {"network": json.dumps({"name": "unet-small", "backbone": "resnet18"})},
        {"format": None, "width": "x"},
        {"format": None, "width": "-8"},
        {"format": None},
        {"format": None, "width": "8", "classes": None},
        {"format": None, "width": "8000000"},
        {"format": None, "width": "9"},
        {"format": None, "width": "16"},
        {"format": None, "width": "8", "classes": json.dumps(_NAMES[:2])},
        {"format": None, "width": "8", "classes": '"sky"'},
        {"format": None, "width": "8", "classes": "[1, 2, 3]"},
    ],
)
def test_refuses_hostile_headers(header):
    with pytest.raises(IntegrityError, match="here"):
        decode_closed_set_segmenter(_file(_header(**header)), "here")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * 100,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 20) + b'{"__metadata__":null}',
        struct.pack("<Q", 21) + b'{"__metadata__": [1]}',
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_refuses_bytes_of_other_formats(data):
    with pytest.raises(IntegrityError, match="here: not a segmenter"):
        decode_closed_set_segmenter(data, "here")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_non_finite_values(value):
    state = _network(_CONFIGS[0]).body.state_dict()
    state["head.bias"][1] = value
    with pytest.raises(IntegrityError, match="not finite"):
        decode_closed_set_segmenter(_file(_header(), state), "here")


def test_refuses_truncated_files_and_missing_or_unknown_tensors():
    state = _network(_CONFIGS[0]).body.state_dict()
    with pytest.raises(IntegrityError, match="here"):
        decode_closed_set_segmenter(_file(_header())[:-10], "here")
    with pytest.raises(IntegrityError, match=r"head\.bias"):
        decode_closed_set_segmenter(
            _file(_header(), {k: v for k, v in state.items() if k != "head.bias"}), ""
        )
    with pytest.raises(IntegrityError, match="'more'"):
        decode_closed_set_segmenter(_file(_header(), {**state, "more": torch.zeros(1)}), "here")
    with pytest.raises(IntegrityError, match="head"):
        decode_closed_set_segmenter(
            _file(_header(), {**state, "head.bias": torch.zeros(9)}), "here"
        )
    whole = state["head.bias"].int()
    with pytest.raises(IntegrityError, match="int32"):
        decode_closed_set_segmenter(_file(_header(), {**state, "head.bias": whole}), "here")
