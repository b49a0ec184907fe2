"""Load Jinja templates with the settings of all HTML pages."""

from functools import cache
from pathlib import Path

import jinja2

__all__ = ["html_template"]


@cache
def html_template(folder: Path, name: str) -> jinja2.Template:
    """Return a template that escapes values and raises if one is missing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
