import hashlib
import json
import struct

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from loraseg.adapters.adapter import Adapter, LoraPair
from loraseg.adapters.peft_io import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    extract_pairs,
    files_digest,
    load_adapter,
    save_adapter,
    to_peft_files,
)
from loraseg.errors import AdapterMismatchError, IntegrityError


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def random_pair(rank, d_in, d_out, scale, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return LoraPair(
        torch.randn(rank, d_in, generator=generator),
        torch.randn(d_out, rank, generator=generator),
        scale,
    )


@pytest.fixture
def pairs():
    return {
        "blocks.0": random_pair(2, 6, 6, 2.0),
        "blocks.1": random_pair(3, 6, 6, 16 / 3),
        "head.0": random_pair(2, 6, 4, 1.5),
        "head.2": random_pair(2, 4, 3, 2.0),
    }


@pytest.fixture
def files(pairs):
    return to_peft_files(pairs, base_name="toy", base_digest="ab" * 32)


def edited(files, **values):
    config = json.loads(files[CONFIG_FILE])
    config.update(values)
    return {**files, CONFIG_FILE: json.dumps(config).encode()}


def with_tensors(files, tensors):
    return {**files, WEIGHTS_FILE: safetensors.torch.save(tensors)}


def test_stock_peft_loads_a_saved_adapter_and_gives_the_same_output(tmp_path, pairs):
    save_adapter(tmp_path / "a", Adapter(name="a", pairs=pairs, digest="d", base_name="toy"))
    dense = Toy().double()
    with torch.no_grad():
        for module, pair in pairs.items():
            dense.get_submodule(module).weight += pair.scale * (
                pair.up.double() @ pair.down.double()
            )
    wrapped = peft.PeftModel.from_pretrained(Toy(), tmp_path / "a")
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(wrapped(x).double(), dense(x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_reads_adapters_saved_by_stock_peft(tmp_path, rslora):
    config = peft.LoraConfig(
        r=2,
        lora_alpha=16,
        target_modules=["blocks.0", "blocks.1", "head.2"],
        rank_pattern={"blocks.1": 4, "2": 3},
        alpha_pattern={"blocks.0": 7},
        init_lora_weights=False,
        use_rslora=rslora,
    )
    wrapped = peft.get_peft_model(Toy(), config)
    wrapped.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.use_rslora == rslora
    assert {name: pair.rank for name, pair in adapter.pairs.items()} == {
        "blocks.0": 2,
        "blocks.1": 4,
        "head.2": 3,
    }
    for name, pair in adapter.pairs.items():
        theirs = wrapped.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(pair.delta(), theirs, rtol=1e-6, atol=1e-6)
    copied = extract_pairs(wrapped)
    assert set(copied) == set(adapter.pairs)
    torch.testing.assert_close(copied["head.2"].up, adapter.pairs["head.2"].up, rtol=0, atol=0)


def test_round_trip_keeps_every_bit(tmp_path, pairs, files):
    adapter = load_adapter(files, name="n")
    assert (adapter.base_name, adapter.base_digest) == ("toy", "ab" * 32)
    assert list(adapter.pairs) == sorted(pairs)
    for name, pair in pairs.items():
        assert torch.equal(adapter.pairs[name].down, pair.down)
        assert torch.equal(adapter.pairs[name].up, pair.up)
        assert adapter.pairs[name].scale == pytest.approx(pair.scale, rel=1e-15)
    save_adapter(tmp_path, adapter)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    assert load_adapter(tmp_path).digest == adapter.digest


def test_digest_rule(files):
    inner = ",".join(f'"{n}":"{hashlib.sha256(files[n]).hexdigest()}"' for n in sorted(files))
    expected = hashlib.sha256(("{" + inner + "}").encode()).hexdigest()
    assert files_digest({**files, "card.json": b"{}"}) == expected
    assert load_adapter(files).digest == expected


def test_half_precision_becomes_float32(files):
    tensors = safetensors.torch.load(files[WEIGHTS_FILE])
    half = with_tensors(files, {key: value.half() for key, value in tensors.items()})
    assert load_adapter(half).pairs["head.2"].down.dtype == torch.float32


def test_base_digests_must_agree(files):
    assert load_adapter(files, base_digest="ab" * 32).base_digest == "ab" * 32
    with pytest.raises(IntegrityError, match=r"trained on base abab.*expected cdcd"):
        load_adapter(files, base_digest="cd" * 32)
    assert load_adapter(edited(files, revision="main")).base_digest is None


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.PT", "x.ckpt"])
def test_refuses_pickles_with_the_reason(tmp_path, files, name):
    (tmp_path / CONFIG_FILE).write_bytes(files[CONFIG_FILE])
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(IntegrityError, match=f"{name} is a pickle, which can run code"):
        load_adapter(tmp_path)


def test_refuses_missing_files(tmp_path, files):
    with pytest.raises(IntegrityError, match=r"adapter_config.json is missing"):
        load_adapter({WEIGHTS_FILE: files[WEIGHTS_FILE]})
    with pytest.raises(IntegrityError, match=r"adapter_model.safetensors is missing"):
        load_adapter({CONFIG_FILE: files[CONFIG_FILE]})
    with pytest.raises(IntegrityError, match="adapter folder does not exist"):
        load_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type: got 'IA3', expected 'LORA'"),
        ({"peft_type": None}, "peft_type: got None"),
        ({"r": 0}, "r: got 0"),
        ({"r": True}, "r: got True"),
        ({"r": "8"}, "r: got '8'"),
        ({"r": 10**9}, "r: got 1000000000"),
        ({"lora_alpha": None}, "lora_alpha: got None"),
        ({"lora_alpha": 1e300}, "lora_alpha: got"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern.*: got .* expected a plain module name"),
        ({"rank_pattern": [1]}, "rank_pattern: got"),
        ({"alpha_pattern": {"head.2": "x"}}, r"alpha_pattern.head.2: got 'x'"),
        ({"use_dora": 1}, "use_dora: got 1"),
        ({"modules_to_save": "head"}, "modules_to_save: got 'head'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "belongs to a changed base"),
        ({"r": 5}, r"expected down \(5, d_in\)"),
    ],
)
def test_refuses_a_config_with_the_reason(files, values, reason):
    with pytest.raises(IntegrityError, match=reason):
        load_adapter(edited(files, **values))


@pytest.mark.parametrize(
    "config",
    [b"", b"[]", b"[" * 100_000, b'{"r": NaN}', b"\xff\xfe", b'{"r": ' + b"9" * 9999 + b"}"],
)
def test_refuses_a_config_that_is_not_a_json_object(files, config):
    with pytest.raises(
        IntegrityError, match=r"adapter_config.json: (not valid JSON|got list, expected a JSON)"
    ):
        load_adapter({**files, CONFIG_FILE: config})


def test_refuses_a_huge_config(tmp_path, files):
    big = files[CONFIG_FILE] + b" " * 2**20
    with pytest.raises(IntegrityError, match="expected at most 1048576"):
        load_adapter({**files, CONFIG_FILE: big})
    (tmp_path / CONFIG_FILE).write_bytes(big)
    with pytest.raises(IntegrityError, match="larger than 1048576"):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (b"", "header of 0 bytes"),
        (b"\x00" * 8, "header of 0 bytes"),
        (struct.pack("<Q", 2**60) + b"{}", "header of 1152921504606846976 bytes"),
        (struct.pack("<Q", 2) + b"[]", "expected a JSON object"),
        (struct.pack("<Q", 9) + b'{"a":1,,}', "header: not valid JSON"),
        (struct.pack("<Q", 2) + b"{}", "no LoRA pair"),
        (struct.pack("<Q", 15) + b'{"a":{},"a":{}}', "key 'a' appears twice"),
    ],
)
def test_refuses_a_malformed_weight_file(files, weights, reason):
    with pytest.raises(IntegrityError, match=reason):
        load_adapter({**files, WEIGHTS_FILE: weights})


def test_refuses_a_truncated_weight_file(files):
    with pytest.raises(IntegrityError, match="adapter_model"):
        load_adapter({**files, WEIGHTS_FILE: files[WEIGHTS_FILE][:-4]})


def test_refuses_tensors_with_the_reason(files):
    tensors = safetensors.torch.load(files[WEIGHTS_FILE])
    key = "base_model.model.head.2.lora_B.weight"
    for change, reason in [
        ({key: torch.full((3, 2), float("nan"))}, "NaN or infinite"),
        ({key: torch.full((3, 2), float("inf"))}, "NaN or infinite"),
        ({key: torch.ones(3, 2, dtype=torch.int64)}, "has dtype I64"),
        ({key: torch.ones(3, 7)}, r"module 'head.2': down \(2, 4\), up \(3, 7\)"),
        ({key: torch.ones(3, 2, 1)}, "module 'head.2'"),
        ({"evil": torch.ones(1)}, "unexpected tensor 'evil'"),
        ({"base_model.model.head.2.lora_magnitude_vector": torch.ones(3)}, "unexpected tensor"),
    ]:
        with pytest.raises(IntegrityError, match=reason):
            load_adapter(with_tensors(files, {**tensors, **change}))
    rest = {name: tensor for name, tensor in tensors.items() if name != key}
    with pytest.raises(IntegrityError, match=r"head.2.lora_B.weight is missing"):
        load_adapter(with_tensors(files, rest))


def test_dora_is_read_with_its_flag_but_not_saved(tmp_path, files):
    tensors = safetensors.torch.load(files[WEIGHTS_FILE])
    tensors["base_model.model.head.2.lora_magnitude_vector"] = torch.ones(3)
    adapter = load_adapter(edited(with_tensors(files, tensors), use_dora=True))
    assert adapter.use_dora
    with pytest.raises(AdapterMismatchError, match="cannot be saved, it has DoRA"):
        save_adapter(tmp_path, adapter)
