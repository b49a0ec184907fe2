"""Region attention in a UNet: installs the processors, sets their masks and owns the shares."""

import difflib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loraseg.adapters.attention_mix import AttentionMixMode
from loraseg.adapters.targets.unet import attention_projections
from loraseg.compat import prepare_torchvision
from loraseg.errors import AdapterMismatchError, ConfigError, StageError
from loraseg.synth.region_processor import (
    RegionAttentionProcessor,
    RegionContext,
    TextKeyValueCache,
)
from loraseg.synth.regions import Regions
from loraseg.tensor_types import Float, Int, Tensor

__all__ = ["RegionControl", "alpha_module_names"]

_WEIGHT, _BIAS = ".alpha.weight", ".alpha.bias"


class RegionControl:
    """Rectified cross-attention with layer-adaptive fusion in one UNet.

    ::

        A[i, j]  = q_i . k_j / sqrt(d)                      plain scores
        A'[i, j] = A[i, j] if M[i, j], else -inf            rectified scores
        out_i    = a_i softmax(A)_i V + (1 - a_i) softmax(A')_i V
        a_i      = sigmoid(w . h_i + b)                     learned share of plain attention

    * i, j: query position and text token; q, k, V: queries, keys and values of one head of width d.
    * M: the mask of :class:`~loraseg.synth.regions.Regions`, the same for all heads.
    * h_i: normed hidden state that enters the module; (w, b): one linear layer per module.
    * a = 0 is rectified attention alone, a = 1 plain attention.

    Rectified cross-attention: FreestyleNet (arXiv 2303.14412), in its code
    ``ldm/modules/attention_ADE20K.py``, ``CrossAttention.forward``. Layer-adaptive fusion:
    MatchMask (CVPR 2026), "Task-Specific Adapters + Layer-Adaptive Cross-Attention Fusion".

    Differences from the papers: MatchMask specifies neither activation, input nor initial value of
    the share. Here it is a sigmoid, so that the mix is convex; w starts at 0 and b at -2 (a share
    of 0.12); h is that of each query token or, with ``mode="pooled"``, the mean over the tokens.
    As in FreestyleNet, the unconditional half of guidance is not masked.

    Usage, by one thread per UNet::

        control = RegionControl(unet, alpha_modules=names)
        with control.installed(), control.cached_text(hidden, index):
            with control.regions(regions, unconditional=k, latent=(64, 64)):
                unet(latents, t, encoder_hidden_states=hidden[index])

    Self-attention keeps its own processor. With gradient checkpointing the backward pass repeats
    the forward pass of layers, so it must run inside the same blocks.
    """

    def __init__(
        self,
        unet: nn.Module,
        *,
        alpha_modules: Sequence[str] = (),
        mode: AttentionMixMode = "token",
        initial_bias: float = -2.0,
        fixed_share: float = 0.0,
    ) -> None:
        """Find the cross-attention modules; nothing in the UNet changes yet.

        Args:
            unet: A diffusers UNet with stock attention.
            alpha_modules: Names of the cross-attention modules with a learned share.
            mode: One share per query token (``token``) or per sample (``pooled``).
            initial_bias: b; learned shares start at its sigmoid.
            fixed_share: Share of all other modules, in [0, 1]: 0 is rectified, 1 plain attention.

        Raises:
            ConfigError: A name in ``alpha_modules`` is not a cross-attention module, the share is
                outside [0, 1], or the UNet's attention is not the stock one.
        """
        if not 0 <= fixed_share <= 1:
            raise ConfigError(f"fixed_share {fixed_share}: expected a value in [0, 1]")
        self._modules = _cross_attention_modules(unet)
        cross = [projection for projection in attention_projections(unet) if projection.cross]
        self._factors = sorted({projection.factor for projection in cross})
        self._alphas: dict[str, nn.Linear] = {}
        for name in alpha_modules:
            self._alphas[name] = _new_alpha(_require_module(name, self._modules), initial_bias)
        self._context = RegionContext()
        self._processors = {
            name: RegionAttentionProcessor(
                name,
                self._context,
                attn.processor,
                alpha=self._alphas.get(name),
                fixed_share=fixed_share,
                mode=mode,
            )
            for name, attn in self._modules.items()
        }

    @property
    def projections_computed(self) -> int:
        """Number of text rows whose keys and values were computed, summed over modules."""
        return self._context.projections

    @contextmanager
    def installed(self) -> Generator[None, None, None]:
        """Install the processors inside the block; the UNet's own are restored on exit.

        Raises:
            StageError: The installed processors are not the stock ones.
        """
        for name, attn in self._modules.items():
            _require_stock(name, attn, StageError)
        try:
            for name, attn in self._modules.items():
                attn.set_processor(self._processors[name])
            yield
        finally:
            for name, attn in self._modules.items():
                attn.set_processor(self._processors[name].stock)

    @contextmanager
    def regions(
        self, regions: Regions | None, *, unconditional: int = 0, latent: tuple[int, int]
    ) -> Generator[None, None, None]:
        """Apply masks to the rows of the batch after the first ``unconditional`` ones.

        Args:
            regions: Regions of the conditional rows, in order; None for plain attention.
            unconditional: Number of leading rows with plain attention (guidance).
            latent: Height and width of the latents.

        Raises:
            StageError: The call is outside :meth:`installed`, or the processors were replaced.
        """
        self._require_installed()
        context = self._context
        if regions is not None and not torch.is_grad_enabled():
            self._precompute_biases(regions, latent)
        before = context.regions, context.unconditional, context.latent
        context.regions, context.unconditional, context.latent = regions, unconditional, latent
        try:
            yield
        finally:
            context.regions, context.unconditional, context.latent = before

    @contextmanager
    def cached_text(
        self, hidden: Float[Tensor, "n l d"], index: Int[Tensor, " b"]
    ) -> Generator[None, None, None]:
        """Compute the keys and values of constant prompts once per module.

        They are computed on entry, with the adapters that are active in ``to_k`` and ``to_v`` at
        that time. The UNet's ``encoder_hidden_states`` are then not read, but must have b rows. If
        adapters differ between rows, one prompt has several keys: pass one row of ``hidden`` per
        row of the batch, and ``index = arange(b)``.

        Args:
            hidden: Encodings of n distinct prompts.
            index: Row of ``hidden`` for each row of the batch, unconditional rows included.

        Raises:
            StageError: The call is outside :meth:`installed`, or gradients are enabled.
            ConfigError: An index is out of range.
        """
        self._require_installed()
        if index.numel() == 0 or int(index.min()) < 0 or int(index.max()) >= len(hidden):
            raise ConfigError(
                f"cached text of {len(hidden)} prompts: got indices {index.tolist()}, "
                f"expected at least one, each in 0..{len(hidden) - 1}"
            )
        if torch.is_grad_enabled():
            raise StageError(
                "cached text is for sampling, but gradients are enabled; use torch.no_grad(), or "
                "do not use cached_text() in training"
            )
        before = self._context.text
        self._context.text = TextKeyValueCache(hidden, index, self._modules)
        self._context.projections += self._context.text.projections
        try:
            yield
        finally:
            self._context.text = before

    def alphas(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the learned shares by key.

        The keys are ``<module>.alpha.weight`` (1, c) and ``<module>.alpha.bias`` (1,), with c the
        width of the module's input.
        """
        named: dict[str, nn.Parameter] = {}
        for name, alpha in self._alphas.items():
            for key, parameter in alpha.named_parameters():
                named[f"{name}.alpha.{key}"] = parameter
        return named

    def alpha_state(self) -> dict[str, Tensor]:
        """Return copies of :meth:`alphas` on the CPU: weights (1, c) and biases (1,) by key."""
        return {key: value.detach().cpu().clone() for key, value in self.alphas().items()}

    def load_alphas(self, state: Mapping[str, Tensor]) -> None:
        """Copy the values of another control's :meth:`alpha_state` into this one.

        Args:
            state: Weights (1, c) and biases (1,), with the keys of :meth:`alphas`.

        Raises:
            AdapterMismatchError: Keys or shapes differ, or a value is not finite; nothing is
                changed in that case.
        """
        alphas = self.alphas()
        if state.keys() != alphas.keys():
            unmatched = sorted(state.keys() ^ alphas.keys())
            raise AdapterMismatchError(
                f"alpha layers: got {len(state)} tensors, expected {len(alphas)}; unmatched keys: "
                f"{', '.join(unmatched[:4])}"
            )
        for key, value in state.items():
            if value.shape != alphas[key].shape or not value.isfinite().all():
                raise AdapterMismatchError(
                    f"{key}: got {tuple(value.shape)}, expected finite values of shape "
                    f"{tuple(alphas[key].shape)}"
                )
        with torch.no_grad():
            for key, value in state.items():
                alphas[key].copy_(value)

    def _precompute_biases(self, regions: Regions, latent: tuple[int, int]) -> None:
        """Compute the masks of all levels in advance, so that a compiled UNet only reads them."""
        dtype = next(iter(self._modules.values())).to_q.weight.dtype
        for factor in self._factors:
            rows, columns = (side // factor for side in latent)
            if rows and columns:
                regions.bias(rows, columns, dtype)

    def _require_installed(self) -> None:
        for name, attn in self._modules.items():
            if attn.processor is not self._processors[name]:
                raise StageError(
                    f"{name}: its processor is {type(attn.processor).__name__}, expected region "
                    "attention; enter installed() first, and disable attention slicing and xFormers"
                )


def alpha_module_names(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of the attention modules in an alpha state, in its order.

    Args:
        state: Weights (1, c) and biases (1,) by key.

    Raises:
        AdapterMismatchError: A key is not ``<module>.alpha.weight`` or ``<module>.alpha.bias``.
    """
    names: dict[str, None] = {}
    for key in state:
        name = key.removesuffix(_WEIGHT).removesuffix(_BIAS)
        if name == key:
            raise AdapterMismatchError(
                f"alpha layers: got key {key!r}, expected <module>{_WEIGHT} or <module>{_BIAS}"
            )
        names[name] = None
    return tuple(names)


def _cross_attention_modules(unet: nn.Module) -> dict[str, Any]:
    prepare_torchvision()
    from diffusers.models.attention_processor import Attention

    modules = {
        name: module
        for name, module in unet.named_modules()
        # Not by name: attn1 also attends to text in blocks without self-attention
        # (only_cross_attention).
        if isinstance(module, Attention) and module.is_cross_attention
    }
    for name, attn in modules.items():
        _require_stock(name, attn, ConfigError)
    return modules


def _require_stock(name: str, attn: Any, error: type[Exception]) -> None:
    """Raise ``error`` unless the attention is just projections around a softmax."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    if type(attn.processor) is not AttnProcessor2_0:
        raise error(
            f"{name}: its processor is {type(attn.processor).__name__}, expected diffusers' "
            "AttnProcessor2_0 (no slicing, no xFormers, no other region attention)"
        )
    norms = [
        norm
        for norm in ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
        if getattr(attn, norm, None)
    ]
    if norms or attn.residual_connection or attn.rescale_output_factor != 1:
        feature = ", ".join(norms) or "output scaling"
        raise error(f"{name}: region attention does not support its {feature}")


def _require_module(name: str, modules: Mapping[str, Any]) -> Any:
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=1)
        raise ConfigError(
            f"alpha module {name!r}: no cross-attention module of that name"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return modules[name]


def _new_alpha(attn: Any, bias: float) -> nn.Linear:
    """Return a float32 layer (c -> 1) with weight zero and the given bias."""
    device = next(attn.parameters()).device
    # Skips the random initialisation, which would advance torch's global generator.
    alpha: Any = nn.utils.skip_init(
        nn.Linear, attn.query_dim, 1, device=device, dtype=torch.float32
    )
    nn.init.zeros_(alpha.weight)
    nn.init.constant_(alpha.bias, bias)
    return alpha
