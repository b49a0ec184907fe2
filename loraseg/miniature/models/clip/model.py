"""The miniature CLIP: open_clip's class with forward passes for pretraining.

Pretraining needs crops and patch embeddings, which open_clip's class does not offer. The passes
below use its weights and equal its own outputs on whole images.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loraseg.compat import prepare_torchvision
from loraseg.tensor_types import Float, Int, Tensor, UInt8

__all__ = ["CLIP_CONFIG", "build_clip", "encode_dense", "encode_text", "normalise"]

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "layers": 4,
        "width": 128,
        "head_width": 32,
        "patch_size": 4,
        "image_size": 64,
    },
    "text_cfg": {"context_length": 32, "width": 128, "heads": 4, "layers": 3},
    "quick_gelu": True,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}


def build_clip(vocab_size: int) -> nn.Module:
    """Return a new ``open_clip.model.CLIP`` of the miniature's size."""
    prepare_torchvision()
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    return CLIP(
        CLIP_CONFIG["embed_dim"],
        CLIPVisionCfg(**CLIP_CONFIG["vision_cfg"]),
        CLIPTextCfg(**CLIP_CONFIG["text_cfg"], vocab_size=vocab_size),
        quick_gelu=CLIP_CONFIG["quick_gelu"],
    )


def normalise(images: UInt8[Tensor, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """Convert RGB images to the input of the network, in [-2, 2]."""
    return (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def encode_dense(
    model: Any, images: Float[Tensor, "b 3 s s"], offset: tuple[int, int] = (0, 0)
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
    """Embed images, or crops of images, globally and by patch.

    The patch embeddings take CAT-Seg's value path through the last block: the values are not mixed
    by attention, and the residual is the class token (CAT-Seg's code, ``third_party/model_vpt.py``,
    ``forward_dense``).

    Args:
        model: The miniature CLIP.
        images: Normalised images; the side is a multiple of the patch size.
        offset: Row and column of the crop in the whole image, in patches.

    Returns:
        Global and patch embeddings in the joint space, not normalised.
    """
    visual = model.visual
    tokens = visual.conv1(images)
    side = tokens.shape[-1]
    tokens = tokens.flatten(2).transpose(1, 2)
    tokens = visual.ln_pre(_with_positions(visual, tokens, side, offset))
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        tokens = _block(block, tokens)
    out = _last_block(last, tokens)
    out = visual.ln_post(out) @ visual.proj
    return out[:, 0], out[:, 1:]


def encode_text(model: Any, ids: Int[Tensor, "n l"]) -> Float[Tensor, "n d"]:
    """Embed texts.

    Padding after the longest text is cut off; the causal mask makes this exact.
    """
    ids = ids[:, : int((ids != 0).sum(1).max())]
    length = ids.shape[1]
    tokens = model.token_embedding(ids) + model.positional_embedding[:length]
    mask = torch.full((length, length), float("-inf")).triu(1)
    for block in model.transformer.resblocks:
        tokens = _block(block, tokens, mask)
    ends = model.ln_final(tokens)[torch.arange(len(ids)), ids.argmax(1)]
    return ends @ model.text_projection


def _with_positions(visual: Any, tokens: Tensor, side: int, offset: tuple[int, int]) -> Tensor:
    table = visual.positional_embedding
    grid = int((table.shape[0] - 1) ** 0.5)
    row, column = offset
    window = table[1:].view(grid, grid, -1)[row : row + side, column : column + side]
    first = (visual.class_embedding + table[0]).expand(len(tokens), 1, -1)
    window = window.reshape(side * side, -1).to(tokens.dtype)
    return torch.cat([first.to(tokens.dtype), tokens + window], 1)


def _block(block: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    normal = block.ln_1(tokens)
    tokens = tokens + _attention(block.attn, normal, normal, mask)
    return tokens + block.mlp(block.ln_2(tokens))


def _last_block(block: Any, tokens: Tensor) -> Tensor:
    """Apply the regular block to the class token and the value path to the patches."""
    attention, first = block.attn, tokens[:, :1]
    normal = block.ln_1(tokens)
    attended = first + _attention(attention, normal[:, :1], normal, None)
    width = tokens.shape[-1]
    values = functional.linear(
        normal[:, 1:], attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :]
    )
    out = torch.cat([attended, attention.out_proj(values) + first], 1)
    return out + block.mlp(block.ln_2(out))


def _attention(attention: Any, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention step by step: faster than the fused kernel in bfloat16 on a CPU."""
    batch, length, width = queries.shape
    heads = attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query = functional.linear(queries, weight[:width], bias[:width])
    key, value = functional.linear(keys, weight[width:], bias[width:]).chunk(2, -1)

    def split(x: Tensor) -> Tensor:
        return x.view(batch, -1, heads, width // heads).transpose(1, 2)

    scores = (split(query) * (width // heads) ** -0.5) @ split(key).transpose(-1, -2)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    mixed = scores.softmax(-1).to(value.dtype) @ split(value)
    return attention.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
