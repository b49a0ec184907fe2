"""Masks in, images that follow them out (methods b.5, d.1).

K homologous images of a mask share its prompt, its regions and its text; each has noise of its own
that depends on the seed, the mask and k alone. So an image is the same alone, in any batch, in any
order and on any worker.
"""

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from loraseg import config as configs
from loraseg.adapters.attention_mix import AttentionMix
from loraseg.adapters.packed import PackedAdapter
from loraseg.backbones.diffusion import DiffusionBase
from loraseg.errors import AdapterMismatchError, ConfigError
from loraseg.fuse import AdapterBank, Mix, fuse, merged
from loraseg.fuse.bank import check_fits
from loraseg.revision import code_revision
from loraseg.synth.conditioning import Condition, Conditioner
from loraseg.synth.generator_adapter import (
    GeneratorAdapter,
    check_base,
    find_attention_mix,
    warn_untested_combination,
)
from loraseg.synth.lineage import Lineage, LineageAdapter, generator_digest, mask_digest, pair_id
from loraseg.synth.region_attention import RegionControl, alpha_module_names
from loraseg.synth.regions import Regions
from loraseg.synth.sampling import (
    DTYPES,
    NoiseStream,
    PromptCache,
    SamplingBatch,
    SamplingConfig,
    denoise,
)
from loraseg.synth.schedulers import scheduler_name
from loraseg.synth.sizes import output_size, resize_mask, size_multiple
from loraseg.tensor_types import Float, Tensor, UInt8, ndarray

__all__ = ["GeneratedImage", "Generator"]

logger = logging.getLogger(__name__)

_DEFAULT_CONFIG = SamplingConfig()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class GeneratedImage:
    """One image and its label.

    Attributes:
        mask_name: What the caller calls the mask.
        image: RGB.
        label: Class ids at the image's size; 255 as in the mask, and where a class was dropped.
        latents: What the image was decoded from, on the CPU.
        condition: What the generator was told.
        lineage: Where all this comes from; mask id, k, seed and prompt are there.
    """

    mask_name: str
    image: UInt8[ndarray, "h w 3"]
    label: UInt8[ndarray, "h w"]
    latents: Float[Tensor, "c y x"]
    condition: Condition
    lineage: Lineage


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _ImageRequest:
    """One image that is to be made."""

    mask_name: str
    mask_id: str
    k: int
    condition: Condition
    conditioner: Conditioner
    heads: tuple[float, ...]


