"""Where an image's mask goes: under its own name where that is safe, else under a digest."""

import hashlib
import re

from loraseg.storage.store import key_error

__all__ = ["MASKS_PREFIX", "MaskNamer", "key_id", "plain_name", "text_digest"]

MASKS_PREFIX = "masks"
_PLAIN = re.compile(r"(.*[^/.])\.(?:png|jpe?g)", re.IGNORECASE | re.DOTALL)
_MAX_BYTES = 512  # leaves room for the prefix of the output within S3's 1024
_LOOKS_HASHED = re.compile(r"~[0-9a-f]{32}$")


def key_id(key: str) -> str:
    """Return 32 hex digits that stand for an image's key, whatever characters it has."""
    return text_digest(key).hex()


def text_digest(text: str) -> bytes:
    """Return the first 16 bytes of the sha256 of any text, lone surrogates included."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


class MaskNamer:
    """Names masks for a listing in code point order; two keys never get one name.

    A mask has its image's key with the extension ``.png``. Of ``a.jpg`` and ``a.png`` only the
    first gets ``masks/a.png``; the other, like any key without an extension of an image, gets
    ``masks/a~ID.png``, and a key that no store could hold gets ``masks/~ID.png``, where ID is
    :func:`id_of` the key. Keys that look like such names get one themselves.
    """

    def __init__(self) -> None:
        # All keys that start with "a." follow each other, so that only the open stems count.
        self._open_stems: list[str] = []

    def assign(self, key: str, *, taken: bool = False) -> str:
        """Return the mask's key for the next image of the listing.

        Args:
            key: Of the image.
            taken: Whether :func:`plain_name` belongs to another image.
        """
        hashed = f"~{key_id(key)}.png"
        stem = _plain_stem(key)
        if stem is None:
            return _valid_name(f"{MASKS_PREFIX}/{key}{hashed}") or f"{MASKS_PREFIX}/{hashed}"
        while self._open_stems and not key.startswith(f"{self._open_stems[-1]}."):
            self._open_stems.pop()
        if taken or stem in self._open_stems:
            return _valid_name(f"{MASKS_PREFIX}/{stem}{hashed}") or f"{MASKS_PREFIX}/{hashed}"
        self._open_stems.append(stem)
        return f"{MASKS_PREFIX}/{stem}.png"


def plain_name(key: str) -> str | None:
    """Return the mask's key if no other image had a claim on it; None if it cannot be plain."""
    stem = _plain_stem(key)
    return None if stem is None else f"{MASKS_PREFIX}/{stem}.png"


def _plain_stem(key: str) -> str | None:
    found = _PLAIN.fullmatch(key)
    if found is None or _LOOKS_HASHED.search(found[1]):
        return None
    return found[1] if _valid_name(f"{MASKS_PREFIX}/{found[1]}.png") else None


def _valid_name(name: str) -> str | None:
    """Return the name if every store can hold it beside all others.

    A folder store cannot hold both ``a.png`` and ``a.png/b.png``; masks are all that ends so.
    """
    within = any(folder.lower().endswith(".png") for folder in name.split("/")[:-1])
    return None if key_error(name) or within or len(name.encode()) > _MAX_BYTES else name
