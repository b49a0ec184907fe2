"""The official formulation of CAT-Seg's expensive parts, on the weights of loraseg's modules.

The class axis is padded with computed rows, guidance is concatenated to every class, upsampling
and convolution are separate, and all 77 tokens of every prompt are encoded. It uses torch's fused
attention, which makes it as fast as possible.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["plain_aggregator", "plain_text", "trimmed_text"]


def plain_aggregator(module: Any, features: Tensor, text: Tensor, guidance: Any) -> Tensor:
    """Return logits (b, t, s, s) of an ``Aggregator`` for t <= ``pad_len`` classes, pooling 1."""
    unit = F.normalize(text, dim=-1)
    cost = torch.einsum("bdhw,btpd->btphw", F.normalize(features, dim=1), unit)
    batch, classes = cost.shape[:2]
    appearance = module.guidance_projection(features).permute(0, 2, 3, 1)
    words = module.text_guidance_projection(F.normalize(text.mean(dim=2), dim=-1))
    x = module.conv1(cost.flatten(0, 1)).permute(0, 2, 3, 1).unflatten(0, (batch, classes))
    for layer in module.layers:
        guide = layer.swin_block.guidance_norm(appearance)
        for block in (layer.swin_block.block_1, layer.swin_block.block_2):
            x = _swin_block(block, x, guide)
        x = _class_layer(layer.attention, x, words)
    maps = x.flatten(0, 1).permute(0, 3, 1, 2)
    stages = zip(
        (module.decoder1, module.decoder2),
        module.decoder_guidance_projection,
        guidance,
        strict=True,
    )
    for up, project, image in stages:
        guide = project(image)[:, None].expand(-1, classes, -1, -1, -1).flatten(0, 1)
        maps = up.conv.double_conv(torch.cat([up.up(maps), guide], dim=1))
    return module.head(maps).view(batch, classes, *maps.shape[2:])


def _concat(x: Tensor, guide: Tensor) -> Tensor:
    return torch.cat([x, guide.unsqueeze(1).expand(*x.shape[:-1], -1)], dim=-1)


def _plain_linear(linear: Any, x: Tensor) -> Tensor:
    return linear(x)  # ours takes the concatenated input too, and so does peft's layer around it


def _swin_block(block: Any, x: Tensor, guide: Tensor) -> Tensor:
    window, side = block.window, x.shape[2] // block.window
    heads, attn = block.attn.heads, block.attn

    def windows(y: Tensor) -> Tensor:
        y = y.roll((-block.shift, -block.shift), (-3, -2)) if block.shift else y
        y = y.unflatten(-2, (side, window)).unflatten(-4, (side, window))
        return y.transpose(-3, -4).flatten(-3, -2).flatten(-4, -3)

    tokens = windows(block.norm1(x))
    both = _concat(tokens, windows(guide))
    q, k, v = (
        _plain_linear(linear, y)
        .unflatten(-1, (heads, -1))
        .transpose(-3, -2)
        .flatten(2, 3)
        .flatten(0, 1)
        for linear, y in ((attn.q, both), (attn.k, both), (attn.v, tokens))
    )
    bias = None if block.attn_mask is None else block.attn_mask.repeat_interleave(heads, 0)[None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    y = y.unflatten(1, (side**2, heads)).transpose(-3, -2).flatten(-2)
    y = attn.proj(y).unflatten(0, x.shape[:2])
    y = y.unflatten(-2, (window, window)).unflatten(-4, (side, side))
    y = y.transpose(-3, -4).flatten(-3, -2).flatten(-4, -3)
    x = x + (y.roll((block.shift, block.shift), (-3, -2)) if block.shift else y)
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def _class_layer(layer: Any, x: Tensor, words: Tensor) -> Tensor:
    classes, side = x.shape[1:3]
    y = x.flatten(2, 3).transpose(1, 2)
    extra = layer.pad_len - classes
    y = torch.cat([y, layer.padding_tokens.expand(len(x), side**2, extra, -1)], dim=2)
    words = torch.cat([words, layer.padding_guidance.expand(len(x), extra, -1)], dim=1)
    tokens, attn, length = layer.norm1(y), layer.attention, y.shape[2]
    both = _concat(tokens, words)
    q, k = F.elu(_plain_linear(attn.q, both)) + 1, F.elu(_plain_linear(attn.k, both)) + 1
    v = _plain_linear(attn.v, tokens) / length
    q, k, v = (z.unflatten(-1, (attn.heads, -1)) for z in (q, k, v))
    memory = torch.einsum("bnshd,bnshv->bnhdv", k, v)
    scale = length / (torch.einsum("bnthd,bnhd->bnth", q, k.sum(dim=2)) + 1e-6)
    y = y + (torch.einsum("bnthd,bnhdv->bnthv", q, memory) * scale[..., None]).flatten(-2)
    y = y + layer.MLP(layer.norm2(y))
    return x + y[:, :, :classes].transpose(1, 2).unflatten(2, (side, side))


def plain_text(clip: Any, token_ids: Tensor) -> Tensor:
    """Return the text features (t, d) of ``ClipTowers`` by a pass over all tokens."""
    ends = token_ids.argmax(dim=-1)
    x = clip.token_embedding(token_ids) + clip.positional_embedding[: token_ids.shape[1]]
    for block in clip.transformer.resblocks:
        attn, y = block.attn, block.ln_1(x)
        q, k, v = (
            # The official code reads the weights, so that adapters on these layers have no effect.
            (linear(y) if attn.call_modules else F.linear(y, linear.weight, linear.bias))
            .unflatten(-1, (attn.heads, -1))
            .transpose(1, 2)
            for linear in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attn.out_proj(mixed.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    last = x[torch.arange(len(x), device=x.device), ends]
    return F.normalize(clip.ln_final(last) @ clip.text_projection, dim=-1)


def trimmed_text(clip: Any, token_ids: Tensor) -> Tensor:
    """Return the same features from prompts truncated after the last end token."""
    return plain_text(clip, token_ids[:, : int(token_ids.argmax(dim=-1).max()) + 1])
