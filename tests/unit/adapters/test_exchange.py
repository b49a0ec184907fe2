"""Files in the formats of other programs, loaded and written by stock diffusers."""

import copy
import json

import peft
import pytest
import safetensors.torch
import torch

from loraseg.adapters.adapter import LoraPair
from loraseg.adapters.exchange import (
    DIFFUSERS_FILE,
    KOHYA_FILE,
    read_diffusers,
    read_kohya,
    to_diffusers_files,
    to_kohya_file,
)
from loraseg.adapters.targets.unet import attention_projections, select_projections
from loraseg.errors import AdapterMismatchError, IntegrityError
from tests.unit.tiny_diffusion import full_unet, tiny_sd, tiny_sdxl

FORMS = {
    DIFFUSERS_FILE: (lambda pairs: to_diffusers_files(pairs)[DIFFUSERS_FILE], read_diffusers),
    KOHYA_FILE: (to_kohya_file, read_kohya),
}
MODULE = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"


def random_pair(rank, d_in, d_out, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    return LoraPair(
        0.5 * torch.randn(rank, d_in, generator=generator),
        0.5 * torch.randn(d_out, rank, generator=generator),
        scale,
    )


def pairs_for(unet, rule="all"):
    """Return pairs of different ranks, with scales other than 1."""
    modules = dict(unet.named_modules())
    pairs = {}
    for index, name in enumerate(select_projections(unet, rule)):
        layer = modules[name]
        rank, scale = 1 + index % 3, (0.5, 1.0, 0.3)[index % 3]
        pairs[name] = random_pair(rank, layer.in_features, layer.out_features, scale, index)
    return pairs


def dense(unet, pairs):
    """Return a float64 copy of the UNet with every update added to its weight."""
    changed = copy.deepcopy(unet).double()
    for name, pair in pairs.items():
        weight = changed.get_submodule(name).weight
        weight.data += pair.scale * (pair.up.double() @ pair.down.double())
    return changed


@torch.no_grad()
def run(unet):
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    latents = torch.randn(2, 4, 16, 16, **draw).to(unet.dtype)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, **draw).to(unet.dtype)
    added = None
    if unet.config.addition_embed_type:
        pooled, ids = torch.randn(2, 12, **draw), torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
        added = {"text_embeds": pooled.to(unet.dtype), "time_ids": ids.to(unet.dtype)}
    return unet(latents, 500, text, added_cond_kwargs=added).sample.double()


