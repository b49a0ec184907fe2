"""A manifest of domains: what to train, into which library, one adapter a domain."""

from dataclasses import dataclass, field
from typing import Any, Literal

from loraseg.backbones.source import absolute_spec
from loraseg.errors import ConfigError
from loraseg.storage import absolute
from loraseg.train.recipes import named_recipe
from loraseg.train.tasks import AdapterTask

__all__ = ["Domain", "Manifest"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
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
class Manifest:
    """What all domains share.

    Attributes:
        library: Store URI of the adapter library to publish to.
        checkpoints: Store URI below which unfinished adapters keep their state.
        base: The frozen segmenter, see :func:`loraseg.segment.load_base`.
        encoder: The CLIP that places domains in the index.
        recipe: Name of the recipe.
        overrides: Fields of the recipe that differ from the named one.
        data_order: See :class:`~loraseg.train.tasks.AdapterTask`; "per_dataset" lets domains with
            the same data be trained together.
        images: Few-shot: train on so many images of each domain; None for all.
        skip_bad: List and leave out unusable images rather than fail the domain.
        domains: One adapter each; names must differ.
    """

    library: str
    checkpoints: str
    base: str = "miniature"
    encoder: str = "miniature"
    recipe: str = "miniature"
    overrides: dict[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0
    data_order: Literal["per_adapter", "per_dataset"] = "per_adapter"
    images: int | None = None
    skip_bad: bool = False
    domains: tuple[Domain, ...]

    def __post_init__(self) -> None:
        """Check what no single task can see."""
        if not self.domains:
            raise ConfigError("domains: expected at least one, got none")
        names = [domain.name for domain in self.domains]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"domains: names must differ, got {', '.join(twice)} more than once")

    def tasks(self) -> tuple[AdapterTask, ...]:
        """Return one unit of work for each domain, with addresses that hold on any machine.

        Raises:
            ConfigError: The recipe is unknown or an override does not fit it.
        """
        return tuple(
            AdapterTask(
                name=domain.name,
                data=absolute(domain.data),
                split=domain.split,
                val_split=domain.val_split,
                images=self.images if domain.images is None else domain.images,
                base=absolute_spec(self.base),
                encoder=absolute_spec(self.encoder),
                recipe=named_recipe(self.recipe, self.overrides, domain.overrides),
                seed=self.seed,
                data_order=self.data_order,
                library=absolute(self.library),
                checkpoints=absolute(self.checkpoints),
                skip_bad=self.skip_bad,
            )
            for domain in self.domains
        )
