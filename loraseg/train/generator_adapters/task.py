"""A generator's adapter as a unit of work: its settings, free of what loads models."""

import dataclasses

from loraseg.errors import ConfigError, IntegrityError
from loraseg.library.card import check_name
from loraseg.train.core.task import TrainingTask
from loraseg.train.generator_adapters.recipes import GeneratorRecipe

__all__ = ["ActiveAdapter", "GeneratorAdapterTask"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ActiveAdapter:
    """An adapter of the library that acts, frozen, while another is trained (methods d.1).

    Attributes:
        name: In the library that is published to.
        version: None for the current one.
        weight: How much of it acts.
    """

    name: str
    version: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the name.

        Raises:
            ConfigError: No adapter can have it.
        """
        try:
            check_name(self.name)
        except IntegrityError as error:
            raise ConfigError(f"active: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorAdapterTask(TrainingTask):
    """A generator's adapter to train.

    Attributes:
        base: The frozen generator, see :func:`loraseg.backbones.diffusion.load_diffusion`.
        recipe: How to train.
        active: Adapters that act meanwhile.
        cache: Store URI for latents and encoded prompts, for all tasks; None for ``_cache`` below
            the checkpoints.
        output: Store URI for the report ``<name>.html``; None for ``_reports`` below the
            checkpoints.
    """

    recipe: GeneratorRecipe
    active: tuple[ActiveAdapter, ...] = ()
    cache: str | None = None
    output: str | None = None

    @property
    def cache_uri(self) -> str:
        """Where latents and encoded prompts are kept."""
        return self.cache or f"{self.checkpoints.rstrip('/')}/_cache"

    @property
    def report_uri(self) -> str:
        """The folder of the report."""
        return self.output or f"{self.checkpoints.rstrip('/')}/_reports"

    def required_uris(self) -> tuple[str, ...]:
        """Return all addresses that a worker has to reach; names of models are none."""
        return *TrainingTask.required_uris(self), self.cache_uri, self.report_uri
