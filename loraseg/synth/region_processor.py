"""The attention of one cross-attention module: plain, rectified or a mix of both."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, scaled_dot_product_attention

from loraseg.adapters.attention_mix import AttentionMixMode
from loraseg.errors import StageError
from loraseg.synth.regions import Regions, token_grid
from loraseg.tensor_types import Float, Int, Tensor

__all__ = ["RegionAttentionProcessor", "RegionContext", "TextKeyValueCache"]


class TextKeyValueCache:
    """Keys and values of prompts that are constant during a sampling run.

    Each module projects the n distinct prompts once; the b rows of a batch share them by index.
    This happens before the UNet runs, so that a compiled UNet only reads the cache.
    """

    def __init__(
        self,
        hidden: Float[Tensor, "n l d"],
        index: Int[Tensor, " b"],
        modules: Mapping[str, Any],
    ) -> None:
        """Compute the projections.

        Args:
            hidden: Encodings of n distinct prompts.
            index: Row of ``hidden`` for each row of the batch.
            modules: The cross-attention modules by name.
        """
        self.rows = len(index)
        self.projections = len(hidden) * len(modules)
        index = index.to(hidden.device)
        # Nothing to gather if row i has prompt i.
        is_identity = index.tolist() == list(range(len(hidden)))
        self._by_module: dict[str, tuple[Tensor, Tensor]] = {}
        for name, attn in modules.items():
            key, value = attn.to_k(hidden), attn.to_v(hidden)
            if not is_identity:
                key, value = key.index_select(0, index), value.index_select(0, index)
            self._by_module[name] = key, value

    def get(self, name: str) -> tuple[Float[Tensor, "b l c"], Float[Tensor, "b l c"]]:
        """Return the keys and values of a module, in the rows of the batch."""
        return self._by_module[name]


@dataclass(slots=True)
class RegionContext:
    """State shared by the processors of one UNet; its control sets it for each batch."""

    regions: Regions | None = None
    unconditional: int = 0
    latent: tuple[int, int] = (1, 1)
    text: TextKeyValueCache | None = None
    projections: int = 0


class RegionAttentionProcessor:
    """Attention processor of one cross-attention module.

    ``out = share * plain + (1 - share) * rectified`` before the output projection, see
    :class:`~loraseg.synth.region_attention.RegionControl`. Unconditional rows use plain attention.
    Projections are called as modules, so that LoRA layers in them are applied.
    """

    def __init__(
        self,
        name: str,
        context: RegionContext,
        stock: Any,
        *,
        alpha: nn.Linear | None = None,
        fixed_share: float = 0.0,
        mode: AttentionMixMode = "token",
    ) -> None:
        """Wrap the stock processor.

        Args:
            name: Name of the attention module.
            context: State shared with the control.
            stock: The module's ``AttnProcessor2_0``, used while the context is empty.
            alpha: Linear layer (c -> 1) of a learned share; None for a fixed share.
            fixed_share: Share without ``alpha``, in [0, 1].
            mode: One learned share per query token (``token``) or per sample (``pooled``).
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
        hidden_states: Float[Tensor, "b positions c"],
        encoder_hidden_states: Float[Tensor, "b l d"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Float[Tensor, "b positions c"]:
        """Compute the attention; the arguments are named as in diffusers.

        Raises:
            StageError: The number of rows differs from that of the context, there is no text, or
                the caller passes an attention mask.
        """
        context = self._context
        if encoder_hidden_states is None:
            raise StageError(f"{self.name}: cross-attention got no text")
        if context.regions is None and context.text is None:
            context.projections += len(encoder_hidden_states)
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if attention_mask is not None:
            raise StageError(f"{self.name}: got an attention mask in addition to regions")
        query = _split_heads(attn, attn.to_q(hidden_states))
        key, value = self._keys_and_values(attn, encoder_hidden_states)
        attended = self._attend(
            hidden_states, query, _split_heads(attn, key), _split_heads(attn, value)
        )
        return attn.to_out[1](attn.to_out[0](attended))

    def _keys_and_values(self, attn: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        context = self._context
        if context.text is None:
            context.projections += len(hidden)
            return attn.to_k(hidden), attn.to_v(hidden)
        if len(hidden) != context.text.rows:
            raise StageError(
                f"{self.name}: the UNet got {len(hidden)} rows, "
                f"expected {context.text.rows}, one per index of the cached text"
            )
        return context.text.get(self.name)

    def _attend(self, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the concatenated outputs of the heads (b, positions, c)."""
        regions, unmasked = self._context.regions, self._context.unconditional
        learned = self.alpha is not None
        if regions is None or (not learned and self._fixed_share == 1):
            return _merge_heads(scaled_dot_product_attention(query, key, value))
        if len(query) != unmasked + len(regions):
            raise StageError(
                f"{self.name}: the UNet got {len(query)} rows, expected {unmasked + len(regions)}, "
                f"{unmasked} of them unconditional"
            )
        grid = token_grid(query.shape[2], self._context.latent)
        bias = regions.bias(*grid, query.dtype)
        rectified = _merge_heads(
            scaled_dot_product_attention(
                query[unmasked:], key[unmasked:], value[unmasked:], attn_mask=bias
            )
        )
        if not learned and self._fixed_share == 0:
            if unmasked == 0:
                return rectified
            plain = scaled_dot_product_attention(query[:unmasked], key[:unmasked], value[:unmasked])
            return torch.cat([_merge_heads(plain), rectified])
        plain = _merge_heads(scaled_dot_product_attention(query, key, value))
        share = self._plain_share(hidden[unmasked:]).to(plain.dtype)
        # lerp is exact at both ends: rectified at a share of 0, plain at a share of 1.
        if torch.is_grad_enabled():
            mixed = torch.lerp(rectified, plain[unmasked:], share)
            return torch.cat([plain[:unmasked], mixed]) if unmasked else mixed
        torch.lerp(rectified, plain[unmasked:], share, out=plain[unmasked:])
        return plain

    def _plain_share(self, hidden: Tensor) -> Tensor:
        """Return the share of plain attention: (b, positions, 1), (b, 1, 1) or (1, 1, 1)."""
        if self.alpha is None:
            return hidden.new_full((1, 1, 1), self._fixed_share)
        inputs = hidden.mean(dim=1, keepdim=True) if self._mode == "pooled" else hidden
        # The weights of the share stay in float32 even if the base is in half precision.
        logits = linear(inputs, self.alpha.weight.to(inputs), self.alpha.bias.to(inputs))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()


def _split_heads(attn: Any, projected: Tensor) -> Tensor:
    batch, length, width = projected.shape
    return projected.view(batch, length, attn.heads, width // attn.heads).transpose(1, 2)


def _merge_heads(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)
