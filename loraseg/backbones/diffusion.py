"""The frozen text-to-image model: encodes text and images, decodes latents, gives training targets.

One class covers Stable Diffusion 1, 2 and XL and the miniature. It uses the modules of diffusers
and transformers and computes the same values as the stock pipelines.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from loraseg.backbones.pipeline_layout import PIPELINE_KINDS, PipelineKind
from loraseg.backbones.pipeline_source import load_parts, resolve_pipeline
from loraseg.errors import ConfigError, DatasetError, IntegrityError
from loraseg.tensor_types import Float, Int, Tensor, UInt8

__all__ = [
    "PREDICTION_TYPES",
    "DiffusionBase",
    "TextEncoding",
    "get_alphas_cumprod",
    "load_diffusion",
]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, slots=True, eq=False)
class TextEncoding:
    """Encodings of n prompts, as the UNet reads them.

    Attributes:
        hidden: (n, l, d), one vector per token, special and padding tokens included.
        pooled: (n, p), one vector per prompt; None unless the model is SDXL.
    """

    hidden: Float[Tensor, "n l d"]
    pooled: Float[Tensor, "n p"] | None = None

    def select(self, index: Sequence[int]) -> "TextEncoding":
        """Return the rows ``index``, in that order; rows can be repeated."""
        rows = torch.as_tensor(list(index), dtype=torch.long, device=self.hidden.device)
        pooled = None if self.pooled is None else self.pooled[rows]
        return TextEncoding(self.hidden[rows], pooled)


@dataclass(slots=True)
class _CallCounter:
    prompts: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class DiffusionBase:
    """The parts of a Stable Diffusion pipeline, in evaluation mode.

    Attributes:
        name: The spec that it was loaded from.
        digest: Sha256 (hex) of its files (``pipeline_layout.pipeline_digest``).
        kind: ``sd``, or ``sdxl`` with two text encoders and size conditions.
        unet: diffusers' ``UNet2DConditionModel``.
        vae: diffusers' ``AutoencoderKL``.
        tokenizers: One tokenizer, two for SDXL.
        text_encoders: One text encoder, two for SDXL.
        scheduler: The scheduler of the pipeline.
        alphas_cumprod: (T,) float32 on the CPU: the cumulative product of 1 - beta_t over the
            training timesteps (DDPM, arXiv 2006.11239, section 2).
        zero_unconditional: Whether the unconditional encoding is zeros instead of an empty prompt.

    Raises:
        ConfigError: The prediction type is unknown.
        IntegrityError: The channels of UNet and VAE differ, or the UNet has no square size.
    """

    name: str
    digest: str
    kind: PipelineKind
    unet: Any
    vae: Any
    tokenizers: tuple[Any, ...]
    text_encoders: tuple[Any, ...]
    scheduler: Any
    alphas_cumprod: Float[Tensor, " t"]
    zero_unconditional: bool = False
    _calls: _CallCounter = field(default_factory=_CallCounter, init=False, repr=False)

    def __post_init__(self) -> None:
        for part in (self.unet, self.vae, *self.text_encoders):
            part.eval()
        if self.prediction_type not in PREDICTION_TYPES:
            raise ConfigError(
                f"pipeline {self.name!r}: prediction_type {self.prediction_type!r}, "
                f"expected one of {', '.join(PREDICTION_TYPES)}"
            )
        channels = (self.unet.config.in_channels, self.unet.config.out_channels)
        if channels != (self.latent_channels, self.latent_channels):
            raise IntegrityError(
                f"pipeline {self.name!r}: the UNet has {channels} input and output channels, the "
                f"latents of the VAE have {self.latent_channels}"
            )
        if not isinstance(self.unet.config.sample_size, int):
            raise IntegrityError(
                f"pipeline {self.name!r}: unet sample_size {self.unet.config.sample_size}, "
                f"expected one integer"
            )

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, name: str, digest: str) -> "DiffusionBase":
        """Wrap the parts of a ``StableDiffusion(XL)Pipeline``, without copying them.

        Raises:
            ConfigError: The pipeline is of another class, or its scheduler has no noise schedule.
        """
        class_name = type(pipeline).__name__
        if class_name not in PIPELINE_KINDS:
            raise ConfigError(
                f"pipeline {name!r} is a {class_name}, expected {' or '.join(PIPELINE_KINDS)}"
            )
        kind = PIPELINE_KINDS[class_name]
        second = kind == "sdxl"
        return cls(
            name=name,
            digest=digest,
            kind=kind,
            unet=pipeline.unet,
            vae=pipeline.vae,
            tokenizers=(pipeline.tokenizer, *((pipeline.tokenizer_2,) if second else ())),
            text_encoders=(pipeline.text_encoder, *((pipeline.text_encoder_2,) if second else ())),
            scheduler=pipeline.scheduler,
            alphas_cumprod=get_alphas_cumprod(pipeline.scheduler),
            zero_unconditional=second and bool(pipeline.config.force_zeros_for_empty_prompt),
        )

    @property
    def device(self) -> torch.device:
        """Device of the UNet."""
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the UNet."""
        return self.unet.dtype

    @property
    def prediction_type(self) -> str:
        """The quantity that the UNet predicts: ``epsilon``, ``v_prediction`` or ``sample``."""
        return self.scheduler.config.prediction_type

    @property
    def latent_channels(self) -> int:
        """Number of channels of the latents."""
        return self.vae.config.latent_channels

    @property
    def latent_factor(self) -> int:
        """Side of an image divided by the side of its latents."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def text_length(self) -> int:
        """Number of tokens of an encoded prompt, padding included."""
        return self.tokenizers[0].model_max_length

    @property
    def image_size(self) -> int:
        """Side of the images that the model was trained on, pixels."""
        return self.unet.config.sample_size * self.latent_factor

    @property
    def encoded_prompts(self) -> int:
        """Number of prompts encoded so far."""
        return self._calls.prompts

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "DiffusionBase":
        """Move all parts in place and return this object.

        The VAE of SDXL stays in float32 if its config has ``force_upcast`` (NaN in float16).
        """
        full_precision = self.kind == "sdxl" and self.vae.config.force_upcast
        # nn.Module.to, because that of diffusers warns at every cast about modules to keep in
        # float32, which these classes do not have.
        for part in (self.unet, *self.text_encoders):
            nn.Module.to(part, device=device, dtype=dtype)
        nn.Module.to(self.vae, device=device, dtype=torch.float32 if full_precision else dtype)
        return self

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> TextEncoding:
        """Encode prompts like the stock pipelines, truncated to :attr:`text_length` tokens.

        Raises:
            DatasetError: There are no prompts.
        """
        if not prompts:
            raise DatasetError("encode_text: got no prompts, expected at least one")
        self._calls.prompts += len(prompts)
        ids = [self._token_ids(index, prompts) for index in range(len(self.tokenizers))]
        if self.kind == "sd":
            hidden = self.text_encoders[0](ids[0])[0]
            return TextEncoding(hidden)
        outputs = [
            encoder(rows, output_hidden_states=True)
            for encoder, rows in zip(self.text_encoders, ids, strict=True)
        ]
        # SDXL uses the penultimate layers, and the projected text of the second encoder.
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return TextEncoding(hidden, outputs[1].text_embeds)

    def encode_unconditional(self) -> TextEncoding:
        """Return the unconditional encoding of classifier-free guidance, one row."""
        empty = self.encode_text([""])
        if not self.zero_unconditional or empty.pooled is None:
            return empty
        return TextEncoding(torch.zeros_like(empty.hidden), torch.zeros_like(empty.pooled))

    @torch.no_grad()
    def encode_images(
        self, images: UInt8[Tensor, "b h w 3"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "b c y x"]:
        """Return scaled latents of RGB images whose sides are multiples of :attr:`latent_factor`.

        Args:
            images: Values in [0, 255], on any device.
            generator: Generator to sample the posterior with; None for its mode.

        Raises:
            DatasetError: A side is not a multiple of the factor.
        """
        height, width = images.shape[1:3]
        if not height or not width or height % self.latent_factor or width % self.latent_factor:
            raise DatasetError(
                f"encode_images: images of {height} x {width}, expected sides that are multiples "
                f"of {self.latent_factor}"
            )
        pixels = images.to(self.device).permute(0, 3, 1, 2).to(torch.float32) / 255
        posterior = self.vae.encode((2 * pixels - 1).to(self.vae.dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        shift, scale = self._latent_statistics(latents)
        return (latents - shift) * scale

    @torch.no_grad()
    def decode_latents(
        self, latents: Float[Tensor, "b c y x"], *, slice_size: int = 4
    ) -> UInt8[Tensor, "b h w 3"]:
        """Return the RGB images of scaled latents, decoded ``slice_size`` at a time.

        Raises:
            ConfigError: ``slice_size`` is below 1.
        """
        if slice_size < 1:
            raise ConfigError(f"decode_latents: slice_size {slice_size}, expected at least 1")
        factor = self.latent_factor
        height, width = latents.shape[2] * factor, latents.shape[3] * factor
        images = torch.empty(
            (len(latents), height, width, 3), dtype=torch.uint8, device=latents.device
        )
        for start in range(0, len(latents), slice_size):
            batch = latents[start : start + slice_size].to(self.vae.dtype)
            shift, scale = self._latent_statistics(batch)
            pixels = self.vae.decode(batch / scale + shift, return_dict=False)[0]
            scaled = (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float() * 255
            images[start : start + slice_size] = scaled.round().to(torch.uint8)
        return images

    def added_conditions(
        self,
        text: TextEncoding,
        size: tuple[int, int],
        crop: tuple[int, int] = (0, 0),
        target: tuple[int, int] | None = None,
    ) -> dict[str, Tensor] | None:
        """Return SDXL's ``added_cond_kwargs`` for the rows of ``text``; None for other models.

        Args:
            text: Encodings of n prompts.
            size: Height and width of the image before any resizing.
            crop: Top and left of the crop.
            target: Height and width of the generated image; by default ``size``.

        Returns:
            ``text_embeds`` (n, p) and ``time_ids`` (n, 6).
        """
        if text.pooled is None:
            return None
        ids = torch.tensor([[*size, *crop, *(target or size)]], dtype=text.hidden.dtype)
        rows = ids.to(text.hidden.device).repeat(len(text.hidden), 1)
        return {"text_embeds": text.pooled, "time_ids": rows}

    def add_noise(
        self,
        latents: Float[Tensor, "b c y x"],
        noise: Float[Tensor, "b c y x"],
        timesteps: Int[Tensor, " b"],
    ) -> Float[Tensor, "b c y x"]:
        """Return ``sqrt(a) * latents + sqrt(1 - a) * noise`` with a = alphas_cumprod[timesteps].

        DDPM (arXiv 2006.11239), eq. 4. Unlike the schedulers' ``add_noise`` it does not depend on
        the scheduler, some of which (Euler) work on sigmas.
        """
        signal_scale, noise_scale = self._signal_and_noise_scales(latents, timesteps)
        return signal_scale * latents + noise_scale * noise

    def target(
        self,
        latents: Float[Tensor, "b c y x"],
        noise: Float[Tensor, "b c y x"],
        timesteps: Int[Tensor, " b"],
    ) -> Float[Tensor, "b c y x"]:
        """Return the training target of the UNet for :attr:`prediction_type`.

        ``epsilon``: the noise; ``sample``: the latents; ``v_prediction``:
        ``sqrt(a) * noise - sqrt(1 - a) * latents`` (Salimans and Ho, arXiv 2202.00512, appendix D).
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal_scale, noise_scale = self._signal_and_noise_scales(latents, timesteps)
        return signal_scale * noise - noise_scale * latents

    def _signal_and_noise_scales(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt().to(latents), (1 - alphas).sqrt().to(latents)

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        config = self.vae.config
        mean, deviation = config.latents_mean, config.latents_std
        if self.kind == "sd" or mean is None or deviation is None:
            return 0.0, config.scaling_factor
        return (
            torch.tensor(mean).view(1, -1, 1, 1).to(like),
            config.scaling_factor / torch.tensor(deviation).view(1, -1, 1, 1).to(like),
        )

    def _token_ids(self, index: int, prompts: Sequence[str]) -> Int[Tensor, "n l"]:
        tokenizer = self.tokenizers[index]
        rows = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return rows.input_ids.to(self.text_encoders[index].device)


def get_alphas_cumprod(scheduler: Any) -> Float[Tensor, " t"]:
    """Return a scheduler's ``alphas_cumprod`` as float32 on the CPU.

    Raises:
        ConfigError: The scheduler has none, like those of flow matching.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise ConfigError(
            f"scheduler {type(scheduler).__name__} has no alphas_cumprod; expected a scheduler of "
            f"variance-preserving diffusion, such as PNDMScheduler"
        )
    return torch.as_tensor(alphas).detach().to("cpu", torch.float32).clone()


def load_diffusion(
    spec: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusionBase:
    """Load a text-to-image model from a diffusers folder with safetensors.

    Args:
        spec: ``miniature``, a folder, ``file:///folder``, ``s3://bucket/prefix`` or
            ``hf:org/name[@revision]``. Only the last downloads from a hub. A suffix
            ``#sha256=<hex>`` pins the digest of the files.
        device: Device of the parts.
        dtype: Dtype of the parts, see :meth:`DiffusionBase.to`.

    Raises:
        ConfigError: The folder does not exist, or the spec is malformed.
        IntegrityError: A part is missing, a pickle, of an unexpected class, or its weights do not
            fit its config; or the digest differs from the pinned one.
        StoreError: The store cannot be read.
    """
    source = resolve_pipeline(spec)
    parts = load_parts(source, dtype)
    if source.kind == "sd" and parts["scheduler"].config.get("steps_offset", 1) != 1:
        # Like the stock SD pipeline, which overrides old configs; that of SDXL does not.
        parts["scheduler"].register_to_config(steps_offset=1)
    base = DiffusionBase(
        name=source.name,
        digest=source.digest,
        kind=source.kind,
        unet=parts["unet"],
        vae=parts["vae"],
        tokenizers=tuple(parts[name] for name in ("tokenizer", "tokenizer_2") if name in parts),
        text_encoders=tuple(
            parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts
        ),
        scheduler=parts["scheduler"],
        alphas_cumprod=get_alphas_cumprod(parts["scheduler"]),
        zero_unconditional=source.zero_unconditional,
    )
    return base.to(device, dtype)
