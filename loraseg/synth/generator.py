"""The generator: images that follow given masks.

The K homologous images of a mask (MatchMask, CVPR 2026, "Relative Filtering") share its prompt,
regions and text; the noise of each depends only on the seed, the mask and k. An image is therefore
the same in any batch, in any order and on any worker.
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
        mask_name: The caller's name of the mask.
        image: RGB.
        label: Class ids at the image's size; 255 where the mask is ignored or a class was dropped.
        latents: The latents that the image was decoded from, on the CPU.
        condition: The condition made from the mask.
        lineage: Origin of the pair, with mask id, k, seed and prompt.
    """

    mask_name: str
    image: UInt8[ndarray, "h w 3"]
    label: UInt8[ndarray, "h w"]
    latents: Float[Tensor, "c y x"]
    condition: Condition
    lineage: Lineage


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _ImageRequest:
    """One image to generate."""

    mask_name: str
    mask_id: str
    k: int
    condition: Condition
    conditioner: Conditioner
    heads: tuple[float, ...]


class Generator:
    """A text-to-image model with adapters that generates images from masks. Not thread-safe."""

    def __init__(
        self,
        base: DiffusionBase,
        conditioner: Conditioner,
        *,
        adapters: Sequence[GeneratorAdapter] = (),
        heads: Sequence[PackedAdapter] = (),
        config: SamplingConfig = _DEFAULT_CONFIG,
    ) -> None:
        """Check that adapters and base fit; nothing in the base changes yet.

        Args:
            base: The base, in the precision of the config.
            conditioner: Conditioner with the tokenizers of the base.
            adapters: Adapters used for every image.
            heads: Adapters whose weights differ between images, see :meth:`generate`.
            config: Settings of sampling.

        Raises:
            AdapterMismatchError: An adapter was trained on another base or does not fit, or
                several have an attention mix.
            ConfigError: The dtype of the base differs from the precision of the config.
        """
        if base.dtype != DTYPES[config.precision]:
            raise ConfigError(
                f"base {base.name!r} is in {base.dtype}, the config says {config.precision}; "
                "load the base in that precision"
            )
        all_adapters = [*adapters, *(GeneratorAdapter(adapter=head) for head in heads)]
        check_base(all_adapters, base.name, base.digest)
        warn_untested_combination(adapters)
        self.base = base
        self.conditioner = conditioner
        self.config = config
        self._adapters = tuple(adapters)
        self._heads = tuple(heads)
        self._mix = self._mix_with_heads(())
        self._bank = AdapterBank(base.unet)
        linears = {n: m for n, m in base.unet.named_modules() if isinstance(m, torch.nn.Linear)}
        for generator_adapter in all_adapters:
            check_fits(generator_adapter.adapter, linears)
        attention_mix = find_attention_mix(adapters)
        self._control = _region_control(base, attention_mix)
        # The digest of an adapter covers its attention mix only if both were read from files.
        self._attention_mix_digest = attention_mix and attention_mix.digest
        self._prompts = PromptCache(base)
        self._conditioners = {conditioner.config.template: conditioner}

    @property
    def digest(self) -> str:
        """Sha256 (hex) of everything that, with a mask and a seed, determines an image."""
        return self._digest_of(self.conditioner)

    @property
    def projections_computed(self) -> int:
        """Number of text rows whose keys and values were computed, summed over modules."""
        return self._control.projections_computed

    def generate(
        self,
        masks: Sequence[tuple[str, ndarray]],
        *,
        templates: Sequence[str] | None = None,
        heads: Float[ndarray, "n k heads"] | None = None,
        first: int = 0,
    ) -> Iterator[GeneratedImage]:
        """Generate images ``first`` to ``config.images - 1`` of each mask, in order.

        ``config.batch`` images are sampled together. Image k does not depend on ``first``, so
        that masks that already have images can get more. Adapters and processors are active in
        the UNet only while a batch runs; between two images the base is unchanged.

        Args:
            masks: (name, mask) pairs; a mask is uint8 (h, w), class ids or 255. It is resized
                (nearest) to ``config.size``; without that, its sides must be multiples of
                :func:`~loraseg.synth.sizes.size_multiple`.
            templates: A prompt template for each mask, such as "{classes} in heavy fog"; None for
                the conditioner's.
            heads: Weights (n masks, k images, heads) of the heads for each generated image.
            first: Index of the first image of each mask, 0 to ``config.images - 1``.

        Raises:
            ConfigError: In the call for a wrong size or ``first``; during iteration for a template.
            DatasetError: In the call for a mask whose size is not supported; during iteration for
                a mask that gives no prompt.
            AdapterMismatchError: In the call, if ``heads`` has the wrong shape.
        """
        multiple = size_multiple(self.base)
        sizes = [output_size(m, self.config.size, multiple, f"mask {name!r}") for name, m in masks]
        if templates is not None and len(templates) != len(masks):
            raise ConfigError(f"templates: got {len(templates)}, expected one for each mask")
        if not 0 <= first < self.config.images:
            raise ConfigError(
                f"first: got {first}, expected 0 to {self.config.images - 1}, for "
                f"{self.config.images} images of each mask"
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
        def requests() -> Iterator[_ImageRequest]:
            for index, (name, mask) in enumerate(masks):
                conditioner = self._conditioner_for(templates[index] if templates else None)
                condition = conditioner(resize_mask(mask, sizes[index]), where=f"mask {name!r}")
                for k in range(first, self.config.images):
                    weights = () if heads is None else tuple(map(float, heads[index, k - first]))
                    yield _ImageRequest(name, mask_digest(mask), k, condition, conditioner, weights)

        for group in _batches(requests(), self.config.batch):
            yield from self._sample_batch(group)

    def _sample_batch(self, requests: Sequence[_ImageRequest]) -> list[GeneratedImage]:
        started = time.perf_counter()
        base, config = self.base, self.config
        height, width = requests[0].condition.regions.shape
        shape = (base.latent_channels, height // base.latent_factor, width // base.latent_factor)
        streams = [NoiseStream(config.seed, request.mask_id, request.k) for request in requests]
        prompts = list(dict.fromkeys(request.condition.prompt for request in requests))
        conditions = [request.condition for request in requests]
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
                mask_name=request.mask_name,
                image=images[index],
                label=request.condition.label,
                latents=latents[index],
                condition=request.condition,
                lineage=self._lineage(request, streams[index].seed),
            )
            for index, request in enumerate(requests)
        ]

    def _adapters_applied(self, requests: Sequence[_ImageRequest]) -> AbstractContextManager[None]:
        """Return a context with the adapters applied: merged if all images share one mix."""
        if not self._heads:
            return merged(self.base.unet, self._mix)
        mixes = [self._mix_with_heads(request.heads) for request in requests]
        # The unconditional half comes first and uses the same adapters.
        return self._bank.use(mixes * (2 if self.config.guidance > 1 else 1))

    def _mix_with_heads(self, heads: Sequence[float]) -> Mix | None:
        """Return the mix of the adapters and the weighted heads; None if it is empty."""
        parts = [(a.adapter, a.weight) for a in self._adapters]
        parts += [(h, w) for h, w in zip(self._heads, heads, strict=False) if w]
        return fuse(*map(list, zip(*parts, strict=True))) if parts else None

    def _conditioner_for(self, template: str | None) -> Conditioner:
        if template is None:
            return self.conditioner
        if template not in self._conditioners:
            default = self.conditioner
            self._conditioners[template] = Conditioner(
                self.base.tokenizers,
                default.label_space,
                dataclasses.replace(default.config, template=template),
            )
        return self._conditioners[template]

    def _digest_of(self, conditioner: Conditioner) -> str:
        config = self.config
        return generator_digest(
            {
                "base": self.base.digest,
                "adapters": [[a.adapter.digest, float(a.weight)] for a in self._adapters],
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
                LineageAdapter(a.adapter.name, a.adapter.digest, float(a.weight))
                for a in self._adapters
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
    names = alpha_module_names(attention_mix.tensors)
    control = RegionControl(base.unet, alpha_modules=names, mode=attention_mix.mode)
    control.load_alphas(attention_mix.tensors)
    return control


def _batches(requests: Iterable[_ImageRequest], limit: int) -> Iterator[list[_ImageRequest]]:
    """Group consecutive requests of one size into batches of at most ``limit``."""
    batch: list[_ImageRequest] = []
    for request in requests:
        changed = batch and request.condition.label.shape != batch[0].condition.label.shape
        if changed or len(batch) == limit:
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch
