"""What is segmented and how."""

from dataclasses import dataclass, replace

from loraseg.backbones.weights import absolute_spec
from loraseg.config import project
from loraseg.data.labels import LabelSpace
from loraseg.errors import ConfigError, DatasetError
from loraseg.inference.config import AdaptiveSegmenterConfig
from loraseg.inference.selection import AdaptiveSettings, TilingMode
from loraseg.storage import absolute_uri, open_store

__all__ = ["SegmentImagesConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentImagesConfig(AdaptiveSegmenterConfig):
    """What is segmented and how; ``loraseg segment`` with the same settings gives the same masks.

    Attributes:
        images: Store URI; every object below it is taken for an image.
        output: Store URI for masks, explanations and manifest; it belongs to one set of settings.
        classes: Class names; their order gives the ids of the masks.
        library: URI of the adapter library; None only with mode ``base``.
        generation: Of the library; None for the newest at the first run, which later runs keep.
        tiling: Whether images go through the model as overlapping tiles; ``auto`` goes by size.
        images_per_file: Images of one explanation file, and so of one unit of work.
    """

    images: str
    output: str
    classes: tuple[str, ...]
    tiling: TilingMode = "auto"
    images_per_file: int = 32

    def __post_init__(self) -> None:
        """Check what the types cannot say."""
        if self.images_per_file < 1:
            raise ConfigError(f"images_per_file: got {self.images_per_file}, expected at least 1")
        if self.library is None and self.mode != "base":
            raise ConfigError("library: expected the URI of a library, or mode=base for none")

    def resolved(self) -> "SegmentImagesConfig":
        """Return a config of this very class that holds in any process and says all it means.

        Raises:
            ConfigError: Classes are missing or double, a number is out of range, or images and
                output lie within each other.
        """
        chosen = self.settings()
        plain = project(self, SegmentImagesConfig)
        images, output = absolute_uri(self.images), absolute_uri(self.output)
        _check_disjoint(images, output)
        return replace(
            plain,
            images=images,
            output=output,
            classes=self.label_space().names,
            library=None if self.library is None else absolute_uri(self.library),
            base=absolute_spec(self.base),
            encoder=absolute_spec(self.encoder),
            k=chosen.k,
            temperature=chosen.temperature,
        )

    def label_space(self) -> LabelSpace:
        """Return the classes with their colours."""
        try:
            return LabelSpace(self.classes)
        except DatasetError as error:
            raise ConfigError(f"classes: {error}") from error

    def settings(self) -> AdaptiveSettings:
        """Return how adapters are chosen."""
        return self.adaptive_settings(self.mode)


def _check_disjoint(images: str, output: str) -> None:
    """Masks among the images would be segmented by the next run."""
    places = [f"{open_store(place).uri.rstrip('/')}/" for place in (images, output)]
    if places[0].startswith(places[1]) or places[1].startswith(places[0]):
        raise ConfigError(f"images and output must not lie within each other: {images}, {output}")