class Generator:
    """A text-to-image model with adapters, told by masks what to draw. One thread at a time."""

    def __init__(
        self,
        base: DiffusionBase,
        conditioner: Conditioner,
        *,
        adapters: Sequence[GeneratorAdapter] = (),
        heads: Sequence[PackedAdapter] = (),
        config: SamplingConfig = _DEFAULT_CONFIG,
    ) -> None:
        """Check that all fits; nothing in the base changes yet.

        Args:
            base: In the precision of the config.
            conditioner: Made with the tokenizers of the base.
            adapters: They act on every image.
            heads: They act on each image with weights of its own, see :meth:`generate`.
            config: How to sample.

        Raises:
            AdapterMismatchError: An adapter was trained on another base or does not fit, or
                several have fusion layers.
            ConfigError: The base has another number type than the config says.
        """
        if base.dtype != DTYPES[config.precision]:
            raise ConfigError(
                f"base {base.name!r} is in {base.dtype}, the config says {config.precision}; "
                "load the base in that type"
            )
        everyone = [*adapters, *(GeneratorAdapter(adapter=head) for head in heads)]
        check_base(everyone, base.name, base.digest)
        warn_untested_combination(adapters)
        self.base = base
        self.conditioner = conditioner
        self.config = config
        self._adapters = tuple(adapters)
        self._heads = tuple(heads)
        self._mix = self._mix_with_heads(())
        self._bank = AdapterBank(base.unet)
        linears = {n: m for n, m in base.unet.named_modules() if isinstance(m, torch.nn.Linear)}
        for one in everyone:
            check_fits(one.adapter, linears)
        fusion = find_attention_mix(adapters)
        self._control = _region_control(base, fusion)
        # An adapter's own digest holds its fusion layers only if both came from files.
        self._attention_mix_digest = fusion and fusion.digest
        self._prompts = PromptCache(base)
        self._conditioners = {conditioner.config.template: conditioner}

    @property
    def digest(self) -> str:
        """The sha256 (hex) of all that decides what a mask and a seed become."""
        return self._digest_of(self.conditioner)

    @property
    def projections_computed(self) -> int:
        """Text rows whose keys and values were computed so far, summed over modules."""
        return self._control.projections_computed

    def generate(
        self,
        masks: Sequence[tuple[str, ndarray]],
        *,
        templates: Sequence[str] | None = None,
        heads: Float[ndarray, "n k heads"] | None = None,
        first: int = 0,
    ) -> Iterator[GeneratedImage]:
        """Make images ``first`` to ``config.images - 1`` of masks, ``config.batch`` at a time.

        They come in order. Image k is the same whatever ``first`` is, so that masks that have
        images already can get more. Between two images the base is as it was: adapters act and
        processors stand in its UNet only while a batch runs.

        Args:
            masks: (name, class ids or 255 as uint8 (h, w)). Resized to ``config.size`` (nearest)
                if there is one, else of a size that the generator can make.
            templates: A prompt template for each mask, such as "{classes} in heavy fog"; None for
                the conditioner's.
            heads: Weights of the heads for each image that is made of each mask.
            first: 0 to ``config.images - 1``.

        Raises:
            ConfigError: At once, for a wrong size or ``first``, and later for a template.
            DatasetError: At once for a mask that the generator cannot make images for as large
                as it is, and when its turn comes for one that makes no prompt.
            AdapterMismatchError: At once, if ``heads`` are not the weights of the heads.
        """
        step = size_multiple(self.base)
        sizes = [output_size(m, self.config.size, step, f"mask {name!r}") for name, m in masks]
        if templates is not None and len(templates) != len(masks):
            raise ConfigError(f"templates: got {len(templates)}, expected one for each mask")
        if not 0 <= first < self.config.images:
            raise ConfigError(
                f"first: got {first}, expected 0 to {self.config.images - 1}: {self.config.images} "
                "images of each mask are wanted in all"
            )
        expected = (len(masks), self.config.images - first, len(self._heads))
        if (None if heads is None else heads.shape) != (expected if self._heads else None):
            raise AdapterMismatchError(
                f"head weights: got {None if heads is None else heads.shape}, expected "
                f"{expected if self._heads else None}: masks, images, heads"
            )
        return self._generate(masks, sizes, templates, heads, first)

    def _generate(
        self,
        masks: Sequence[tuple[str, ndarray]],
        sizes: Sequence[tuple[int, int]],
        templates: Sequence[str] | None,
        heads: ndarray | None,
        first: int,
    ) -> Iterator[GeneratedImage]:
        def wishes() -> Iterator[_ImageRequest]:
            for index, (name, mask) in enumerate(masks):
                conditioner = self._conditioner_for(templates[index] if templates else None)
                condition = conditioner(resize_mask(mask, sizes[index]), where=f"mask {name!r}")
                for k in range(first, self.config.images):
                    own = () if heads is None else tuple(map(float, heads[index, k - first]))
                    yield _ImageRequest(name, mask_digest(mask), k, condition, conditioner, own)

        for group in _batches(wishes(), self.config.batch):
            yield from self._sample_batch(group)

    def _sample_batch(self, requests: Sequence[_ImageRequest]) -> list[GeneratedImage]:
        started = time.perf_counter()
        base, config = self.base, self.config
        height, width = requests[0].condition.regions.shape
        shape = (base.latent_channels, height // base.latent_factor, width // base.latent_factor)
        streams = [NoiseStream(config.seed, wish.mask_id, wish.k) for wish in requests]
        prompts = list(dict.fromkeys(wish.condition.prompt for wish in requests))
        conditions = [wish.condition for wish in requests]
        batch = SamplingBatch(
            noise=torch.stack([stream.initial(shape) for stream in streams]),
            text=self._prompts.encode(prompts),
            prompts=tuple(prompts.index(condition.prompt) for condition in conditions),
            unconditional=self._prompts.unconditional if config.guidance > 1 else None,
            generators=[stream.generator for stream in streams],
            regions=Regions.stack(conditions, base.device) if config.regions else None,
            shared_text=not self._heads,
        )
        with self._adapters_applied(requests):
            latents = denoise(base, self._control, batch, config)
        images = base.decode_latents(latents, slice_size=config.decode_slice).cpu().numpy()
        latents = latents.cpu()
        logger.info("%d images in %.2f s", len(requests), time.perf_counter() - started)
        return [
            GeneratedImage(
                mask_name=wish.mask_name,
                image=images[index],
                label=wish.condition.label,
                latents=latents[index],
                condition=wish.condition,
                lineage=self._lineage(wish, streams[index].seed),
            )
            for index, wish in enumerate(requests)
        ]

    def _adapters_applied(self, requests: Sequence[_ImageRequest]) -> AbstractContextManager[None]:
        """Let the adapters act: in the weights if all images share one mix, else beside them."""
        if not self._heads:
            return merged(self.base.unet, self._mix)
        mixes = [self._mix_with_heads(wish.heads) for wish in requests]
        # The unconditional half comes first and runs with the same adapters.
        return self._bank.use(mixes * (2 if self.config.guidance > 1 else 1))

    def _mix_with_heads(self, heads: Sequence[float]) -> Mix | None:
        """Return the adapters and, with weights of their own, the heads; None for the bare base."""
        parts = [(one.adapter, one.weight) for one in self._adapters]
        parts += [(h, w) for h, w in zip(self._heads, heads, strict=False) if w]
        return fuse(*map(list, zip(*parts, strict=True))) if parts else None

    def _conditioner_for(self, template: str | None) -> Conditioner:
        if template is None:
            return self.conditioner
        if template not in self._conditioners:
            own = self.conditioner
            self._conditioners[template] = Conditioner(
                self.base.tokenizers,
                own.label_space,
                dataclasses.replace(own.config, template=template),
            )
        return self._conditioners[template]

    def _digest_of(self, conditioner: Conditioner) -> str:
        config = self.config
        return generator_digest(
            {
                "base": self.base.digest,
                "adapters": [[one.adapter.digest, float(one.weight)] for one in self._adapters],
                "heads": [head.digest for head in self._heads],
                **({"fusion": self._attention_mix_digest} if self._attention_mix_digest else {}),
                "steps": config.steps,
                "guidance": float(config.guidance),
                "scheduler": scheduler_name(config.scheduler),
                "size": config.size,
                "precision": config.precision,
                "regions": config.regions,
                "classes": conditioner.label_space.names,
                "conditioning": configs.to_dict(conditioner.config),
            }
        )

    def _lineage(self, request: _ImageRequest, seed: int) -> Lineage:
        generator = self._digest_of(request.conditioner)
        height, width = request.condition.label.shape
        names = request.conditioner.label_space.names
        return Lineage(
            pair_id=pair_id(request.mask_id, request.k, generator, self.config.seed, request.heads),
            mask_id=request.mask_id,
            k=request.k,
            seed=seed,
            prompt=request.condition.prompt,
            dropped=tuple(names[index] for index in request.condition.dropped),
            size=(height, width),
            base={"name": self.base.name, "digest": self.base.digest},
            generator=generator,
            adapters=tuple(
                LineageAdapter(one.adapter.name, one.adapter.digest, float(one.weight))
                for one in self._adapters
            ),
            heads=tuple(
                LineageAdapter(head.name, head.digest, weight)
                for head, weight in zip(self._heads, request.heads, strict=True)
            ),
            sampling=configs.to_dict(self.config),
            conditioning=configs.to_dict(request.conditioner.config),
            code_revision=code_revision(),
        )


def _region_control(base: DiffusionBase, attention_mix: AttentionMix | None) -> RegionControl:
    if attention_mix is None:
        return RegionControl(base.unet)
    owners = alpha_module_names(attention_mix.tensors)
    control = RegionControl(base.unet, alpha_modules=owners, mode=attention_mix.mode)
    control.load_alphas(attention_mix.tensors)
    return control


def _batches(requests: Iterable[_ImageRequest], limit: int) -> Iterator[list[_ImageRequest]]:
    """Cut into runs of at most ``limit`` images of one size."""
    group: list[_ImageRequest] = []
    for wish in requests:
        changed = group and wish.condition.label.shape != group[0].condition.label.shape
        if changed or len(group) == limit:
            yield group
            group = []
        group.append(wish)
    if group:
        yield group
