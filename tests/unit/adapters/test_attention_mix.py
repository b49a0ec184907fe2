"""The file of the attention mix: exact, deterministic, and hostile files are refused."""

import json

import pytest
import safetensors.torch
import torch

from loraseg.adapters import files_digest, load_adapter, to_peft_files
from loraseg.adapters.adapter import LoraPair
from loraseg.adapters.attention_mix import (
    MAX_ATTENTION_MIX_BYTES,
    decode_attention_mix,
    encode_attention_mix,
)
from loraseg.adapters.peft_io import ATTENTION_MIX_FILE
from loraseg.errors import AdapterMismatchError, IntegrityError

TENSORS = {
    "up_blocks.1.attn2.alpha.weight": torch.arange(3.0)[None],
    "up_blocks.1.attn2.alpha.bias": torch.tensor([-2.0]),
}


def test_round_trip_is_exact_and_independent_of_order():
    data = encode_attention_mix(TENSORS, "pooled")
    assert data == encode_attention_mix(dict(reversed(TENSORS.items())), "pooled")
    state = decode_attention_mix(data)
    assert state.mode == "pooled"
    assert {name: value.tolist() for name, value in state.tensors.items()} == {
        name: value.tolist() for name, value in TENSORS.items()
    }


def write(tensors, metadata):
    return safetensors.torch.save(tensors, metadata)


WEIGHT, BIAS = TENSORS


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "header of 0 bytes in a file"),
        (encode_attention_mix(TENSORS, "token")[:-1], "fusion.safetensors: "),
        (write(TENSORS, None), "mode 'None'"),
        (encode_attention_mix(TENSORS, "token") + b"x" * MAX_ATTENTION_MIX_BYTES, "bytes, at most"),
        (write(TENSORS, {"mode": "other"}), "mode 'other'"),
        (write({}, {"mode": "token"}), "0 tensors"),
        (write({WEIGHT: TENSORS[WEIGHT]}, {"mode": "token"}), "alpha.bias is missing"),
        (
            write({**TENSORS, "lora.weight": torch.ones(1, 1)}, {"mode": "token"}),
            "unexpected tensor",
        ),
        (write({**TENSORS, BIAS: torch.ones(2)}, {"mode": "token"}), r"\(2,\) of"),
        (write({**TENSORS, BIAS: torch.ones(1, dtype=int)}, {"mode": "token"}), "type I64"),
        (
            write({**TENSORS, BIAS: torch.ones(1, dtype=torch.float8_e4m3fn)}, {"mode": "token"}),
            "type F8_E4M3",
        ),
        (write({**TENSORS, BIAS: torch.tensor([torch.nan])}, {"mode": "token"}), "NaN"),
        (len(json.dumps({})).to_bytes(8, "little") + b"{}", "mode 'None'"),
    ],
)
def test_hostile_files_are_refused(data, reason):
    with pytest.raises(IntegrityError, match=reason):
        decode_attention_mix(data)


def test_invalid_tensors_are_not_encoded():
    with pytest.raises(AdapterMismatchError, match="unexpected tensor"):
        encode_attention_mix({"weight": torch.ones(1, 2)}, "token")


def test_the_digest_of_an_adapter_covers_it():
    pairs = {"up_blocks.1.attn2.to_q": LoraPair(torch.ones(1, 3), torch.ones(3, 1), 1.0)}
    plain = to_peft_files(pairs)
    fused = {**plain, ATTENTION_MIX_FILE: encode_attention_mix(TENSORS, "token")}
    other = {**plain, ATTENTION_MIX_FILE: encode_attention_mix(TENSORS, "pooled")}
    assert len({files_digest(files) for files in (plain, fused, other)}) == 3
    assert load_adapter(fused).digest == files_digest(fused)


def test_a_folder_has_the_digest_of_its_files(tmp_path):
    pairs = {"up_blocks.1.attn2.to_q": LoraPair(torch.ones(1, 3), torch.ones(3, 1), 1.0)}
    files = {**to_peft_files(pairs), ATTENTION_MIX_FILE: encode_attention_mix(TENSORS, "token")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert load_adapter(tmp_path).digest == files_digest(files)
