"""The pages for people: each one file, which may run nothing but its own inline script."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2

from loraseg.serving.http_api.problems import PROBLEM_TYPES

__all__ = ["docs_page", "index_page"]

_INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.DOTALL | re.IGNORECASE)


@cache
def index_page() -> tuple[bytes, dict[str, str]]:
    """Return the page at ``/`` and its headers."""
    content = files("loraseg.serving").joinpath("static", "index.html").read_bytes()
    # As a browser hashes it: line breaks are normalised while HTML is parsed.
    text = content.decode().replace("\r\n", "\n")
    return text.encode(), _page_headers(text)


def docs_page(document: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    """Return an OpenAPI document as a page to read, and its headers."""
    source = files("loraseg.serving").joinpath("templates", "docs.html.j2").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(source).render(document=document, kinds=PROBLEM_TYPES)
    return text.encode(), _page_headers(text)


def _page_headers(text: str) -> dict[str, str]:
    """Name the inline scripts and styles by their sha256, so that nothing else runs.

    That holds whatever text finds its way into the page.
    """
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for match in _INLINE.finditer(text):
        digest = base64.b64encode(hashlib.sha256(match[2].encode()).digest()).decode()
        hashes[match[1].lower()].append(f"'sha256-{digest}'")
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(hashes["script"]) or "'none'",
        "style-src": " ".join(hashes["style"]) or "'none'",
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{key} {value}" for key, value in policy.items()),
        "Cache-Control": "no-cache",
    }
