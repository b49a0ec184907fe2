"""The config of image segmentation."""

from dataclasses import dataclass, replace

from loraseg.backbones.weights import absolute_spec
from loraseg.batch.core.output import check_disjoint
from loraseg.data.labels import LabelSpace
from loraseg.errors import ConfigError, DatasetError
from loraseg.inference.config import AdaptiveSegmenterConfig
from loraseg.inference.selection import AdaptiveSettings, TilingMode
from loraseg.storage import absolute_uri

__all__ = ["SegmentImagesConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentImagesConfig(AdaptiveSegmenterConfig):
    """Images, models and settings; ``loraseg segment`` with the same settings gives equal masks.

    Attributes:
        images: Store URI; every object below it is read as an image.
        output: Store URI for masks, explanations and manifest; it belongs to one set of settings.
        classes: Class names; their order gives the ids of the masks.
        library: URI of the adapter library; None only with mode ``base``.
        generation: Generation of the library; None for the newest at the first run, which later
            runs keep.
        tiling: Whether images go through the model as overlapping tiles; ``auto`` decides by size.
        images_per_file: Images of one explanation file, which is one work unit.
    """

    images: str
    output: str
    classes: tuple[str, ...]
    tiling: TilingMode = "auto"
    images_per_file: int = 32

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: A number is out of range, or the library is missing.
        """
        if self.images_per_file < 1:
            raise ConfigError(f"images_per_file: got {self.images_per_file}, expected at least 1")
        if self.library is None and self.mode != "base":
            raise ConfigError("library: expected the URI of a library, or mode=base for none")

    def resolved(self) -> "SegmentImagesConfig":
        """Return the config with absolute URIs and with the values of all presets.

        Raises:
            ConfigError: Classes are missing or named twice, a number is out of range, or images
                and output lie within each other.
        """
        settings = self.settings()
        images, output = absolute_uri(self.images), absolute_uri(self.output)
        check_disjoint("images", images, output)
        return replace(
            self,
            images=images,
            output=output,
            classes=self.label_space().names,
            library=None if self.library is None else absolute_uri(self.library),
            base=absolute_spec(self.base),
            encoder=absolute_spec(self.encoder),
            k=settings.k,
            temperature=settings.temperature,
        )

    def label_space(self) -> LabelSpace:
        """Return the classes with their colours.

        Raises:
            ConfigError: Classes are missing or named twice.
        """
        try:
            return LabelSpace(self.classes)
        except DatasetError as error:
            raise ConfigError(f"classes: {error}") from error

    def settings(self) -> AdaptiveSettings:
        """Return how adapters are selected.

        Raises:
            ConfigError: A number is out of range.
        """
        return self.adaptive_settings(self.mode)