@pytest.mark.parametrize("pipeline_of", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("form", FORMS)
def test_stock_diffusers_loads_the_pairs(pipeline_of, form, tmp_path):
    write, _ = FORMS[form]
    pipeline = pipeline_of()
    pairs = pairs_for(pipeline.unet)
    expected, before = run(dense(pipeline.unet, pairs)), run(dense(pipeline.unet, {}))
    (tmp_path / form).write_bytes(write(pairs))
    pipeline.load_lora_weights(str(tmp_path), weight_name=form, adapter_name="own")
    # In float64, so that only the rounding of scale * B to float32 differs.
    actual = run(pipeline.unet.double())
    assert (actual - expected).abs().max() < 1e-6 * (expected - before).abs().max()
    assert (expected - before).abs().max() > 0.1 * expected.abs().max()
    assert pipeline.get_list_adapters() == {"unet": ["own"]}
    loaded = [m for m in pipeline.unet.modules() if hasattr(m, "lora_A") and "own" in m.lora_A]
    assert len(loaded) == len(pairs)
    assert {layer.scaling["own"] for layer in loaded} == {1.0}


@pytest.mark.parametrize("form", FORMS)
def test_a_subset_of_layers_changes_only_these(form, tmp_path):
    pipeline = tiny_sd()
    pairs = pairs_for(pipeline.unet, "cross")
    (tmp_path / form).write_bytes(FORMS[form][0](pairs))
    pipeline.load_lora_weights(str(tmp_path), weight_name=form)
    named = {name for name, module in pipeline.unet.named_modules() if hasattr(module, "lora_A")}
    assert named == set(pairs)


@pytest.mark.parametrize("form", FORMS)
def test_round_trip_keeps_every_update(form):
    write, read = FORMS[form]
    pairs = pairs_for(tiny_sdxl().unet)
    again = read(write(pairs))
    assert set(again) == set(pairs)
    for name, pair in pairs.items():
        expected = pair.scale * (pair.up.double() @ pair.down.double())
        actual = again[name].scale * (again[name].up.double() @ again[name].down.double())
        assert (actual - expected).abs().max() < 1e-6
        assert (again[name].rank, again[name].scale) == (3, 1.0)
    assert write(dict(reversed(pairs.items()))) == write(pairs)
    assert write(again) == write(again)


def test_float64_and_half_pairs_are_written_as_float32():
    half = LoraPair(torch.ones(1, 4).bfloat16(), torch.ones(4, 1).bfloat16(), 1 / 3)
    wide = LoraPair(torch.ones(2, 4).double(), torch.ones(4, 2).double(), 1 / 3)
    for write, read in FORMS.values():
        again = read(write({MODULE: half, MODULE.replace("to_q", "to_v"): wide}))
        for pair in again.values():
            assert pair.up.dtype == torch.float32
            assert pair.up[0, 0] == torch.tensor(1 / 3)


@pytest.mark.parametrize("model", ["sd1.4", "sd2.1", "sdxl"])
def test_kohya_names_of_the_public_unets_are_invertible(model):
    unet = full_unet(model)
    names = [p.name for p in attention_projections(unet)]
    names += [
        name
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in set(names)
    ]
    pair = LoraPair(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)
    assert set(read_kohya(to_kohya_file(dict.fromkeys(names, pair)))) == set(names)


@pytest.mark.parametrize("with_metadata", [True, False])
def test_a_file_of_stock_diffusers(with_metadata, tmp_path):
    pipeline = tiny_sd()
    names = list(select_projections(pipeline.unet, "cross"))
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=names, alpha_pattern={names[0].replace(".", r"\."): 8}
    )
    pipeline.unet.add_adapter(config, "default")
    layers = {name: m for name, m in pipeline.unet.named_modules() if hasattr(m, "lora_A")}
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    stock = {"unet_lora_adapter_metadata": pipeline.unet.peft_config["default"].to_dict()}
    pipeline.save_lora_weights(
        str(tmp_path),
        unet_lora_layers=peft.get_peft_model_state_dict(pipeline.unet),
        **(stock if with_metadata else {}),
    )
    pairs = read_diffusers((tmp_path / DIFFUSERS_FILE).read_bytes())
    assert set(pairs) == set(names)
    for name, layer in layers.items():
        assert torch.equal(pairs[name].down, layer.lora_A["default"].weight)
        assert torch.equal(pairs[name].up, layer.lora_B["default"].weight)
        assert pairs[name].scale == (layer.scaling["default"] if with_metadata else 1.0)


def tensors_of(data):
    return safetensors.torch.load(data)


def kohya_tensors():
    return tensors_of(to_kohya_file({MODULE: random_pair(2, 4, 4, 1.0, 0)}))


def diffusers_tensors():
    return tensors_of(to_diffusers_files({MODULE: random_pair(2, 4, 4, 1.0, 0)})[DIFFUSERS_FILE])


def test_kohya_alpha_is_divided_by_the_rank():
    tensors = kohya_tensors()
    alpha = next(key for key in tensors if key.endswith("alpha"))
    tensors[alpha] = torch.tensor(1.0)
    assert read_kohya(safetensors.torch.save(tensors))[MODULE].scale == 0.5
    del tensors[alpha]
    assert read_kohya(safetensors.torch.save(tensors))[MODULE].scale == 1.0


