"""The domains of the world: appearance, family and caption phrases of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from loraseg.errors import ConfigError
from loraseg.miniature.world import weather
from loraseg.miniature.world.palette import Palette

__all__ = [
    "BASE_DOMAINS",
    "DOMAINS",
    "FAMILIES",
    "LABELLED_DOMAINS",
    "WorldDomain",
    "unseen_domains",
]


@dataclass(frozen=True, kw_only=True)
class WorldDomain:
    """Appearance of a domain.

    Attributes:
        family: Similar domains have the same family.
        phrases: Phrases by which captions describe the domain.
        effects: Effects applied in order to the painted scene.
        palette: Colours of the objects before the effects.
        view: Camera position.
    """

    family: str
    phrases: tuple[str, ...]
    effects: tuple[weather.Effect, ...] = ()
    palette: Palette = field(default_factory=Palette)
    view: Literal["street", "overhead"] = "street"


_AUTUMN = Palette(tree=(0.75, 0.42, 0.1), grass=(0.6, 0.5, 0.25))
_DESERT = Palette(
    sky=(0.62, 0.75, 0.88),
    mountain=(0.75, 0.5, 0.35),
    grass=(0.85, 0.72, 0.48),
    sidewalk=(0.8, 0.72, 0.6),
    tree=(0.45, 0.5, 0.25),
)
_EVENING = Palette(lit_windows=0.3)
_LATE = Palette(lit_windows=0.5)
_NIGHT = Palette(lit_windows=0.6)

DOMAINS: dict[str, WorldDomain] = {
    "clear-day": WorldDomain(
        family="day", phrases=("in daylight under a clear sky", "on a clear day")
    ),
    "overcast": WorldDomain(
        family="day",
        phrases=("in daylight under a cloudy sky", "on an overcast day"),
        effects=(weather.overcast,),
    ),
    "fog-light": WorldDomain(
        family="fog", phrases=("in light fog", "on a misty day"), effects=(weather.fog(0.75),)
    ),
    "fog-heavy": WorldDomain(
        family="fog", phrases=("in heavy fog", "in dense fog"), effects=(weather.fog(1.0),)
    ),
    "rain": WorldDomain(
        family="rain",
        phrases=("in the rain", "on a rainy day"),
        effects=(weather.rain(0.75, 0.2),),
    ),
    "rain-heavy": WorldDomain(
        family="rain",
        phrases=("in heavy rain", "in a rain storm"),
        effects=(weather.rain(0.6, 0.3), weather.fog(0.35)),
    ),
    "snow": WorldDomain(
        family="snow", phrases=("in the snow", "on a snowy day"), effects=(weather.snow,)
    ),
    "snow-fog": WorldDomain(
        family="snow",
        phrases=("in a snow storm", "in snow and fog"),
        effects=(weather.snow, weather.fog(0.7)),
    ),
    "dusk": WorldDomain(
        family="dusk",
        phrases=("at dusk", "at sunset"),
        effects=(weather.dusk((1.05, 0.75, 0.7), 0.62),),
        palette=_EVENING,
    ),
    "dusk-dark": WorldDomain(
        family="dusk",
        phrases=("at late dusk", "after sunset"),
        effects=(weather.dusk((0.9, 0.65, 0.75), 0.45),),
        palette=_LATE,
    ),
    "night": WorldDomain(
        family="night",
        phrases=("at night", "in the dark"),
        effects=(weather.night(0.42),),
        palette=_NIGHT,
    ),
    "night-rain": WorldDomain(
        family="night",
        phrases=("on a rainy night", "at night in the rain"),
        effects=(weather.night(0.5), weather.rain(0.95, 0.12)),
        palette=_NIGHT,
    ),
    "autumn": WorldDomain(
        family="warm", phrases=("in warm autumn", "in the fall season"), palette=_AUTUMN
    ),
    "desert": WorldDomain(
        family="warm", phrases=("in the warm desert", "in a sandy place"), palette=_DESERT
    ),
    "sketch": WorldDomain(
        family="drawing",
        phrases=("as a pencil drawing", "as a line drawing"),
        effects=(weather.sketch,),
    ),
    "charcoal": WorldDomain(
        family="drawing",
        phrases=("as a charcoal drawing", "as a dark drawing"),
        effects=(weather.charcoal,),
    ),
    "sepia": WorldDomain(
        family="film",
        phrases=("as an old brown photo", "as a sepia photo"),
        effects=(weather.sepia,),
    ),
    "noir": WorldDomain(
        family="film",
        phrases=("as an old black and white photo", "in black and white"),
        effects=(weather.noir,),
    ),
    "thermal": WorldDomain(
        family="thermal",
        phrases=("from a thermal camera", "as a heat image"),
        effects=(weather.thermal,),
    ),
    "thermal-dim": WorldDomain(
        family="thermal",
        phrases=("from a dim thermal camera", "as a dim heat image"),
        effects=(weather.thermal, weather.dim(0.55, 0.1)),
    ),
    "lowres": WorldDomain(
        family="lowres",
        phrases=("as a pixelated image", "at low resolution"),
        effects=(weather.pixelate,),
    ),
    "lowres-noisy": WorldDomain(
        family="lowres",
        phrases=("as a noisy pixelated image", "at low resolution with noise"),
        effects=(weather.pixelate, weather.dim(0.85, 0.0), weather.grain(0.06)),
    ),
    "topdown": WorldDomain(
        family="above", phrases=("from above", "in top-down view"), view="overhead"
    ),
    "topdown-night": WorldDomain(
        family="above",
        phrases=("from above at night", "in top-down view at night"),
        effects=(weather.night(0.5),),
        view="overhead",
    ),
    "negative": WorldDomain(
        family="negative",
        phrases=("as a negative film", "in inverted colours"),
        effects=(weather.negative,),
    ),
}

# The domains with masks in the training of the miniature CAT-Seg; the others are for adapters.
BASE_DOMAINS = ("clear-day", "overcast", "autumn", "fog-light")
# The domains with patch labels in the training of the miniature CLIP; the others had captions only.
LABELLED_DOMAINS = (*BASE_DOMAINS, "desert", "dusk", "rain", "noir")

FAMILIES: dict[str, tuple[str, ...]] = {}
for _name, _domain in DOMAINS.items():
    FAMILIES[_domain.family] = (*FAMILIES.get(_domain.family, ()), _name)


def unseen_domains(families: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the domains on which the miniature CAT-Seg was not trained.

    Args:
        families: Restricts the result to these families; all if empty.

    Raises:
        ConfigError: A family is unknown.
    """
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise ConfigError(f"families: unknown {', '.join(unknown)} (known: {', '.join(FAMILIES)})")
    return tuple(
        name
        for name, domain in DOMAINS.items()
        if name not in BASE_DOMAINS and domain.family in (families or FAMILIES)
    )
