"""The config of synthesis."""

from dataclasses import dataclass, field, replace

from loraseg.backbones.weights import absolute_spec
from loraseg.batch.core.output import check_disjoint
from loraseg.errors import ConfigError
from loraseg.storage import absolute_uri
from loraseg.synth.conditioning import ConditioningConfig
from loraseg.synth.sampling import SamplingConfig
from loraseg.synth.vote import FilterConfig

__all__ = ["SynthesisConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisConfig:
    """Masks, models, sampling and filter.

    Attributes:
        masks: Store URI of a dataset folder, of a folder of PNG masks, or of Parquet files with a
            column ``mask`` (PNG bytes) and an optional column ``name``.
        output: Store URI of the synthetic dataset; it belongs to one set of settings.
        split: Split of a dataset folder.
        classes: Class names; their order gives the ids. Empty for those of ``classes.json``.
        limit: Number of masks: in a dataset folder those of the first training samples, then masks
            without an image by name; in other sources the first by name. None for all.
        base: As for :func:`loraseg.backbones.diffusion.load_diffusion`.
        adapters: As for :func:`loraseg.inference.generator_adapters.load_generator_adapter`.
        weights: Weight of each adapter; empty for 1 each.
        segmenter: File of the closed-set segmenter whose predictions filter the labels; None only
            without filter. In MatchMask it is trained on the same few labelled images.
        real: Dataset folder with real labelled images, for the filter ``freemask`` only.
        real_images: Number of images of its split ``train``, the first by name; None for all.
        sampling: How images are sampled; ``images`` is K, the images per mask.
        conditioning: How masks become prompts and regions.
        filter: How pixels with a doubtful label are found and treated.
        masks_per_shard: Masks of one shard, which is one work unit.
        append: Whether a complete output may grow: more masks, or more images of each.
    """

    masks: str
    output: str
    split: str = "train"
    classes: tuple[str, ...] = ()
    limit: int | None = None
    base: str = "miniature"
    adapters: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    segmenter: str | None = None
    real: str | None = None
    real_images: int | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    masks_per_shard: int = 16
    append: bool = False

    def __post_init__(self) -> None:
        """Check ranges and combinations.

        Raises:
            ConfigError: A number is out of range, or two settings exclude each other.
        """
        if self.masks_per_shard < 1 or (self.limit is not None and self.limit < 1):
            raise ConfigError(
                f"masks_per_shard and limit: got {self.masks_per_shard} and {self.limit}, "
                "expected at least 1"
            )
        if self.segmenter is None and self.filter.method != "none":
            raise ConfigError(
                f"segmenter: expected one for filter.method={self.filter.method} (made by "
                "jobs.train_segmenter), or filter.method=none"
            )
        if (self.real is None) == (self.filter.method == "freemask"):
            raise ConfigError(
                f"real: got {self.real!r}; labelled images belong to filter.method=freemask, and "
                f"the method is {self.filter.method}"
            )
        if len(self.weights) not in (0, len(self.adapters)):
            raise ConfigError(
                f"weights: got {len(self.weights)}, expected one for each of "
                f"{len(self.adapters)} adapters"
            )
        voters = self.sampling.images
        if self.filter.method == "relative" and voters < 3:
            raise ConfigError(
                f"sampling.images: got {voters}; fewer than 3 images cannot outvote one another "
                "(filter.method=relative), expected 3 or more"
            )

    def resolved(self) -> "SynthesisConfig":
        """Return the config with absolute URIs and a weight for each adapter.

        Raises:
            ConfigError: A URI is malformed, or masks and output lie within each other.
        """
        masks, output = absolute_uri(self.masks), absolute_uri(self.output)
        check_disjoint("masks", masks, output)
        return replace(
            self,
            masks=masks,
            output=output,
            base=absolute_spec(self.base),
            adapters=tuple(_absolute_adapter(spec) for spec in self.adapters),
            weights=self.weights or (1.0,) * len(self.adapters),
            segmenter=None if self.segmenter is None else absolute_uri(self.segmenter),
            real=None if self.real is None else absolute_uri(self.real),
        )


def _absolute_adapter(spec: str) -> str:
    library, mark, name = spec.rpartition("#")
    return f"{absolute_uri(library)}#{name}" if mark else absolute_uri(spec)
