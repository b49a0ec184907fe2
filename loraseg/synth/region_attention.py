"""Region attention in a UNet: who installs the processors, sets their masks and owns the shares."""
# pyright: basic

import difflib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loraseg.adapters.targets.unet import attention_projections
from loraseg.compat import prepare_torchvision
from loraseg.errors import AdapterMismatchError, ConfigError, StageError
from loraseg.synth.region_processor import (
    RegionAttentionProcessor,
    RegionContext,
    ShareMode,
    TextKeyValueCache,
)
from loraseg.synth.regions import Regions
from loraseg.tensor_types import Float, Int, Tensor

__all__ = ["RegionAttentionProcessor", "RegionControl", "Regions", "alpha_module_names"]

_WEIGHT, _BIAS = ".alpha.weight", ".alpha.bias"


class RegionControl:
    """Region attention of one UNet. One thread a UNet.

    ::

        control = RegionControl(unet, alpha_modules=names)
        with control.installed(), control.constant_text(hidden, index):
            with control.regions(regions, unconditional=k, latent=(64, 64)):
                unet(latents, t, encoder_hidden_states=hidden[index])

    Self-attention keeps its own processor. With gradient checkpointing the backward pass runs
    layers again, so it belongs inside the same blocks as the forward pass.
    """

    def __init__(
        self,
        unet: nn.Module,
        *,
        alpha_modules: Sequence[str] = (),
        mode: ShareMode = "token",
        initial_bias: float = -2.0,
        fixed_share: float = 0.0,
    ) -> None:
        """Find the cross-attention modules; nothing in the UNet changes yet.

        Args:
            unet: A diffusers UNet with stock attention.
            alpha_modules: Cross-attention modules whose share of plain attention is learned.
            mode: A share per query token, or one per sample (``pooled``).
            initial_bias: The learned shares start at its sigmoid everywhere; -2 gives 0.12.
            fixed_share: Share of all other modules: 0 is rectified, 1 plain attention.

        Raises:
            ConfigError: ``alpha_modules`` names no cross-attention module, the share is outside
                [0, 1], or the UNet's attention is not the stock one.
        """
        if not 0 <= fixed_share <= 1:
            raise ConfigError(f"fixed_share {fixed_share}: expected a value in [0, 1]")
        self._modules = _cross_attention_modules(unet)
        cross = [one for one in attention_projections(unet) if one.cross]
        self._factors = sorted({one.factor for one in cross})
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
        """Text rows of which keys and values were computed so far, summed over modules."""
        return self._context.projections

    @contextmanager
    def installed(self) -> Generator[None, None, None]:
        """Put the processors in place; the UNet's own come back at the end.

        Raises:
            StageError: Other processors than the stock ones are in place.
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
        """Let the rows after the first ``unconditional`` ones look only where their masks say.

        Args:
            regions: Of the rows with a condition, in order; None for plain attention.
            unconditional: Leading rows that stay plain, the unconditional half of guidance.
            latent: Height and width of the latents.

        Raises:
            StageError: Not within :meth:`installed`, or something replaced the processors.
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
        """Compute keys and values of each module once, for prompts that do not change.

        That is done at once, with what acts through ``to_k`` and ``to_v`` at that time. The
        ``encoder_hidden_states`` of the UNet are then not read, but must have b rows. Adapters
        that differ from row to row change the keys of one prompt in several ways: then give one
        row of ``hidden`` per row of the batch, and ``index = arange(b)``.

        Args:
            hidden: Encoded distinct prompts.
            index: Which of them each row of the batch has, the unconditional rows included.

        Raises:
            StageError: Not within :meth:`installed`, or gradients are on.
            ConfigError: An index is out of range.
        """
        self._require_installed()
        if index.numel() == 0 or int(index.min()) < 0 or int(index.max()) >= len(hidden):
            raise ConfigError(
                f"constant text of {len(hidden)} prompts: got indices {index.tolist()}, "
                f"expected at least one, each in 0..{len(hidden) - 1}"
            )
        if torch.is_grad_enabled():
            raise StageError(
                "constant text is for sampling, but gradients are on; use torch.no_grad(), or "
                "leave constant_text() for training"
            )
        before = self._context.text
        self._context.text = TextKeyValueCache(hidden, index, self._modules)
        self._context.projections += self._context.text.projections
        try:
            yield
        finally:
            self._context.text = before

    def alphas(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the learned shares, ``<module>.alpha.weight`` and ``.bias``."""
        named: dict[str, nn.Parameter] = {}
        for name, alpha in self._alphas.items():
            for key, parameter in alpha.named_parameters():
                named[f"{name}.alpha.{key}"] = parameter
        return named

    def alpha_state(self) -> dict[str, Tensor]:
        """Return a copy of :meth:`alphas` on the CPU."""
        return {key: value.detach().cpu().clone() for key, value in self.alphas().items()}

    def load_alphas(self, state: Mapping[str, Tensor]) -> None:
        """Take over the values of :meth:`alpha_state`.

        Raises:
            AdapterMismatchError: Keys or shapes differ, or a value is not finite; nothing has
                changed then.
        """
        alphas = self.alphas()
        if state.keys() != alphas.keys():
            odd = sorted(state.keys() ^ alphas.keys())
            raise AdapterMismatchError(
                f"alpha layers: got {len(state)} tensors, expected {len(alphas)}; only on one "
                f"side: {', '.join(odd[:4])}"
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
        """Make the masks of all levels ahead, so that a compiled UNet only ever reads them."""
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
                    "attention; enter installed() first, and use no attention slicing or xFormers"
                )


def alpha_module_names(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the attention modules that an alpha state belongs to, in its order.

    Raises:
        AdapterMismatchError: A key is no ``<module>.alpha.weight`` or ``.bias``.
    """
    owners: dict[str, None] = {}
    for key in state:
        owner = key.removesuffix(_WEIGHT).removesuffix(_BIAS)
        if owner == key:
            raise AdapterMismatchError(
                f"alpha layers: got key {key!r}, expected <module>{_WEIGHT} or <module>{_BIAS}"
            )
        owners[owner] = None
    return tuple(owners)


def _cross_attention_modules(unet: nn.Module) -> dict[str, Any]:
    prepare_torchvision()
    from diffusers.models.attention_processor import Attention

    modules = {
        name: module
        for name, module in unet.named_modules()
        # By its kind, not by its name: attn1 too attends to text where a block has no
        # self-attention (only_cross_attention).
        if isinstance(module, Attention) and module.is_cross_attention
    }
    for name, attn in modules.items():
        _require_stock(name, attn, ConfigError)
    return modules


def _require_stock(name: str, attn: Any, error: type[Exception]) -> None:
    """Refuse attention that does more than project, attend and project."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    if type(attn.processor) is not AttnProcessor2_0:
        raise error(
            f"{name}: its processor is {type(attn.processor).__name__}, expected diffusers' "
            "AttnProcessor2_0 (no slicing, no xFormers, no other region attention)"
        )
    more = [
        part
        for part in ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
        if getattr(attn, part, None)
    ]
    if more or attn.residual_connection or attn.rescale_output_factor != 1:
        raise error(f"{name}: region attention does not know its {', '.join(more) or 'output'}")


def _require_module(name: str, modules: Mapping[str, Any]) -> Any:
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=1)
        raise ConfigError(
            f"alpha module {name!r}: no cross-attention module of that name"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return modules[name]


def _new_alpha(attn: Any, bias: float) -> nn.Linear:
    """Return a layer (c -> 1) that gives sigmoid(bias) for every input, in float32."""
    device = next(attn.parameters()).device
    # Without the random start of a linear layer, which would move the process' own generator.
    alpha: Any = nn.utils.skip_init(
        nn.Linear, attn.query_dim, 1, device=device, dtype=torch.float32
    )
    nn.init.zeros_(alpha.weight)
    nn.init.constant_(alpha.bias, bias)
    return alpha
