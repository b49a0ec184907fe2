"""The task of a generator adapter: its settings, without the models they name."""

import dataclasses
from typing import ClassVar

from loraseg.errors import ConfigError, IntegrityError
from loraseg.library.card import Role, check_name
from loraseg.train.core.task import TrainingTask
from loraseg.train.generator_adapters.recipes import GeneratorRecipe

__all__ = ["ActiveAdapter", "GeneratorAdapterTask"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ActiveAdapter:
    """A library adapter that is merged into the base, frozen, while another one trains.

    CA-LoRA trains a viewpoint adapter on a frozen style adapter in this way.

    Attributes:
        name: Name in the library that the task publishes to.
        version: Version; None for the current one.
        weight: Weight of its update.
    """

    name: str
    version: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the name.

        Raises:
            ConfigError: The name is not allowed.
        """
        try:
            check_name(self.name)
        except IntegrityError as error:
            raise ConfigError(f"active: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorAdapterTask(TrainingTask):
    """A generator adapter to train.

    Attributes:
        base: The frozen generator, see :func:`loraseg.backbones.diffusion.load_diffusion`.
        recipe: Targets, rank and optimisation.
        active: Adapters merged into the base during training.
        cache: Store URI of latents and encoded prompts, shared by all tasks; None for ``_cache``
            below the checkpoints.
        output: Store URI of the report ``<name>.html``; None for ``_reports`` below the
            checkpoints.
    """

    role: ClassVar[Role] = "generator"

    recipe: GeneratorRecipe
    active: tuple[ActiveAdapter, ...] = ()
    cache: str | None = None
    output: str | None = None

    @property
    def cache_uri(self) -> str:
        """Store URI of latents and encoded prompts."""
        return self.cache or f"{self.checkpoints.rstrip('/')}/_cache"

    @property
    def report_uri(self) -> str:
        """Store URI of the report."""
        return self.output or f"{self.checkpoints.rstrip('/')}/_reports"

    def required_uris(self) -> tuple[str, ...]:
        """Return the paths and URIs that a worker must reach; model names are not among them."""
        return *TrainingTask.required_uris(self), self.cache_uri, self.report_uri
