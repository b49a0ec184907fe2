"""File names of images, and the stems that pair an image with its mask."""

from pathlib import PurePosixPath

__all__ = ["image_stem", "is_safe_stem"]

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def image_stem(name: str) -> str | None:
    """Return the stem of an image's file name, shared with its mask; None for other files."""
    path = PurePosixPath(name)
    if path.suffix.lower() not in _IMAGE_SUFFIXES or name.startswith("."):
        return None
    return path.stem


def is_safe_stem(stem: str) -> bool:
    """Return whether a stem is printable and stays in its folder."""
    return (
        stem not in ("", ".", "..")
        and "/" not in stem
        and "\\" not in stem
        and (stem.isprintable())
    )
