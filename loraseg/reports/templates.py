"""Pages for people: one HTML file each, made from the package's templates."""

from functools import cache
from pathlib import Path

import jinja2

__all__ = ["html_template"]


@cache
def html_template(folder: Path, name: str) -> jinja2.Template:
    """Return a template; what is put into it is escaped, and a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
