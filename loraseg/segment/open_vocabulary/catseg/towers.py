"""The two CLIP encoders of CAT-Seg, with the parameter names of its checkpoints.

Official code: ``cat_seg/third_party/model_vpt.py``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraseg.segment.open_vocabulary.catseg.attention import attend
from loraseg.segment.open_vocabulary.catseg.config import CATSegConfig
from loraseg.segment.open_vocabulary.catseg.prompt_prefixes import PrefixTable
from loraseg.tensor_types import Float, Int

__all__ = ["ClipTowers", "VisionTower"]


class QuickGELU(nn.Module):
    """The activation of OpenAI's CLIP, ``x * sigmoid(1.702 x)``."""

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return x * torch.sigmoid(1.702 * x)


class ClipAttention(nn.Module):
    """Multi-head attention with separate linear layers for q, k, v and the output."""

    def __init__(self, width: int, heads: int, *, call_modules: bool) -> None:
        super().__init__()
        self.heads = heads
        self.call_modules = call_modules
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        q, k, v = (
            self._split(self._project(proj, x)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(_join(attend(q, k, v)))

    def causal(self, x: Float[Tensor, "g n c"], prefixes: PrefixTable) -> Float[Tensor, "g n c"]:
        """Let every prefix attend to its own prefixes and itself.

        The projections see each distinct prefix once; only the attention kernel gets complete
        prompts.
        """
        q, k, v = (
            self._project_prompts(proj, x, prefixes)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = _join(attend(q, k, v, causal=True))
        mixed = mixed.unflatten(0, (len(x), -1)).flatten(1, 2)
        return self.out_proj(mixed.index_select(1, prefixes.flat_indices))

    def causal_at_ends(
        self, x: Float[Tensor, "g n c"], prefixes: PrefixTable
    ) -> Float[Tensor, "g t c"]:
        """Return the rows of :meth:`causal` for the complete prompts only."""
        k, v = (self._project_prompts(proj, x, prefixes) for proj in (self.k_proj, self.v_proj))
        q = self._project(self.q_proj, x.index_select(1, prefixes.full_prompts))
        later = torch.arange(k.shape[2], device=x.device) > prefixes.end_positions[:, None]
        mask = q.new_zeros(later.shape).masked_fill(later, -torch.inf)
        mask = mask[:, None, None].repeat(len(x), 1, 1, 1)
        mixed = attend(self._split(q.flatten(0, 1)[:, None]), k, v, mask)
        return self.out_proj(_join(mixed).view_as(q))

    def values(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Return ``W_o (W_v x + b_v) + b_o``: every token attends only to itself."""
        return self.out_proj(self._project(self.v_proj, x))

    def _project(self, proj: Any, x: Tensor) -> Tensor:
        # Any, because peft replaces the linear layers by its own.
        # "inert": the official code reads the weights, so adapters on these modules have no effect.
        return proj(x) if self.call_modules else nn.functional.linear(x, proj.weight, proj.bias)

    def _project_prompts(self, proj: Any, x: Tensor, prefixes: PrefixTable) -> Tensor:
        """Project each prefix once; return those of all prompts, (g * t, heads, l, c / heads)."""
        y = self._project(proj, x).index_select(1, prefixes.prefix_ids.flatten())
        return self._split(y.unflatten(1, prefixes.prefix_ids.shape).flatten(0, 1))

    def _split(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b h n d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _join(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n c"]:
    return x.transpose(1, 2).flatten(2)


class ClipMlp(nn.Module):
    """Linear, GELU, linear, with a hidden width of 4 c."""

    def __init__(self, width: int, *, quick_gelu: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = QuickGELU() if quick_gelu else nn.GELU()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """A pre-norm residual attention block."""

    def __init__(self, width: int, heads: int, config: CATSegConfig) -> None:
        super().__init__()
        self.attn = ClipAttention(width, heads, call_modules=config.clip_attention_lora == "active")
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = ClipMlp(width, quick_gelu=config.quick_gelu)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

    def causal(self, x: Float[Tensor, "g n c"], prefixes: PrefixTable) -> Float[Tensor, "g n c"]:
        """Run on the distinct prefixes of prompts with a causal mask."""
        x = x + self.attn.causal(self.ln_1(x), prefixes)
        return x + self.mlp(self.ln_2(x))

    def causal_at_ends(
        self, x: Float[Tensor, "g n c"], prefixes: PrefixTable
    ) -> Float[Tensor, "g t c"]:
        """Return the rows of :meth:`causal` for the complete prompts only."""
        mixed = self.attn.causal_at_ends(self.ln_1(x), prefixes)
        x = x.index_select(1, prefixes.full_prompts) + mixed
        return x + self.mlp(self.ln_2(x))

    def dense(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Run as CAT-Seg's modified last vision block (``forward_dense`` of the official code).

        There is no attention, only the value path, and the residual of every token is the input
        of the class token instead of its own.
        """
        x = self.attn.values(self.ln_1(x)) + x[:, :1]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int, config: CATSegConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, config) for _ in range(layers))


class VisionTower(nn.Module):
    """The vision transformer with dense output (``VisualTransformer`` of the official code)."""

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__()
        width = config.vision_width
        self.grid = config.grid
        self.position_grid = config.position_grid
        self.tapped_blocks = config.tapped_blocks
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        rows = config.position_grid**2 + 1
        self.positional_embedding = nn.Parameter(torch.randn(rows, width) * width**-0.5)
        self.conv1 = nn.Conv2d(3, width, config.patch, config.patch, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.vision_heads, config)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)

    def forward(
        self, images: Float[Tensor, "b 3 s s"]
    ) -> tuple[Float[Tensor, "b d g g"], list[Tensor]]:
        """Return the dense features (not normalised) and the outputs of the guidance blocks.

        The two outputs are (b, vision_width, g, g), the shallow one first, without class token.
        """
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([cls, patches], dim=1) + self._positions())
        outputs: list[Tensor] = []
        blocks: Sequence[Block] = list(self.transformer.resblocks)  # pyright: ignore[reportAssignmentType]
        for block in blocks[:-1]:
            outputs.append(x := block(x))
        outputs.append(blocks[-1].dense(x))
        features = self.ln_post(outputs[-1][:, 1:]) @ self.proj
        return self._to_map(features), [
            self._to_map(outputs[tap][:, 1:]) for tap in self.tapped_blocks
        ]

    def _to_map(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b c g g"]:
        return tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def _positions(self) -> Float[Tensor, "n c"]:
        """Return the positional embedding resized to the grid; the class row is unchanged."""
        table = self.positional_embedding
        if self.grid == self.position_grid:
            return table
        square = table[1:].T.unflatten(1, (self.position_grid, self.position_grid))[None]
        # In float32 at least: interpolation weights are inaccurate in lower precision.
        resized = nn.functional.interpolate(
            square.to(torch.promote_types(table.dtype, torch.float32)),
            (self.grid, self.grid),
            mode="bicubic",
            align_corners=False,
        )
        return torch.cat([table[:1], resized[0].flatten(1).T.to(table.dtype)])


class ClipTowers(nn.Module):
    """The vision and text encoders of one CLIP model."""

    def __init__(self, config: CATSegConfig) -> None:
        super().__init__()
        width = config.text_width
        self.visual = VisionTower(config)
        self.transformer = Transformer(width, config.text_layers, config.text_heads, config)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def encode_text(self, token_ids: Int[Tensor, "t l"], groups: int) -> Float[Tensor, "g t d"]:
        """Return L2-normalised text features at the end-of-text token, for each group.

        The end-of-text token is the first one with the largest id of its row. Tokens after it
        cannot influence it through the causal mask and are skipped; prefixes shared by several
        rows are computed once. Layers are called on (groups, distinct prefixes, width).
        """
        prefixes = PrefixTable.from_token_ids(token_ids).to(self.positional_embedding.device)
        positions = self.positional_embedding[prefixes.positions]
        x = (self.token_embedding(prefixes.tokens) + positions).expand(groups, -1, -1)
        blocks: Sequence[Block] = list(self.transformer.resblocks)  # pyright: ignore[reportAssignmentType]
        for block in blocks[:-1]:
            x = block.causal(x, prefixes)
        last = blocks[-1].causal_at_ends(x, prefixes)
        return nn.functional.normalize(self.ln_final(last) @ self.text_projection, dim=-1)
