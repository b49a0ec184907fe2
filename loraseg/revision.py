"""Identify the code that produced a result: the version and a digest of the source files.

A git commit is not used because a cluster runs an uploaded copy without ``.git``, and because a
commit does not cover uncommitted changes. Equal sources have equal digests on every machine.
"""

import functools
import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["code_revision"]


@functools.cache
def code_revision() -> str:
    """Return ``<version>+src.<12 hex digits>``, e.g. ``0.1.0+src.3f9c0a1b2c3d``."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    try:
        release = version("loraseg")
    except PackageNotFoundError:
        release = "0"
    return f"{release}+src.{digest.hexdigest()[:12]}"
