"""What is made of which masks, and how."""

from dataclasses import dataclass, field, replace

from loraseg.backbones.weights import absolute_spec
from loraseg.config import project
from loraseg.errors import ConfigError
from loraseg.storage import absolute_uri, open_store
from loraseg.synth.conditioning import ConditioningConfig
from loraseg.synth.sampling import SamplingConfig
from loraseg.synth.vote import FilterConfig

__all__ = ["SynthesisConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisConfig:
    """What is made of which masks, and how.

    Attributes:
        masks: Store URI of a dataset folder, of a folder of PNG masks, or of Parquet files with a
            column ``mask`` (PNG bytes) and, if there is one, ``name``.
        output: Store URI of the synthetic dataset; it belongs to one set of settings.
        split: Of a dataset folder.
        classes: Class names; their order gives the ids. Empty for those of ``classes.json``.
        limit: Only so many masks: of a dataset folder those of its first training samples, then
            masks without image by name; of other sources the first by name.
        base: As for :func:`loraseg.backbones.diffusion.load_diffusion`.
        adapters: As for :func:`loraseg.inference.generator_adapters.load_generator_adapter`.
        weights: Of the adapters; empty for 1 each.
        segmenter: File of a segmenter that says what it sees in the images; None only without
            filter. Best one that was trained on the same few labelled images (methods b.5).
        real: Dataset folder with real labelled images, for the filter ``freemask`` alone.
        real_images: So many of its split ``train``, the first by name; None for all.
        sampling: How images are sampled; ``images`` is K.
        conditioning: How masks become prompts and regions.
        filter: What becomes of pixels whose label is doubtful.
        masks_per_shard: Masks of one shard, and so of one unit of work.
        append: Let an output that is complete grow: more masks, or more images of each.
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
        """Check what the types cannot say."""
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
        """Return a config of this very class that holds in any process.

        Raises:
            ConfigError: A URI is malformed, or masks and output lie within each other.
        """
        plain = project(self, SynthesisConfig)
        masks, output = absolute_uri(self.masks), absolute_uri(self.output)
        _check_disjoint(masks, output)
        return replace(
            plain,
            masks=masks,
            output=output,
            base=absolute_spec(self.base),
            adapters=tuple(_absolute_adapter(spec) for spec in self.adapters),
            weights=self.weights or (1.0,) * len(self.adapters),
            segmenter=None if self.segmenter is None else absolute_uri(self.segmenter),
            real=None if self.real is None else absolute_uri(self.real),
        )


def _absolute_adapter(spec: str) -> str:
    place, mark, name = spec.rpartition("#")
    return f"{absolute_uri(place)}#{name}" if mark else absolute_uri(spec)


def _check_disjoint(masks: str, output: str) -> None:
    """A shard among the masks would be taken for masks by the next run."""
    places = [f"{open_store(place).uri.rstrip('/')}/" for place in (masks, output)]
    if places[0].startswith(places[1]) or places[1].startswith(places[0]):
        raise ConfigError(f"masks and output must not lie within each other: {masks}, {output}")
