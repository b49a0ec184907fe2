"""Checkpoints: official layouts, loraseg's file, CLIP from open_clip."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

from loraseg.compat import prepare_torchvision
from loraseg.errors import ConfigError, IntegrityError
from loraseg.segment.open_vocabulary.catseg.checkpoint import (
    load_catseg,
    read_metadata,
    save_catseg,
)
from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.from_clip import catseg_from_clip
from loraseg.segment.open_vocabulary.catseg.layout import official_state_dict
from loraseg.segment.open_vocabulary.catseg.model import CATSeg
from loraseg.segment.open_vocabulary.catseg.official import load_official_checkpoint
from tests.unit.segment.open_vocabulary.catseg.official_layout import (
    BASE,
    LARGE,
    Sizes,
    layout,
    random_state,
)

SMALL = {"vision_heads": 2, "text_heads": 2, "heads": 2}
P = "sem_seg_head.predictor."


def on_meta(keys):
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


@pytest.mark.parametrize(
    ("sizes", "keys", "millions", "image_size", "heads", "guided"),
    [(BASE, 484, 154.5, 384, 12, (3, 7)), (LARGE, 652, 433.9, 336, 16, (7, 15))],
)
def test_official_layouts_of_full_size_load(sizes, keys, millions, image_size, heads, guided):
    shapes = layout(sizes)
    values = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert (len(shapes), round(values / 1e6, 1)) == (keys, millions)
    model = load_official_checkpoint({"model": on_meta(shapes)})
    config = model.config
    assert (config.image_size, config.grid, config.window) == (image_size, 24, 12)
    assert (config.vision_heads, config.tapped_blocks) == (heads, guided)
    assert (config.heads, config.layers, config.pad_len) == (4, 2, 256)
    back = {key: tuple(value.shape) for key, value in official_state_dict(model).items()}
    assert back == shapes


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(window=4),
        Sizes(prompts=3, hidden=12, layers_aggregator=1, layers=5, positions=4),
        Sizes(grid=9, window=3, positions=9, patch=2),
    ],
)
def test_round_trip_at_any_size(sizes):
    state = random_state(sizes)
    model = load_official_checkpoint(
        {f"module.{key}": value for key, value in state.items()},
        image_size=sizes.grid * sizes.patch,
        **SMALL,
    )
    assert model.config.prompts == sizes.prompts
    back = official_state_dict(model)
    assert back.keys() == state.keys()
    for key, value in state.items():
        if key.endswith("attn_mask"):
            assert set(back[key].unique().tolist()) == {0.0, -100.0}
        else:
            assert torch.equal(back[key], value), key


def test_the_mask_is_recomputed_and_can_be_absent():
    state = random_state(Sizes())
    assert load_official_checkpoint(state, **SMALL).config.window == 2
    bare = {key: value for key, value in state.items() if not key.endswith("attn_mask")}
    model = load_official_checkpoint(bare, image_size=16, window=2, **SMALL)
    assert official_state_dict(model).keys() == state.keys()


def test_aliases_of_the_semla_fork_are_ignored():
    state = random_state(Sizes())
    aliases = {
        key.replace("_proj_weight", "_proj.weight"): torch.zeros(1)
        for key in state
        if key.endswith("_proj_weight")
    }
    model = load_official_checkpoint({**state, **aliases}, **SMALL)
    assert len(aliases) == 18
    q = f"{P}clip_model.transformer.resblocks.0.attn.q_proj"
    assert torch.equal(model.get_parameter(f"{q}.weight"), state[f"{q}_weight"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files(tmp_path, suffix):
    state = random_state(Sizes())
    path = tmp_path / f"model{suffix}"
    if suffix == ".pth":
        torch.save({"model": state, "iteration": 79999}, path)
    else:
        safetensors.torch.save_file(state, path)
    model = load_official_checkpoint(path, **SMALL)
    assert torch.equal(model.upsample1.weight, state["upsample1.weight"])


def changed(**changes):
    state = random_state(Sizes())
    for key, value in changes.pop("add", {}).items():
        state[key] = value
    for key in changes.pop("drop", ()):
        del state[key]
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(drop=["upsample1.bias"]), r"1 missing: upsample1\.bias"),
        (changed(drop=["upsample2.weight"]), r"missing: upsample2\.weight"),
        (changed(add={"extra.weight": torch.zeros(1)}), r"1 unknown: extra\.weight"),
        (
            changed(add={f"{P}transformer.head.weight": torch.zeros(1, 9, 3, 3)}),
            r"head\.weight got \(1, 9, 3, 3\) expected \(1, 5, 3, 3\)",
        ),
        (
            changed(add={f"{P}clip_model.text_projection": torch.zeros(3)}),
            r"text_projection got \(3,\)",
        ),
        (
            changed(drop=[f"{P}clip_model.visual.transformer.resblocks.1.attn.in_proj_bias"]),
            r"resblocks\.1\.attn\.in_proj_bias",
        ),
        (changed(add={"epoch": 3}), r"'epoch' is a int"),
        ({}, "expected a state dict"),
    ],
)
def test_errors_name_the_keys_that_do_not_fit(state, message):
    with pytest.raises(IntegrityError, match=message):
        load_official_checkpoint(state, **SMALL)


def test_heads_must_be_given_if_their_width_is_not_64():
    with pytest.raises(ConfigError, match="set vision_heads"):
        load_official_checkpoint(random_state(Sizes()))
    with pytest.raises(ConfigError, match="unknown key 'vision_head'"):
        load_official_checkpoint(random_state(Sizes()), vision_head=2, **SMALL)


@pytest.mark.parametrize("content", [b"", b"not a pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_unreadable_files(tmp_path, content, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="cannot be read as a checkpoint"):
        load_official_checkpoint(path)


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_pickled_code_does_not_run(tmp_path, capsys):
    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_official_checkpoint(tmp_path / "evil.pth")
    assert capsys.readouterr().out == ""


def test_file_round_trip(tmp_path):
    model = load_official_checkpoint(random_state(Sizes()), **SMALL).float()
    path = tmp_path / "model.safetensors"
    save_catseg(model, path, {"vocabulary": "[]"})
    loaded = load_catseg(path)
    assert loaded.config == model.config
    assert read_metadata(path)["vocabulary"] == "[]"
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    images, text = torch.randn(1, 3, 16, 16), torch.randn(2, 1, 10)
    assert torch.equal(loaded(images, text), model(images, text))
    assert load_catseg(path, clip_attention_lora="inert").config.clip_attention_lora == "inert"


def test_files_in_half_precision_are_read_as_float32(tmp_path):
    model = load_official_checkpoint(random_state(Sizes()), **SMALL)
    save_catseg(model, tmp_path / "model.safetensors", dtype=torch.float16)
    loaded = load_catseg(tmp_path / "model.safetensors")
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(
        loaded.upsample1.weight, model.upsample1.weight.float(), rtol=1e-3, atol=1e-6
    )


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(IntegrityError, match="header format is None"):
        load_catseg(path)
    header = {"format": "loraseg-catseg-1", "config": json.dumps({"heads": 8})}
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, metadata=header)
    with pytest.raises(IntegrityError, match=r"missing.*1 unknown: a"):
        load_catseg(path)


def test_clip_of_open_clip():
    prepare_torchvision()
    from open_clip.model import CLIP

    vision = {"image_size": 8, "patch_size": 2, "width": 8, "layers": 3, "head_width": 4}
    text = {"context_length": 7, "vocab_size": 20, "width": 6, "heads": 2, "layers": 2}
    clip = CLIP(10, vision, text, quick_gelu=True).eval()
    config = CATSegConfig(
        image_size=12,
        patch=2,
        position_grid=4,
        vision_width=8,
        vision_layers=3,
        vision_heads=2,
        embed_dim=10,
        text_width=6,
        text_layers=2,
        text_heads=2,
        context_length=7,
        vocab_size=20,
        hidden=8,
        window=3,
        decoder_dims=(8, 4),
        decoder_guidance_dims=(3, 2),
    )
    model = catseg_from_clip(clip, config)
    ids = torch.tensor([[1, 2, 3, 19, 0, 0, 0], [4, 19, 5, 5, 5, 5, 5]])
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_text(ids), clip.encode_text(ids, normalize=True), rtol=0, atol=1e-6
        )
    wider = dataclasses.replace(config, embed_dim=11)
    with pytest.raises(IntegrityError, match=r"visual\.proj got \(8, 10\) expected \(8, 11\)"):
        catseg_from_clip(clip, wider)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 100}, "multiple of patch"),
        ({"window": 5}, "divisor of the grid 24"),
        ({"hidden": 0}, "at least 1"),
        ({"guidance_blocks": (3, 12)}, "below vision_layers = 12"),
        ({"pooling": (25, 1)}, "at most the grid 24"),
        ({"decoder_guidance_dims": (128, 16)}, "less than"),
        ({"decoder_dims": (64, 50)}, "multiples of width"),
        ({"vision_heads": 7}, "multiple of vision_heads"),
    ],
)
def test_config_values_out_of_range_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        CATSegConfig(**change)


def test_forward_refuses_wrong_sizes():
    model = load_official_checkpoint(random_state(Sizes()), **SMALL).float()
    images, text = torch.zeros(1, 3, 16, 16), torch.zeros(2, 1, 10)
    with pytest.raises(ConfigError, match=r"expected \(b, 3, 16, 16\)"):
        model(torch.zeros(1, 3, 8, 8), text)
    with pytest.raises(ConfigError, match="1 prompts, width 10"):
        model(images, torch.zeros(2, 3, 10))
    with pytest.raises(ConfigError, match="at least one class"):
        model(images, text[:0])
    with pytest.raises(ConfigError, match="at least one row"):
        model.encode_text(torch.zeros(0, 4, dtype=torch.long))


def test_model_builds_from_defaults_on_meta():
    with torch.device("meta"):
        model = CATSeg(CATSegConfig())
    assert {k: tuple(v.shape) for k, v in official_state_dict(model).items()} == layout(BASE)
