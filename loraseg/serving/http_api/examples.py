"""Example images for the page: scenes of the miniature world, rendered on first use."""

import io
from functools import cache

from PIL import Image

from loraseg.api_types import Example, ExampleList
from loraseg.errors import ServiceError
from loraseg.miniature.world.captions import LABEL_NAMES
from loraseg.miniature.world.render import render

__all__ = ["example_list", "example_png"]

# Domains that differ clearly.
_DOMAINS = ("clear-day", "fog-heavy", "rain", "snow", "dusk", "night", "sketch", "thermal")
_SEED = 7


def example_list() -> ExampleList:
    """Return name, classes and URL of each example."""
    return ExampleList(
        tuple(
            Example(domain, f"v1/examples/{n}.png", tuple(LABEL_NAMES))
            for n, domain in enumerate(_DOMAINS)
        )
    )


@cache
def example_png(n: int) -> bytes:
    """Return an example as PNG.

    Raises:
        ServiceError: ``not_found``.
    """
    if not 0 <= n < len(_DOMAINS):
        raise ServiceError("not_found", f"Expected an example from 0 to {len(_DOMAINS) - 1}.")
    images, _ = render(_DOMAINS[n], 1, _SEED, "examples")
    buffer = io.BytesIO()
    Image.fromarray(images[0]).save(buffer, format="PNG")
    return buffer.getvalue()