MALFORMED = {
    "an unknown tensor": lambda tensors: {**tensors, "unet.alpha.weight": torch.zeros(1)},
    "a text encoder's": lambda tensors: {
        **tensors,
        "text_encoder.layers.0.mlp.lora_A.weight": torch.zeros(1, 1),
        "lora_te_layers_0_mlp.lora_down.weight": torch.zeros(1, 1),
    },
    "a path": lambda tensors: {**tensors, "unet.../../x.lora_A.weight": torch.zeros(1, 1)},
    "sgm names": lambda tensors: {
        **tensors,
        "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": torch.zeros(1, 1),
    },
    "NaN": lambda tensors: {key: value * float("nan") for key, value in tensors.items()},
    "infinite": lambda tensors: {key: value / 0 for key, value in tensors.items()},
    "whole numbers": lambda tensors: {key: value.long() for key, value in tensors.items()},
    "no A": lambda tensors: without(tensors, ("lora_A.weight", "lora_down.weight")),
    "no B": lambda tensors: without(tensors, ("lora_B.weight", "lora_up.weight")),
    "a convolution": lambda tensors: {
        key: value[..., None, None] for key, value in tensors.items()
    },
    "ranks differ": lambda tensors: {
        key: value[:1] if value.ndim else value for key, value in tensors.items()
    },
    "a number for a matrix": lambda tensors: {k: torch.tensor(1.0) for k in tensors},
    "nothing": lambda tensors: {},
}


def without(tensors, ends):
    return {key: value for key, value in tensors.items() if not key.endswith(ends)}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize(
    ("make", "read", "where"),
    [(diffusers_tensors, read_diffusers, DIFFUSERS_FILE), (kohya_tensors, read_kohya, KOHYA_FILE)],
    ids=["diffusers", "kohya"],
)
def test_malformed_tensors_are_refused(make, read, where, case):
    with pytest.raises(IntegrityError, match=where):
        read(safetensors.torch.save(MALFORMED[case](make())))


@pytest.mark.parametrize("read", [read_diffusers, read_kohya])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04pickle",
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"{a:}",
        (26).to_bytes(8, "little") + b'{"a": {}, "a": {}        }',
    ],
    ids=["empty", "pickle", "huge header", "list", "no JSON", "twice"],
)
def test_bad_headers_are_refused(read, data):
    with pytest.raises(IntegrityError, match="header"):
        read(data)


def test_truncated_files_are_refused():
    for write, read in FORMS.values():
        data = write({MODULE: random_pair(2, 4, 4, 1.0, 0)})
        with pytest.raises(IntegrityError):
            read(data[:-5])


@pytest.mark.parametrize(
    "name", ["mid_block_", "mid__block", "_mid_block", "mid_block_attn2__to_q"]
)
def test_ambiguous_kohya_names_are_refused(name):
    tensors = {key.replace(MODULE.replace(".", "_"), name): v for key, v in kohya_tensors().items()}
    with pytest.raises(IntegrityError, match=KOHYA_FILE):
        read_kohya(safetensors.torch.save(tensors))


@pytest.mark.parametrize(
    "metadata",
    [
        "no json",
        "[]",
        json.dumps({"unet.r": 3, "unet.lora_alpha": 3}),
        json.dumps({"unet.r": 2}),
        json.dumps({"unet.r": 2, "unet.lora_alpha": "x"}),
        json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.use_dora": True}),
        json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {".*": 9}}),
        json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.lora_bias": True}),
    ],
)
def test_malformed_metadata_are_refused(metadata):
    data = safetensors.torch.save(diffusers_tensors(), {"lora_adapter_metadata": metadata})
    with pytest.raises(IntegrityError, match=DIFFUSERS_FILE):
        read_diffusers(data)


def test_pairs_without_a_form_are_refused():
    pair = random_pair(2, 4, 4, 1.0, 0)
    for write, _ in FORMS.values():
        with pytest.raises(AdapterMismatchError, match="at least one LoRA pair"):
            write({})
    with pytest.raises(AdapterMismatchError, match=r"'sem_seg_head\.q' has no kohya form"):
        to_kohya_file({"sem_seg_head.q": pair})
