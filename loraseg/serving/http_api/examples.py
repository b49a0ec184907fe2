"""Pictures to try the page with: scenes of the miniature world, drawn at first use."""

import io
from functools import cache
from typing import Any

from PIL import Image

from loraseg.errors import ServiceError
from loraseg.miniature.world.captions import LABEL_NAMES
from loraseg.miniature.world.render import render

__all__ = ["example_list", "example_png"]

# One of each family that a person tells apart at first sight.
_DOMAINS = ("clear-day", "fog-heavy", "rain", "snow", "dusk", "night", "sketch", "thermal")
_SEED = 7


def example_list() -> list[dict[str, Any]]:
    """Return what there is: name, classes, and where the picture is."""
    return [
        {"name": domain, "url": f"v1/examples/{n}.png", "classes": list(LABEL_NAMES)}
        for n, domain in enumerate(_DOMAINS)
    ]


@cache
def example_png(n: int) -> bytes:
    """Return a scene as PNG.

    Raises:
        ServiceError: ``not_found``.
    """
    if not 0 <= n < len(_DOMAINS):
        raise ServiceError("not_found", f"There are examples 0 to {len(_DOMAINS) - 1}.")
    images, _ = render(_DOMAINS[n], 1, _SEED, "examples")
    buffer = io.BytesIO()
    Image.fromarray(images[0]).save(buffer, format="PNG")
    return buffer.getvalue()
