"""Execution of the model: in chunks, in bfloat16, on other devices, compiled."""

import subprocess
import sys

import pytest
import torch

from loraseg.adapters.targets.catseg import target_modules
from loraseg.segment.open_vocabulary.catseg import chunking
from loraseg.segment.open_vocabulary.catseg.model import CATSeg
from tests.tiny_sizes import tiny_config

VOCABULARY = 20


def make(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = CATSeg(tiny_config(VOCABULARY, **changes)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype)


def inputs(classes, dtype=torch.float64, seed=1, batch=2):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 16, 16, generator=generator, dtype=torch.float64)
    text = torch.randn(classes, 1, 12, generator=generator, dtype=torch.float64)
    return images.to(dtype), text.to(dtype)


@pytest.mark.parametrize("pooling", [1, 2])
@pytest.mark.parametrize("classes", [1, 4, 5, 11])
def test_chunks_do_not_change_the_logits(monkeypatch, classes, pooling):
    model = make(pad_len=16, pooling=(1, pooling))
    whole = model(*inputs(classes))
    assert whole.requires_grad
    sizes = []
    model.aggregator.head.register_forward_hook(lambda module, x, y: sizes.append(len(y)))
    monkeypatch.setattr(chunking, "_CHUNK_TOKENS", 1)
    with torch.no_grad():
        pieces = model(*inputs(classes))
    assert sizes == [2 * 4] * (classes // 4) + [2 * (classes % 4)] * (classes % 4 > 0)
    torch.testing.assert_close(pieces, whole.detach(), rtol=0, atol=1e-12)


def test_images_are_the_leading_axis_of_every_adaptable_layer():
    model = make()
    seen = {}
    names = [n for n in target_modules(model) if ".clip_model.transformer." not in n]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, given, name=name: seen.setdefault(name, set()).update(map(len, given))
        )
    with torch.no_grad():
        model(*inputs(3, batch=5))
    assert {name for name in names if name not in seen} == {
        f"sem_seg_head.predictor.clip_model.visual.transformer.resblocks.1.attn.{part}_proj"
        for part in "qk"
    }
    assert set().union(*seen.values()) == {5}


@pytest.mark.parametrize("classes", [3, 9])
def test_bfloat16_is_close_to_float32(classes):
    """Within 6 % of the largest logit: bfloat16 has 8 bits and the path about 60 roundings."""
    model = make(torch.float32, pad_len=16)
    with torch.no_grad():
        exact = model(*inputs(classes, torch.float32))
        rough = model.to(torch.bfloat16)(*inputs(classes, torch.bfloat16))
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.06 * exact.abs().max()


def test_bfloat16_text_is_close_to_float32():
    ids = torch.tensor([[18, 3, 4, 19], [18, 3, 19, 0]])
    model = make(torch.float32)
    with torch.no_grad():
        exact = model.encode_text(ids)
        rough = model.to(torch.bfloat16).encode_text(ids)
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.02)


def test_bfloat16_selects_the_same_classes_as_float32():
    """The cosines differ in the third digit; the cost volume is float32 for every model dtype."""
    model = make(torch.bfloat16, pad_len=4).aggregator
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(1, 12, 4, 4, generator=generator).to(torch.bfloat16)
    text = (1 + 0.02 * torch.randn(1, 9, 1, 12, generator=generator)).to(torch.bfloat16)
    guidance = (torch.zeros(1, 8, 8, 8).bfloat16(), torch.zeros(1, 8, 16, 16).bfloat16())
    with torch.no_grad():
        logits = model(features, text, guidance)
    unit = torch.nn.functional.normalize(text.double(), dim=-1)[0, :, 0]
    cost = unit @ torch.nn.functional.normalize(features.double(), dim=1)[0].flatten(1)
    best = cost.amax(dim=1).topk(4).indices
    assert len(cost.amax(dim=1).bfloat16().unique()) < 9
    kept = (logits[0] != -100).any(dim=2).any(dim=1)
    assert set(kept.nonzero()[:, 0].tolist()) == set(best.tolist())


@pytest.mark.parametrize("classes", [3, 9])
def test_no_value_is_read_from_the_device(classes):
    """Reading a value of a tensor on the meta device raises an error."""
    model = make(torch.bfloat16).to("meta")
    images, text = (part.to("meta") for part in inputs(classes, torch.bfloat16))
    logits = model(images, text)
    assert (logits.device.type, logits.shape) == ("meta", (2, classes, 16, 16))
    features = model.encode_text(torch.tensor([[18, 3, 19], [18, 4, 19]]), groups=3)
    assert (features.device.type, features.shape) == ("meta", (3, 2, 12))


COMPILE = """
import torch
from tests.unit.segment.open_vocabulary.catseg.test_execution import inputs, make
model = make(torch.float32)
for classes in (3, 9):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            given = inputs(classes, torch.float32, seed)
            torch.testing.assert_close(compiled(*given), model(*given), rtol=0, atol=1e-5)
"""


def test_equal_shapes_share_one_compiled_graph():
    """In a separate process: the runtime checks of shapes in tests cannot be traced."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
