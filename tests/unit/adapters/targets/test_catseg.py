import pytest
from torch import nn

from loraseg.adapters.targets.catseg import target_modules
from loraseg.errors import AdapterMismatchError, ConfigError


def nested(names):
    """Return a module tree with a linear layer at every dotted name."""
    root = nn.Module()
    for name in names:
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(1, 1))
    return root


def test_targets_are_those_of_semla():
    head = "sem_seg_head.predictor."
    block = ("mlp.c_fc", "mlp.c_proj", "attn.q_proj", "attn.k_proj", "attn.v_proj")
    expected = [
        f"{head}clip_model.{tower}transformer.resblocks.{i}.{layer}"
        for tower in ("visual.", "")
        for i in (0, 11)
        for layer in block
    ]
    swin = ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected += [
        f"{head}transformer.layers.1.swin_block.block_{b}.{x}" for b in (1, 2) for x in swin
    ]
    attention = ("attention.q", "attention.k", "attention.v", "MLP.0", "MLP.2")
    expected += [f"{head}transformer.layers.1.attention.{x}" for x in attention]
    others = [
        f"{head}clip_model.transformer.resblocks.0.attn.out_proj",
        f"{head}transformer.text_guidance_projection.0",
        f"{head}transformer.layers.1.attention.MLP.1",
        "other.transformer.resblocks.0.mlp.c_fc",
    ]
    assert set(target_modules(nested([*expected, *others]))) == set(expected)


def test_refuses_an_unknown_rule_and_another_model():
    model = nn.Sequential(nn.Linear(4, 6))
    with pytest.raises(ConfigError, match=r"unknown rule 'all' \(known: .*semla"):
        target_modules(model, "all")
    with pytest.raises(AdapterMismatchError, match="matches no linear layer of Sequential"):
        target_modules(model)
