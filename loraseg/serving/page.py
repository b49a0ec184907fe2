"""The page at ``/``: one file, which may run nothing but its own inline script."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

__all__ = ["page"]

_INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1>", re.DOTALL | re.IGNORECASE)


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """Return the page and its headers.

    The policy names the inline script and style by their sha256, so that nothing else runs,
    whatever text finds its way into the page.
    """
    # As a browser hashes it: line breaks are normalised while HTML is parsed.
    content = files("loraseg.serving").joinpath("static", "index.html").read_bytes()
    text = content.decode().replace("\r\n", "\n")
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
    return text.encode(), {
        "Content-Security-Policy": "; ".join(f"{key} {value}" for key, value in policy.items()),
        "Cache-Control": "no-cache",
    }
