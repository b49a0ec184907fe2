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
from loraseg.adapters.fusion_file import FusionState
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
    fusion_of,
    warn_of_strangers,
)
from loraseg.synth.lineage import Lineage, UsedAdapter, generator_digest, mask_digest, pair_id
from loraseg.synth.region_attention import RegionControl, alpha_owners
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
from loraseg.synth.sizes import image_size, mask_at_size, side_step
from loraseg.tensor_types import Float, Tensor, UInt8, ndarray

__all__ = ["Generated", "Generator"]

logger = logging.getLogger(__name__)

_NO_CONFIG = SamplingConfig()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Generated:
    """One image and its label.

    Attributes:
        name: What the caller calls the mask.
        image: RGB.
        label: Class ids at the image's size; 255 as in the mask, and where a class was dropped.
        latents: What the image was decoded from, on the CPU.
        condition: What the generator was told.
        lineage: Where all this comes from; mask id, k, seed and prompt are there.
    """

    name: str
    image: UInt8[ndarray, "h w 3"]
    label: UInt8[ndarray, "h w"]
    latents: Float[Tensor, "c y x"]
    condition: Condition
    lineage: Lineage


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Wish:
    """One image that is to be made."""

    name: str
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
        config: SamplingConfig = _NO_CONFIG,
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
        warn_of_strangers(adapters)
        self.base = base
        self.conditioner = conditioner
        self.config = config
        self._adapters = tuple(adapters)
        self._heads = tuple(heads)
        self._mix = self._mixed(())
        self._bank = AdapterBank(base.unet)
        linears = {n: m for n, m in base.unet.named_modules() if isinstance(m, torch.nn.Linear)}
        for one in everyone:
            check_fits(one.adapter, linears)
        fusion = fusion_of(adapters)
        self._control = _control(base, fusion)
        # An adapter's own digest holds its fusion layers only if both came from files.
        self._fusion = fusion and fusion.digest
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
    ) -> Iterator[Generated]:
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
        step = side_step(self.base)
        sizes = [image_size(m, self.config.size, step, f"mask {name!r}") for name, m in masks]
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
        return self._run(masks, sizes, templates, heads, first)

    def _run(
        self,
        masks: Sequence[tuple[str, ndarray]],
        sizes: Sequence[tuple[int, int]],
        templates: Sequence[str] | None,
        heads: ndarray | None,
        first: int,
    ) -> Iterator[Generated]:
        def wishes() -> Iterator[_Wish]:
            for index, (name, mask) in enumerate(masks):
                conditioner = self._conditioner(templates[index] if templates else None)
                condition = conditioner(mask_at_size(mask, sizes[index]), where=f"mask {name!r}")
                for k in range(first, self.config.images):
                    own = () if heads is None else tuple(map(float, heads[index, k - first]))
                    yield _Wish(name, mask_digest(mask), k, condition, conditioner, own)

        for group in _grouped(wishes(), self.config.batch):
            yield from self._make(group)

    def _make(self, wishes: Sequence[_Wish]) -> list[Generated]:
        started = time.perf_counter()
        base, config = self.base, self.config
        height, width = wishes[0].condition.regions.shape
        shape = (base.latent_channels, height // base.latent_factor, width // base.latent_factor)
        streams = [NoiseStream(config.seed, wish.mask_id, wish.k) for wish in wishes]
        prompts = list(dict.fromkeys(wish.condition.prompt for wish in wishes))
        conditions = [wish.condition for wish in wishes]
        batch = SamplingBatch(
            noise=torch.stack([stream.initial(shape) for stream in streams]),
            text=self._prompts.encode(prompts),
            prompts=tuple(prompts.index(condition.prompt) for condition in conditions),
            unconditional=self._prompts.unconditional if config.guidance > 1 else None,
            generators=[stream.generator for stream in streams],
            regions=Regions.stack(conditions, base.device) if config.regions else None,
            shared_text=not self._heads,
        )
        with self._acting(wishes):
            latents = denoise(base, self._control, batch, config)
        images = base.decode_latents(latents, slice_size=config.decode_slice).cpu().numpy()
        latents = latents.cpu()
        logger.info("%d images in %.2f s", len(wishes), time.perf_counter() - started)
        return [
            Generated(
                name=wish.name,
                image=images[index],
                label=wish.condition.label,
                latents=latents[index],
                condition=wish.condition,
                lineage=self._lineage(wish, streams[index].seed),
            )
            for index, wish in enumerate(wishes)
        ]

    def _acting(self, wishes: Sequence[_Wish]) -> AbstractContextManager[None]:
        """Let the adapters act: in the weights if all images share one mix, else beside them."""
        if not self._heads:
            return merged(self.base.unet, self._mix)
        mixes = [self._mixed(wish.heads) for wish in wishes]
        # The unconditional half comes first and runs with the same adapters.
        return self._bank.use(mixes * (2 if self.config.guidance > 1 else 1))

    def _mixed(self, heads: Sequence[float]) -> Mix | None:
        """Return the adapters and, with weights of their own, the heads; None for the bare base."""
        parts = [(one.adapter, one.weight) for one in self._adapters]
        parts += [(h, w) for h, w in zip(self._heads, heads, strict=False) if w]
        return fuse(*map(list, zip(*parts, strict=True))) if parts else None

    def _conditioner(self, template: str | None) -> Conditioner:
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
                **({"fusion": self._fusion} if self._fusion else {}),
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

    def _lineage(self, wish: _Wish, seed: int) -> Lineage:
        generator = self._digest_of(wish.conditioner)
        height, width = wish.condition.label.shape
        names = wish.conditioner.label_space.names
        return Lineage(
            pair_id=pair_id(wish.mask_id, wish.k, generator, self.config.seed, wish.heads),
            mask_id=wish.mask_id,
            k=wish.k,
            seed=seed,
            prompt=wish.condition.prompt,
            dropped=tuple(names[index] for index in wish.condition.dropped),
            size=(height, width),
            base={"name": self.base.name, "digest": self.base.digest},
            generator=generator,
            adapters=tuple(
                UsedAdapter(one.adapter.name, one.adapter.digest, float(one.weight))
                for one in self._adapters
            ),
            heads=tuple(
                UsedAdapter(head.name, head.digest, weight)
                for head, weight in zip(self._heads, wish.heads, strict=True)
            ),
            sampling=configs.to_dict(self.config),
            conditioning=configs.to_dict(wish.conditioner.config),
            code_revision=code_revision(),
        )


def _control(base: DiffusionBase, fusion: FusionState | None) -> RegionControl:
    if fusion is None:
        return RegionControl(base.unet)
    owners = alpha_owners(fusion.tensors)
    control = RegionControl(base.unet, alpha_modules=owners, mode=fusion.mode)
    control.load_alphas(fusion.tensors)
    return control


def _grouped(wishes: Iterable[_Wish], limit: int) -> Iterator[list[_Wish]]:
    """Cut into runs of at most ``limit`` images of one size."""
    group: list[_Wish] = []
    for wish in wishes:
        changed = group and wish.condition.label.shape != group[0].condition.label.shape
        if changed or len(group) == limit:
            yield group
            group = []
        group.append(wish)
    if group:
        yield group
