import peft
import pytest
import torch

from loraseg.adapters import Adapter, LoraPair, load_adapter, target_modules, to_peft_files
from loraseg.adapters.peft_io import save_adapter
from loraseg.fuse import AdapterBank, fuse
from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.model import CATSeg

TINY = {
    "image_size": 16,
    "patch": 4,
    "position_grid": 4,
    "vision_width": 16,
    "vision_layers": 2,
    "vision_heads": 2,
    "embed_dim": 12,
    "text_width": 8,
    "text_layers": 2,
    "text_heads": 2,
    "context_length": 8,
    "vocab_size": 20,
    "guidance_dims": (16, 8),
    "hidden": 8,
    "layers": 1,
    "heads": 2,
    "window": 2,
    "appearance_dim": 8,
    "text_dim": 8,
    "pad_len": 6,
    "decoder_dims": (16, 8),
    "decoder_guidance_dims": (4, 2),
}
VIT_L = {
    "image_size": 336,
    "patch": 14,
    "position_grid": 24,
    "vision_width": 1024,
    "vision_layers": 24,
    "vision_heads": 16,
    "embed_dim": 768,
    "text_width": 768,
    "text_heads": 12,
}


def tiny(**changes):
    torch.manual_seed(0)
    return CATSeg(CATSegConfig(**{**TINY, **changes})).eval()


def random_adapter(model, rank=3, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name in target_modules(model):
        weight = model.get_submodule(name).weight
        down = torch.randn(rank, weight.shape[1], generator=generator) * 0.3
        up = torch.randn(weight.shape[0], rank, generator=generator) * 0.3
        pairs[name] = LoraPair(down, up, scale)
    return load_adapter(to_peft_files(pairs, base_name="tiny"), name=f"a{seed}")


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    tokens = torch.randint(1, 19, (4, 8), generator=generator)
    return images, tokens


def run(model, inputs):
    images, tokens = inputs
    with torch.no_grad():
        return model(images, model.encode_text(tokens)[:, None])


def test_vit_l_has_214_targets_and_4444160_parameters_at_rank_8():
    with torch.device("meta"):
        model = CATSeg(CATSegConfig(**VIT_L))
    names = target_modules(model)
    assert len(names) == 214
    assert sum(8 * sum(model.get_submodule(name).weight.shape) for name in names) == 4_444_160


def test_the_number_of_targets_follows_the_depth():
    # 5 per CLIP block; 2 x 6 Swin and 5 class-attention layers per aggregator layer.
    assert len(target_modules(tiny())) == 5 * 4 + 17
    assert len(target_modules(tiny(vision_layers=3, text_layers=1, layers=2))) == 5 * 4 + 2 * 17


def test_stock_peft_gives_the_same_logits_as_the_bank(tmp_path, inputs):
    model = tiny()
    adapter = random_adapter(model)
    plain = run(model, inputs)
    with AdapterBank(model).use([fuse([adapter], [1.0])]):
        ours = run(model, inputs)
    assert torch.equal(run(model, inputs), plain)
    assert (ours - plain).abs().max() > 1e-3
    save_adapter(tmp_path, adapter)
    wrapped = peft.PeftModel.from_pretrained(tiny(), tmp_path)
    theirs = run(wrapped.base_model.model, inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_mix_equals_stock_peft_cat(tmp_path, inputs):
    model = tiny()
    adapters = [random_adapter(model, rank=2, seed=1), random_adapter(model, rank=3, seed=2)]
    with AdapterBank(model).use([fuse(adapters, [0.3, 0.7])]):
        ours = run(model, inputs)
    for adapter in adapters:
        save_adapter(tmp_path / adapter.name, adapter)
    wrapped = peft.PeftModel.from_pretrained(tiny(), tmp_path / "a1", adapter_name="a1")
    wrapped.load_adapter(tmp_path / "a2", adapter_name="a2")
    wrapped.add_weighted_adapter(["a1", "a2"], [0.3, 0.7], "mix", combination_type="cat")
    wrapped.set_adapter("mix")
    torch.testing.assert_close(ours, run(wrapped.base_model.model, inputs), rtol=1e-5, atol=1e-5)


def test_inert_attention_ignores_its_pairs(inputs):
    def difference(mode):
        model = tiny(clip_attention_lora=mode)
        adapter = random_adapter(model)
        only = {n: p for n, p in adapter.pairs.items() if n.endswith(("q_proj", "v_proj"))}
        plain = run(model, inputs)
        with AdapterBank(model).use([fuse([Adapter(name="q", pairs=only, digest="d")], [1.0])]):
            return (run(model, inputs) - plain).abs().max()

    assert difference("inert") == 0
    assert difference("active") > 1e-3
