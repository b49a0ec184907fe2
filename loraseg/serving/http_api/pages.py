"""The HTML pages; their security policy permits only their own inline scripts and styles."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from loraseg.reports.html_template import html_template
from loraseg.serving.http_api.problems import PROBLEM_TYPES

__all__ = ["docs_page", "index_page"]

_TEMPLATES = Path(__file__).parents[1] / "templates"
_INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.DOTALL | re.IGNORECASE)


@cache
def index_page() -> tuple[bytes, dict[str, str]]:
    """Return the page at ``/`` and its headers."""
    content = files("loraseg.serving").joinpath("static", "index.html").read_bytes()
    # Browsers normalise line breaks before they compute the hashes.
    text = content.decode().replace("\r\n", "\n")
    return text.encode(), _page_headers(text)


def docs_page(document: dict[str, Any]) -> tuple[bytes, dict[str, str]]:
    """Return an OpenAPI document rendered as HTML, and the page's headers."""
    template = html_template(_TEMPLATES, "docs.html.j2")
    text = template.render(document=document, problem_types=PROBLEM_TYPES)
    return text.encode(), _page_headers(text)


def _page_headers(text: str) -> dict[str, str]:
    """Return the headers, with the sha256 of each inline script and style in the policy.

    Injected scripts do not run, since the policy has no hash of them.
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
