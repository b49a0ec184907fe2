"""The manifest of a training job: the domains to train and what they share."""

from dataclasses import dataclass, field
from typing import Any, Literal

from loraseg.backbones.weights import absolute_spec
from loraseg.errors import ConfigError
from loraseg.library.card import Role
from loraseg.storage import absolute_uri
from loraseg.train.core.task import TrainingTask
from loraseg.train.generator_adapters.task import ActiveAdapter
from loraseg.train.roles import ROLES

__all__ = ["TrainingDomain", "TrainingManifest"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingDomain:
    """One labelled domain, which becomes one adapter.

    Attributes:
        name: Name of the adapter.
        data: Dataset folder, a path or URI; several domains may name the same one, for a sweep.
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
    """Domains and their common settings.

    Attributes:
        library: Store URI of the adapter library to publish to.
        checkpoints: Store URI of the checkpoints.
        role: A key of :data:`~loraseg.train.roles.ROLES`.
        base: The frozen segmenter (:func:`loraseg.segment.open_vocabulary.base.load_base`) or
            generator (:func:`loraseg.backbones.diffusion.load_diffusion`).
        encoder: For segmenters, the CLIP of the index.
        recipe: Name of the recipe; None is the default of the role.
        overrides: Fields of the recipe that differ from the named one.
        seed: Seed of the choice of images, the initial pairs and the batches.
        data_order: See :class:`~loraseg.train.core.task.TrainingTask`; "per_dataset" allows domains
            of the same data to train together.
        images: Number of training images of each domain; None for all.
        skip_bad: Leave out unusable images, and list them, instead of failing the domain.
        active: For generators, adapters that are merged into the base, frozen, during training.
        cache: For generators, see
            :class:`~loraseg.train.generator_adapters.task.GeneratorAdapterTask`.
        output: For generators, the store URI of the reports.
        domains: One adapter each; names must differ.
    """

    library: str
    checkpoints: str
    role: Role = "segmenter"
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
        """Check the list of domains.

        Raises:
            ConfigError: There is no domain, or two have one name.
        """
        if not self.domains:
            raise ConfigError("domains: expected at least one, got none")
        names = [domain.name for domain in self.domains]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"domains: names must differ, got {', '.join(twice)} more than once")

    def tasks(self) -> tuple[TrainingTask, ...]:
        """Return one task per domain, with absolute paths and URIs.

        Raises:
            ConfigError: The recipe is unknown, an override does not fit it, or a field is set that
                belongs to another role.
        """
        self._check_role_fields()
        role = ROLES[self.role]
        fields = role.task_fields(self)
        return tuple(
            role.task(**self._common_fields(domain), **self._recipe(domain), **fields)
            for domain in self.domains
        )

    def _recipe(self, domain: TrainingDomain) -> dict[str, Any]:
        role = ROLES[self.role]
        name = self.recipe or role.default_recipe
        return {"recipe": role.named_recipe(name, self.overrides, domain.overrides)}

    def _check_role_fields(self) -> None:
        for name, role in ROLES.items():
            if name != self.role and any(getattr(self, field) for field in role.manifest_fields):
                *first, last = role.manifest_fields
                raise ConfigError(f"{', '.join(first)} and {last} are for role {name} only")

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
