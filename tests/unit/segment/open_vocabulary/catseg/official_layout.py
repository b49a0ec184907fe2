"""The keys and shapes of official CAT-Seg checkpoints, written out from the published files."""

from dataclasses import dataclass

import torch

S = "sem_seg_head.predictor."


@dataclass(frozen=True)
class Sizes:
    """Sizes of one checkpoint; the defaults are the tiny sizes of the parity tests."""

    width: int = 12
    layers: int = 4
    patch: int = 4
    positions: int = 3
    embed: int = 10
    text_width: int = 8
    text_layers: int = 2
    context: int = 9
    vocabulary: int = 20
    guides: tuple[int, int] = (6, 5)
    prompts: int = 1
    hidden: int = 8
    layers_aggregator: int = 2
    grid: int = 4
    window: int = 2
    appearance: int = 6
    text: int = 7
    decoder: tuple[int, int] = (6, 5)
    decoder_guides: tuple[int, int] = (3, 2)


BASE = Sizes(
    width=768,
    layers=12,
    patch=16,
    positions=14,
    embed=512,
    text_width=512,
    text_layers=12,
    context=77,
    vocabulary=49408,
    guides=(256, 128),
    hidden=128,
    grid=24,
    window=12,
    appearance=128,
    text=128,
    decoder=(64, 32),
    decoder_guides=(32, 16),
)
LARGE = Sizes(
    width=1024,
    layers=24,
    patch=14,
    positions=24,
    embed=768,
    text_width=768,
    text_layers=12,
    context=77,
    vocabulary=49408,
    guides=(256, 128),
    hidden=128,
    grid=24,
    window=12,
    appearance=128,
    text=128,
    decoder=(64, 32),
    decoder_guides=(32, 16),
)


class Keys(dict[str, tuple[int, ...]]):
    def both(self, name: str, weight: tuple[int, ...]) -> None:
        self[f"{name}.weight"] = weight
        self[f"{name}.bias"] = weight[:1]


def layout(z: Sizes) -> dict[str, tuple[int, ...]]:
    return {**clip_keys(z), **aggregator_keys(z), **decoder_keys(z)}


def clip_keys(z: Sizes) -> Keys:
    keys = Keys()
    both = keys.both

    def block(name: str, c: int) -> None:
        for part in "qkv":
            keys[f"{name}.attn.{part}_proj_weight"] = (c, c)
        keys[f"{name}.attn.in_proj_bias"] = (3 * c,)
        both(f"{name}.attn.out_proj", (c, c))
        both(f"{name}.ln_1", (c,))
        both(f"{name}.ln_2", (c,))
        both(f"{name}.mlp.c_fc", (4 * c, c))
        both(f"{name}.mlp.c_proj", (c, 4 * c))

    clip = f"{S}clip_model."
    keys[f"{clip}positional_embedding"] = (z.context, z.text_width)
    keys[f"{clip}text_projection"] = (z.text_width, z.embed)
    keys[f"{clip}logit_scale"] = ()
    keys[f"{clip}token_embedding.weight"] = (z.vocabulary, z.text_width)
    both(f"{clip}ln_final", (z.text_width,))
    keys[f"{clip}visual.class_embedding"] = (z.width,)
    keys[f"{clip}visual.positional_embedding"] = (z.positions**2 + 1, z.width)
    keys[f"{clip}visual.conv1.weight"] = (z.width, 3, z.patch, z.patch)
    both(f"{clip}visual.ln_pre", (z.width,))
    both(f"{clip}visual.ln_post", (z.width,))
    keys[f"{clip}visual.proj"] = (z.width, z.embed)
    for i in range(z.layers):
        block(f"{clip}visual.transformer.resblocks.{i}", z.width)
    for i in range(z.text_layers):
        block(f"{clip}transformer.resblocks.{i}", z.text_width)
    return keys


def aggregator_keys(z: Sizes) -> Keys:
    keys = Keys()
    both, agg = keys.both, f"{S}transformer."
    h, (g1, g2) = z.hidden, z.decoder_guides
    both(f"{agg}conv1", (h, z.prompts, 7, 7))
    both(f"{agg}guidance_projection.0", (z.appearance, z.embed, 3, 3))
    both(f"{agg}text_guidance_projection.0", (z.text, z.embed))
    both(f"{agg}decoder_guidance_projection.0.0", (g1, z.guides[0], 3, 3))
    both(f"{agg}decoder_guidance_projection.1.0", (g2, z.guides[1], 3, 3))
    for i in range(z.layers_aggregator):
        swin, cls = f"{agg}layers.{i}.swin_block", f"{agg}layers.{i}.attention"
        both(f"{swin}.guidance_norm", (z.appearance,))
        if z.window < z.grid:
            tokens = z.window**2
            keys[f"{swin}.block_2.attn_mask"] = ((z.grid // z.window) ** 2, tokens, tokens)
        for j in (1, 2):
            both(f"{swin}.block_{j}.norm1", (h,))
            both(f"{swin}.block_{j}.norm2", (h,))
            both(f"{swin}.block_{j}.attn.q", (h, h + z.appearance))
            both(f"{swin}.block_{j}.attn.k", (h, h + z.appearance))
            both(f"{swin}.block_{j}.attn.v", (h, h))
            both(f"{swin}.block_{j}.attn.proj", (h, h))
            both(f"{swin}.block_{j}.mlp.fc1", (4 * h, h))
            both(f"{swin}.block_{j}.mlp.fc2", (h, 4 * h))
        keys[f"{cls}.padding_tokens"] = (1, 1, h)
        keys[f"{cls}.padding_guidance"] = (1, 1, z.text)
        both(f"{cls}.norm1", (h,))
        both(f"{cls}.norm2", (h,))
        both(f"{cls}.attention.q", (h, h + z.text))
        both(f"{cls}.attention.k", (h, h + z.text))
        both(f"{cls}.attention.v", (h, h))
        both(f"{cls}.MLP.0", (4 * h, h))
        both(f"{cls}.MLP.2", (h, 4 * h))
    return keys


def decoder_keys(z: Sizes) -> Keys:
    keys = Keys()
    both, agg = keys.both, f"{S}transformer."
    h, (g1, g2), (d1, d2) = z.hidden, z.decoder_guides, z.decoder
    for name, inputs, outputs, guide in (("decoder1", h, d1, g1), ("decoder2", d1, d2, g2)):
        keys[f"{agg}{name}.up.weight"] = (inputs, inputs - guide, 2, 2)
        keys[f"{agg}{name}.up.bias"] = (inputs - guide,)
        conv = f"{agg}{name}.conv.double_conv"
        keys[f"{conv}.0.weight"] = (outputs, inputs, 3, 3)
        both(f"{conv}.1", (outputs,))
        keys[f"{conv}.3.weight"] = (outputs, outputs, 3, 3)
        both(f"{conv}.4", (outputs,))
    both(f"{agg}head", (1, d2, 3, 3))
    for name, guide, kernel in (("upsample1", z.guides[0], 2), ("upsample2", z.guides[1], 4)):
        keys[f"{name}.weight"] = (z.width, guide, kernel, kernel)
        keys[f"{name}.bias"] = (guide,)
    return keys


def random_state(z: Sizes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random float64 tensors, scaled so that every path matters; masks are arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in layout(z).items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "norm" in key or ".ln_" in key or "double_conv.1" in key or "double_conv.4" in key:
            value = 0.3 * value + (1.0 if key.endswith("weight") else 0.0)
        elif len(shape) > 1 and "embedding" not in key and "padding" not in key:
            value = value / torch.tensor(shape[1:]).prod().sqrt()
        state[key] = value
    return state
