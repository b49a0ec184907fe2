"""The two CLIP encoders as CAT-Seg uses them (methods A.1 to A.3); names as in its checkpoints."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraseg.segment.catseg.attention import attend
from loraseg.segment.catseg.config import CATSegConfig
from loraseg.tensor_types import Float, Int

__all__ = ["ClipTowers", "VisionTower"]


class QuickGELU(nn.Module):
    """OpenAI CLIP's activation, x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head attention with one Linear each for q, k, v and the output."""

    def __init__(self, width: int, heads: int, *, call_modules: bool) -> None:
        super().__init__()
        self.heads = heads
        self.call_modules = call_modules
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n c"], *, causal: bool) -> Float[Tensor, "b n c"]:
        q, k, v = (
            self._project(proj, x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = attend(q, k, v, causal=causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def values(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Return W_o (W_v x + b_v) + b_o: every token attends to itself alone."""
        return self.out_proj(self._project(self.v_proj, x))

    def _project(self, proj: Any, x: Tensor) -> Tensor:
        # Any: while adapters train, peft's layers stand where the Linears were.
        # "inert": the official code reads the weights, so adapters on these modules never act.
        return proj(x) if self.call_modules else nn.functional.linear(x, proj.weight, proj.bias)


class Mlp(nn.Module):
    """Two Linears, four times wider between them."""

    def __init__(self, width: int, *, quick_gelu: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = QuickGELU() if quick_gelu else nn.GELU()
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """A pre-norm residual attention block."""

    def __init__(self, width: int, heads: int, config: CATSegConfig) -> None:
        super().__init__()
        self.attn = Attention(width, heads, call_modules=config.clip_attention_lora == "active")
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = Mlp(width, quick_gelu=config.quick_gelu)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b n c"], *, causal: bool) -> Float[Tensor, "b n c"]:
        x = x + self.attn(self.ln_1(x), causal=causal)
        return x + self.mlp(self.ln_2(x))

    def dense(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Run as the changed last vision block of A.3.

        Values only, and for every token the residual is the CLS token's input, not its own.
        """
        x = self.attn.values(self.ln_1(x)) + x[:, :1]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int, config: CATSegConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, config) for _ in range(layers))


class VisionTower(nn.Module):
    """The vision transformer with dense output (A.3)."""

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
        """Return the dense features (not normalised) and the two tapped block outputs.

        The tapped outputs are (b, vision_width, g, g), shallow one first, CLS dropped.
        """
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([cls, patches], dim=1) + self._positions())
        outputs: list[Tensor] = []
        blocks: Sequence[Block] = list(self.transformer.resblocks)  # pyright: ignore[reportAssignmentType]
        for block in blocks[:-1]:
            outputs.append(x := block(x, causal=False))
        outputs.append(blocks[-1].dense(x))
        features = self.ln_post(outputs[-1][:, 1:]) @ self.proj
        return self._to_map(features), [
            self._to_map(outputs[tap][:, 1:]) for tap in self.tapped_blocks
        ]

    def _to_map(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b c g g"]:
        return tokens.transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def _positions(self) -> Float[Tensor, "n c"]:
        """Return the positional table for the used grid; the CLS row is kept as it is."""
        table = self.positional_embedding
        if self.grid == self.position_grid:
            return table
        square = table[1:].T.unflatten(1, (self.position_grid, self.position_grid))[None]
        resized = nn.functional.interpolate(
            square, (self.grid, self.grid), mode="bicubic", align_corners=False
        )
        return torch.cat([table[:1], resized[0].flatten(1).T])


class ClipTowers(nn.Module):
    """Vision and text encoder of one CLIP model."""

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

    def encode_text(self, token_ids: Int[Tensor, "t l"]) -> Float[Tensor, "t d"]:
        """Return L2-normalised text features, read at the end-of-text token.

        That token is the first one with the row's largest id. Nothing after it can reach it
        through the causal mask, so the batch is cut behind its last occurrence: exact.
        """
        ends = token_ids.argmax(dim=-1)
        length = int(ends.max()) + 1
        x = self.token_embedding(token_ids[:, :length]) + self.positional_embedding[:length]
        for block in self.transformer.resblocks:
            x = block(x, causal=True)
        last = x[torch.arange(len(x), device=x.device), ends]
        return nn.functional.normalize(self.ln_final(last) @ self.text_projection, dim=-1)
