"""The fusion layers' file: exact, deterministic, and hostile files are refused."""

import json

import pytest
import safetensors.torch
import torch

from loraseg.adapters import adapter_files, files_digest, load_adapter
from loraseg.adapters.adapter import LoraPair
from loraseg.adapters.fusion_file import FUSION_FILE, MAX_FUSION_BYTES, fusion_file, read_fusion
from loraseg.errors import AdapterMismatchError, IntegrityError

STATE = {
    "up_blocks.1.attn2.alpha.weight": torch.arange(3.0)[None],
    "up_blocks.1.attn2.alpha.bias": torch.tensor([-2.0]),
}


def test_comes_back_as_it_was_and_order_does_not_matter():
    data = fusion_file(STATE, "pooled")
    assert data == fusion_file(dict(reversed(STATE.items())), "pooled")
    state = read_fusion(data)
    assert state.mode == "pooled"
    assert {name: value.tolist() for name, value in state.tensors.items()} == {
        name: value.tolist() for name, value in STATE.items()
    }


def write(tensors, metadata):
    return safetensors.torch.save(tensors, metadata)


WEIGHT, BIAS = STATE


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "header of 0 bytes claimed"),
        (fusion_file(STATE, "token")[:-1], "fusion.safetensors: "),
        (write(STATE, None), "mode 'None'"),
        (fusion_file(STATE, "token") + b"x" * MAX_FUSION_BYTES, "bytes, at most"),
        (write(STATE, {"mode": "other"}), "mode 'other'"),
        (write({}, {"mode": "token"}), "0 tensors"),
        (write({WEIGHT: STATE[WEIGHT]}, {"mode": "token"}), "alpha.bias is missing"),
        (write({**STATE, "lora.weight": torch.ones(1, 1)}, {"mode": "token"}), "unexpected tensor"),
        (write({**STATE, BIAS: torch.ones(2)}, {"mode": "token"}), r"\(2,\) of"),
        (write({**STATE, BIAS: torch.ones(1, dtype=int)}, {"mode": "token"}), "type I64"),
        (
            write({**STATE, BIAS: torch.ones(1, dtype=torch.float8_e4m3fn)}, {"mode": "token"}),
            "type F8_E4M3",
        ),
        (write({**STATE, BIAS: torch.tensor([torch.nan])}, {"mode": "token"}), "NaN"),
        (len(json.dumps({})).to_bytes(8, "little") + b"{}", "mode 'None'"),
    ],
)
def test_hostile_files_are_refused(data, reason):
    with pytest.raises(IntegrityError, match=reason):
        read_fusion(data)


def test_what_cannot_be_read_is_not_written():
    with pytest.raises(AdapterMismatchError, match="unexpected tensor"):
        fusion_file({"weight": torch.ones(1, 2)}, "token")


def test_an_adapters_digest_covers_it():
    pairs = {"up_blocks.1.attn2.to_q": LoraPair(torch.ones(1, 3), torch.ones(3, 1), 1.0)}
    plain = adapter_files(pairs)
    fused = {**plain, FUSION_FILE: fusion_file(STATE, "token")}
    other = {**plain, FUSION_FILE: fusion_file(STATE, "pooled")}
    assert len({files_digest(files) for files in (plain, fused, other)}) == 3
    assert load_adapter(fused).digest == files_digest(fused)


def test_a_folder_has_the_digest_of_its_files(tmp_path):
    pairs = {"up_blocks.1.attn2.to_q": LoraPair(torch.ones(1, 3), torch.ones(3, 1), 1.0)}
    files = {**adapter_files(pairs), FUSION_FILE: fusion_file(STATE, "token")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert load_adapter(tmp_path).digest == files_digest(files)
