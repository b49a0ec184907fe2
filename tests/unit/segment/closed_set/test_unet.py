import json

import numpy as np
import pytest
import torch

from loraseg.errors import IntegrityError
from loraseg.segment.closed_set.unet import UNet, encode_unet, load_unet, predict_labels
from loraseg.storage.safetensors_io import encode_safetensors

NAMES = ("sky", "road", "car")


def _net(seed=0):
    torch.manual_seed(seed)
    return UNet(3, width=8).eval()


def test_a_file_brings_back_the_network_in_half_precision(tmp_path):
    path = tmp_path / "unet.safetensors"
    path.write_bytes(encode_unet(_net(), NAMES))
    read, names = load_unet(path)
    assert names == NAMES
    assert not any(parameter.requires_grad for parameter in read.parameters())
    expected = _net().half().float()
    images = torch.rand(2, 3, 16, 12) * 2 - 1
    assert torch.equal(read(images), expected(images))
    assert encode_unet(read, names) == path.read_bytes()


def test_predictions_do_not_depend_on_the_batch():
    images = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
    whole = predict_labels(_net(), images)
    assert whole.shape == (70, 8, 8)
    alone = predict_labels(_net(), images[66:67])
    assert np.mean(whole[66:67] == alone) > 0.98  # sums in another order may move a tie
    logits = _net()(torch.from_numpy(images[:3]).permute(0, 3, 1, 2) / 127.5 - 1)
    assert np.array_equal(whole[:3], logits.argmax(1).numpy())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"width": "8"}, "not a small U-Net: 'classes'"),
        ({"width": "wide", "classes": json.dumps(NAMES)}, "invalid literal"),
        ({"width": "8000000", "classes": json.dumps(NAMES)}, r"not a small U-Net: .*\n.*mismatch"),
        ({"width": "9", "classes": json.dumps(NAMES)}, "not a small U-Net"),
        ({"width": "8", "classes": json.dumps(NAMES[:2])}, "mismatch"),
        ({"width": "8", "classes": '"sky"'}, "expected a list of names"),
        ({"width": "8", "classes": "[1, 2, 3]"}, "expected a list of names"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path, header, message):
    path = tmp_path / "unet.safetensors"
    path.write_bytes(encode_safetensors(_net().state_dict(), header))
    with pytest.raises(IntegrityError, match=message):
        load_unet(path)


@pytest.mark.parametrize("damage", ["cut", "text", "nan", "missing"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path, data = tmp_path / "unet.safetensors", encode_unet(_net(), NAMES)
    if damage == "cut":
        data = data[:-100]
    elif damage == "text":
        data = b"no tensors"
    else:
        state = _net().state_dict()
        if damage == "nan":
            state["head.bias"][1] = float("nan")
        else:
            del state["head.bias"]
        data = encode_safetensors(state, {"width": "8", "classes": json.dumps(NAMES)})
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"unet\.safetensors: "):
        load_unet(path)
