"""Which adapters an image gets: what was asked for and what was found (methods B.4)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loraseg.errors import ConfigError
from loraseg.segment.pool import EntryLike

__all__ = ["PRESETS", "AdaptiveSettings", "Choice", "Mode", "Part", "Wish", "preset"]

Mode = Literal["fused", "uniform", "base"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveSettings:
    """How adapters are chosen for an image.

    Attributes:
        k: Number of nearest adapters that are fused, K of methods B.4.
        temperature: tau of methods B.4; it belongs to the encoder's scale of distances.
        mode: ``fused`` retrieves per image, ``uniform`` mixes all adapters with equal weights,
            ``base`` uses none.
    """

    k: int = 5
    temperature: float = 0.05
    mode: Mode = "fused"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"k: got {self.k}, expected at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ConfigError(
                f"temperature: got {self.temperature}, expected a finite number above 0"
            )


# The same sharpness of 1/(d tau) needs another tau where distances have another scale.
PRESETS: Mapping[str, AdaptiveSettings] = {
    "semla": AdaptiveSettings(k=5, temperature=0.05),
    "miniature": AdaptiveSettings(k=2, temperature=0.04),
}


def preset(encoder: str) -> AdaptiveSettings:
    """Return the settings that go with an index encoder; SemLA's own where nothing is known."""
    return PRESETS.get(encoder, PRESETS["semla"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What is asked for one image.

    Attributes:
        settings: K, temperature and mode.
        only: Names of adapters to use, all of them whatever their distance and K; they are
            weighted by distance (``fused``) or alike (``uniform``). Empty for no such demand.
        exclude: Names that must not be used.
    """

    settings: AdaptiveSettings
    only: frozenset[str] = field(default_factory=frozenset[str])
    exclude: frozenset[str] = field(default_factory=frozenset[str])


@dataclass(frozen=True, slots=True)
class Part:
    """One chosen adapter, its mixing weight and, if it was measured, its distance."""

    entry: EntryLike
    weight: float
    distance: float | None


@dataclass(frozen=True, slots=True)
class Choice:
    """The adapters of one image, nearest first.

    Attributes:
        mode: What was asked for.
        parts: Empty for the bare base.
        fallback: Why the bare base is used although adapters were asked for, else None.
    """

    mode: Mode
    parts: tuple[Part, ...] = ()
    fallback: str | None = None
