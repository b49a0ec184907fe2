"""The attention of one cross-attention module: plain, rectified or a mix (methods b.1, b.2)."""
# pyright: basic

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from loraseg.errors import StageError
from loraseg.synth.regions import Regions, token_grid
from loraseg.tensor_types import Float, Int, Tensor

__all__ = ["RegionAttentionProcessor", "RegionContext", "ShareMode", "TextKeyValueCache"]

ShareMode = Literal["token", "pooled"]


class TextKeyValueCache:
    """Keys and values of prompts that stay the same during a sampling run.

    Each module projects the n distinct prompts once; the b rows of a batch share them by index.
    All is done before the UNet runs, so that a compiled UNet only ever reads it.
    """

    def __init__(
        self,
        hidden: Float[Tensor, "n l d"],
        index: Int[Tensor, " b"],
        modules: Mapping[str, Any],
    ) -> None:
        """Project.

        Args:
            hidden: Encoded distinct prompts.
            index: Which of them each row has.
            modules: The cross-attention modules.
        """
        self.rows = len(index)
        self.projections = len(hidden) * len(modules)
        index = index.to(hidden.device)
        # Where each row has a prompt of its own there is nothing to gather.
        as_is = index.tolist() == list(range(len(hidden)))
        self._by_module: dict[str, tuple[Tensor, Tensor]] = {}
        for name, attn in modules.items():
            key, value = attn.to_k(hidden), attn.to_v(hidden)
            if not as_is:
                key, value = key.index_select(0, index), value.index_select(0, index)
            self._by_module[name] = key, value

    def get(self, name: str) -> tuple[Float[Tensor, "b l c"], Float[Tensor, "b l c"]]:
        """Return the keys and values of a module."""
        return self._by_module[name]


@dataclass(slots=True)
class RegionContext:
    """What the processors of one UNet share, set by its control from batch to batch."""

    regions: Regions | None = None
    unconditional: int = 0
    latent: tuple[int, int] = (1, 1)
    text: TextKeyValueCache | None = None
    projections: int = 0


class RegionAttentionProcessor:
    """Processor of one cross-attention module.

    ``out = share * plain + (1 - share) * rectified`` before the output projection, where a
    learned share is ``sigmoid(alpha(h))`` of the normed hidden states h that enter the module: of
    each query token, or in ``pooled`` mode of their mean. Rows without a condition are plain.
    Projections are called as modules, so that LoRA layers act through them.
    """

    def __init__(
        self,
        name: str,
        context: RegionContext,
        stock: Any,
        *,
        alpha: nn.Linear | None = None,
        fixed_share: float = 0.0,
        mode: ShareMode = "token",
    ) -> None:
        """Wrap the stock processor.

        Args:
            name: Of the attention module.
            context: Shared with the control.
            stock: The module's ``AttnProcessor2_0``, which acts while nothing is set.
            alpha: (c -> 1); None for a share that is not learned.
            fixed_share: Then this one, in [0, 1].
            mode: One share per query token, or per sample.
        """
        self.name = name
        self.alpha = alpha
        self.stock = stock
        self._context = context
        self._fixed_share = fixed_share
        self._mode = mode

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b places c"],
        encoder_hidden_states: Float[Tensor, "b l d"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "b places c"]:
        """Attend; the names of the arguments are diffusers'.

        Raises:
            StageError: The rows of the batch are not those that the control was told of, or the
                caller masks text on its own.
        """
        context = self._context
        if encoder_hidden_states is None:
            raise StageError(f"{self.name}: cross attention got no text")
        if context.regions is None and context.text is None:
            context.projections += len(encoder_hidden_states)
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if attention_mask is not None:
            raise StageError(f"{self.name}: got an attention mask of its own beside regions")
        query = _split_heads(attn, attn.to_q(hidden_states))
        key, value = self._keys_and_values(attn, encoder_hidden_states)
        seen = self._attend(
            hidden_states, query, _split_heads(attn, key), _split_heads(attn, value)
        )
        return attn.to_out[1](attn.to_out[0](seen))

    def _keys_and_values(self, attn: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        context = self._context
        if context.text is None:
            context.projections += len(hidden)
            return attn.to_k(hidden), attn.to_v(hidden)
        if len(hidden) != context.text.rows:
            raise StageError(
                f"{self.name}: the UNet got {len(hidden)} rows, "
                f"expected {context.text.rows}, one per index of the constant text"
            )
        return context.text.get(self.name)

    def _attend(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the heads' outputs side by side (b, places, c)."""
        regions, free = self._context.regions, self._context.unconditional
        learned = self.alpha is not None
        if regions is None or (not learned and self._fixed_share == 1):
            return _merge_heads(scaled_dot_product_attention(query, key, value))
        if len(query) != free + len(regions):
            raise StageError(
                f"{self.name}: the UNet got {len(query)} rows, expected {free + len(regions)}, "
                f"{free} of them unconditional"
            )
        grid = token_grid(query.shape[2], self._context.latent)
        bias = regions.bias(*grid, query.dtype)
        rectified = _merge_heads(
            scaled_dot_product_attention(query[free:], key[free:], value[free:], attn_mask=bias)
        )
        if not learned and self._fixed_share == 0:
            if free == 0:
                return rectified
            plain = scaled_dot_product_attention(query[:free], key[:free], value[:free])
            return torch.cat([_merge_heads(plain), rectified])
        plain = _merge_heads(scaled_dot_product_attention(query, key, value))
        share = self._plain_share(hidden[free:]).to(plain.dtype)
        # lerp gives exactly its end at a share of one and its start at zero.
        if torch.is_grad_enabled():
            mixed = torch.lerp(rectified, plain[free:], share)
            return torch.cat([plain[:free], mixed]) if free else mixed
        torch.lerp(rectified, plain[free:], share, out=plain[free:])
        return plain

    def _plain_share(self, hidden: Tensor) -> Tensor:
        """Return the share of plain attention (b, places, 1), or (b, 1, 1) if pooled or fixed."""
        if self.alpha is None:
            return hidden.new_full((1, 1, 1), self._fixed_share)
        inputs = hidden.mean(dim=1, keepdim=True) if self._mode == "pooled" else hidden
        # The share's own weights stay in float32 beside a base in half precision.
        logits = linear(inputs, self.alpha.weight.to(inputs), self.alpha.bias.to(inputs))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()


def _split_heads(attn: Any, projected: Tensor) -> Tensor:
    batch, length, width = projected.shape
    return projected.view(batch, length, attn.heads, width // attn.heads).transpose(1, 2)


def _merge_heads(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)
