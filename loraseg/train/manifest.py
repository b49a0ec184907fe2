"""A manifest of domains: what to train, into which library, one adapter a domain."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from loraseg.backbones.weights import absolute_spec
from loraseg.errors import ConfigError
from loraseg.storage import absolute_uri
from loraseg.train.generator_adapters.recipes import named_generator_recipe
from loraseg.train.generator_adapters.targets import absolute_targets
from loraseg.train.generator_adapters.task import ActiveAdapter
from loraseg.train.segmenter_adapters.recipes import named_recipe
from loraseg.train.tasks import AnyAdapterTask, GeneratorAdapterTask, SegmenterAdapterTask

__all__ = ["TrainingDomain", "TrainingManifest"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingDomain:
    """One labelled domain.

    Attributes:
        name: The adapter's.
        data: Dataset folder, a path or URI; several domains may name the same, for a sweep.
        split: Split to train on.
        val_split: Split to score on.
        images: Overrides the manifest's number of training images.
        overrides: Fields of the recipe that differ from the manifest's, such as ``rank``.
    """

    name: str
    data: str
    split: str = "train"
    val_split: str = "val"
    images: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingManifest:
    """What all domains share.

    Attributes:
        library: Store URI of the adapter library to publish to.
        checkpoints: Store URI below which unfinished adapters keep their state.
        role: What the adapters are for: a "segmenter" or a "generator" of images.
        base: The frozen segmenter (:func:`loraseg.segment.load_base`) or generator
            (:func:`loraseg.backbones.diffusion.load_diffusion`).
        encoder: The CLIP that places domains of segmenters in the index.
        recipe: Name of the recipe; None is the role's for its miniature.
        overrides: Fields of the recipe that differ from the named one.
        data_order: See :class:`~loraseg.train.tasks.SegmenterAdapterTask`; "per_dataset" lets
            domains with the same data be trained together.
        images: Few-shot: train on so many images of each domain; None for all.
        skip_bad: List and leave out unusable images rather than fail the domain.
        active: Generators' adapters that act, frozen, while others are trained.
        cache: For generators, see
            :class:`~loraseg.train.generator_adapters.task.GeneratorAdapterTask`.
        output: For generators, where reports go.
        domains: One adapter each; names must differ.
    """

    library: str
    checkpoints: str
    role: Literal["segmenter", "generator"] = "segmenter"
    base: str = "miniature"
    encoder: str = "miniature"
    recipe: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0
    data_order: Literal["per_adapter", "per_dataset"] = "per_adapter"
    images: int | None = None
    skip_bad: bool = False
    active: tuple[ActiveAdapter, ...] = ()
    cache: str | None = None
    output: str | None = None
    domains: tuple[TrainingDomain, ...]

    def __post_init__(self) -> None:
        """Check what no single task can see."""
        if not self.domains:
            raise ConfigError("domains: expected at least one, got none")
        names = [domain.name for domain in self.domains]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"domains: names must differ, got {', '.join(twice)} more than once")

    def tasks(self) -> tuple[AnyAdapterTask, ...]:
        """Return one unit of work for each domain, with addresses that hold on any machine.

        Raises:
            ConfigError: The recipe is unknown, an override does not fit it, or a field is for the
                other role.
        """
        if self.role == "generator":
            return tuple(self._generator_task(domain) for domain in self.domains)
        if self.active or self.cache or self.output:
            raise ConfigError("active, cache and output are for role generator only")
        return tuple(self._segmenter_task(domain) for domain in self.domains)

    def _segmenter_task(self, domain: TrainingDomain) -> SegmenterAdapterTask:
        recipe = self.recipe or "miniature"
        return SegmenterAdapterTask(
            **self._common_fields(domain),
            encoder=absolute_spec(self.encoder),
            recipe=named_recipe(recipe, self.overrides, domain.overrides),
        )

    def _generator_task(self, domain: TrainingDomain) -> GeneratorAdapterTask:
        name = self.recipe or "matchmask-miniature"
        recipe = named_generator_recipe(name, self.overrides, domain.overrides)
        return GeneratorAdapterTask(
            **self._common_fields(domain),
            recipe=replace(recipe, targets=absolute_targets(recipe.targets)),
            active=self.active,
            cache=self.cache and absolute_uri(self.cache),
            output=self.output and absolute_uri(self.output),
        )

    def _common_fields(self, domain: TrainingDomain) -> dict[str, Any]:
        return {
            "name": domain.name,
            "data": absolute_uri(domain.data),
            "split": domain.split,
            "val_split": domain.val_split,
            "images": self.images if domain.images is None else domain.images,
            "base": absolute_spec(self.base),
            "seed": self.seed,
            "data_order": self.data_order,
            "library": absolute_uri(self.library),
            "checkpoints": absolute_uri(self.checkpoints),
            "skip_bad": self.skip_bad,
        }
