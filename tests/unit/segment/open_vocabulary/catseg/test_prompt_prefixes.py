"""Text encoding with shared prefixes against one complete prompt at a time."""

import peft
import pytest
import torch
from torch import nn

from loraseg.adapters.targets.catseg import target_modules
from loraseg.errors import ConfigError
from loraseg.segment.open_vocabulary.catseg.model import CATSeg
from loraseg.segment.open_vocabulary.catseg.prompt_prefixes import PrefixTable
from tests.tiny_sizes import tiny_config

BATCHES = {
    "one_template": [[18, 3, 4, 5, 9, 19, 0], [18, 3, 4, 7, 8, 9, 19], [18, 3, 4, 6, 9, 19, 0]],
    "two_templates": [[18, 3, 4, 19, 0], [18, 3, 5, 19, 0], [18, 6, 4, 7, 19], [18, 6, 5, 7, 19]],
    "nothing_shared": [[1, 3, 19], [2, 3, 19]],
    "same_middle_after_other_starts": [[1, 5, 5, 19], [2, 5, 5, 19]],
    "one_row": [[18, 3, 4, 19, 7, 7]],
    "equal_rows": [[18, 3, 19, 1], [18, 3, 19, 2]],
    "one_begins_the_other": [[3, 4, 3, 2], [3, 4, 5, 2]],
    "end_comes_first": [[19, 3, 4], [18, 19, 4]],
}


def make(**changes):
    torch.manual_seed(0)
    return CATSeg(tiny_config(20, text_layers=3, **changes)).double()


def one_by_one(model, ids):
    """Encode each row alone and untrimmed, with attention written out."""
    clip = model.clip
    rows = []
    for row in torch.tensor(ids):
        x = clip.token_embedding(row) + clip.positional_embedding[: len(row)]
        for block in clip.transformer.resblocks:
            y = block.ln_1(x)
            heads = [
                getattr(block.attn, f"{part}_proj")(y).chunk(block.attn.heads, -1) for part in "qkv"
            ]
            mixed = []
            for q, k, v in zip(*heads, strict=True):
                scores = q @ k.T / q.shape[-1] ** 0.5
                later = torch.ones_like(scores, dtype=torch.bool).triu(1)
                mixed.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v)
            x = x + block.attn.out_proj(torch.cat(mixed, -1))
            x = x + block.mlp(block.ln_2(x))
        end = x[row.argmax()]
        rows.append(nn.functional.normalize(clip.ln_final(end) @ clip.text_projection, dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("name", BATCHES)
def test_features_and_gradients_equal_those_of_single_prompts(name):
    model = make()
    ids = BATCHES[name]
    expected = one_by_one(model, ids)
    got = model.encode_text(torch.tensor(ids))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    trained = [
        p for n, p in model.clip.named_parameters() if "visual" not in n and "scale" not in n
    ]
    seed = torch.randn_like(expected)
    expected_prefixes = torch.autograd.grad(expected, trained, seed)
    for ours, theirs in zip(
        torch.autograd.grad(got, trained, seed), expected_prefixes, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", BATCHES)
def test_each_distinct_prefix_occurs_once(name):
    ids = BATCHES[name]
    table = PrefixTable.from_token_ids(torch.tensor(ids))
    ends = [row.index(max(row)) for row in ids]
    expected_prefixes = {
        tuple(row[: i + 1]) for row, end in zip(ids, ends, strict=True) for i in range(end + 1)
    }
    flat = [(r, p) for r in range(len(ids)) for p in range(table.prefix_ids.shape[1])]
    prefixes = [tuple(ids[r][: p + 1]) for r, p in (flat[index] for index in table.flat_indices)]
    assert len(prefixes) == len(expected_prefixes)
    assert set(prefixes) == expected_prefixes
    assert table.tokens.tolist() == [prefix[-1] for prefix in prefixes]
    assert table.positions.tolist() == [len(prefix) - 1 for prefix in prefixes]
    assert table.end_positions.tolist() == ends
    for row, end in enumerate(ends):
        assert [prefixes[i] for i in table.prefix_ids[row, : end + 1]] == [
            tuple(ids[row][: i + 1]) for i in range(end + 1)
        ]
        assert prefixes[table.full_prompts[row]] == tuple(ids[row][: end + 1])


@pytest.mark.parametrize("mode", ["active", "inert"])
def test_peft_layers_on_shared_prefixes_equal_those_on_single_prompts(mode):
    model = make(clip_attention_lora=mode)
    ids = torch.tensor(BATCHES["two_templates"])
    with torch.no_grad():
        plain = model.encode_text(ids)
    names = [n for n in target_modules(model) if ".clip_model.transformer." in n]
    config = peft.LoraConfig(r=3, target_modules=names, init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    model.double()
    if mode == "inert":  # the reference below calls the modules
        for block in model.clip.transformer.resblocks:
            for part in "qkv":
                getattr(block.attn, f"{part}_proj").enable_adapters(False)
    expected = one_by_one(model, ids.tolist())
    got = model.encode_text(ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert (got - plain).abs().max() > 1e-3
    trained = [p for n, p in model.named_parameters() if "lora_" in n and p.requires_grad]
    assert len(trained) == 2 * 3 * (5 if mode == "active" else 2)
    seed = torch.randn_like(expected)
    expected_prefixes = torch.autograd.grad(expected, trained, seed)
    for ours, theirs in zip(
        torch.autograd.grad(got, trained, seed), expected_prefixes, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_groups_are_the_leading_axis_of_every_layer_call():
    model = make()
    ids = torch.tensor(BATCHES["one_template"])
    names = [n for n in target_modules(model) if ".clip_model.transformer." in n]
    layers = [model.get_submodule(name) for name in names]
    assert len(layers) == 3 * 5
    banks = [torch.randn(2, *layer.weight.shape).double() / 8 for layer in layers]
    expected = []
    originals = [layer.weight.data.clone() for layer in layers]
    for group in range(2):
        for layer, original, bank in zip(layers, originals, banks, strict=True):
            layer.weight.data = original + bank[group]
        expected.append(one_by_one(model, ids.tolist()))
    for layer, original, bank in zip(layers, originals, banks, strict=True):
        layer.weight.data = original

        def grouped_forward(x, layer=layer, bank=bank):
            assert len(x) == 2
            return nn.functional.linear(x, layer.weight, layer.bias) + x @ bank.transpose(1, 2)

        layer.forward = grouped_forward
    got = model.encode_text(ids, groups=2)
    assert got.shape == (2, 3, 12)
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-12)
    assert (got[0] - got[1]).abs().max() > 1e-2


def test_layers_get_each_prefix_once_and_the_last_mlp_only_end_tokens():
    model = make()
    seen = []
    for block in model.clip.transformer.resblocks:
        block.mlp.c_fc.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    model.encode_text(torch.tensor(BATCHES["one_template"]))
    assert seen == [3 + 3 + 4 + 3, 3 + 3 + 4 + 3, 3]


def test_zero_groups_are_refused():
    with pytest.raises(ConfigError, match="groups: got 0"):
        make().encode_text(torch.tensor([[1, 19]]), groups=0)
