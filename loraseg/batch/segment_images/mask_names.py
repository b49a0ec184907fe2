"""Names of masks: that of the image where every store can hold it, else with a digest."""

import hashlib
import re

from loraseg.storage.store import key_error

__all__ = ["MASKS_PREFIX", "MaskNamer", "key_id", "plain_name", "text_digest"]

MASKS_PREFIX = "masks"
_PLAIN = re.compile(r"(.*[^/.])\.(?:png|jpe?g)", re.IGNORECASE | re.DOTALL)
_MAX_BYTES = 512  # leaves room for the prefix of the output: S3 allows 1024
_LOOKS_HASHED = re.compile(r"~[0-9a-f]{32}$")


def key_id(key: str) -> str:
    """Return 32 hex digits that identify an image's key."""
    return text_digest(key).hex()


def text_digest(text: str) -> bytes:
    """Return the first 16 bytes of the sha256 of a text, which may have lone surrogates."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


class MaskNamer:
    """Names the masks of a listing in code point order; no two keys get the same name.

    A mask has the key of its image with the extension ``.png``. Of ``a.jpg`` and ``a.png`` the
    first gets ``masks/a.png``. The other, like any key without the extension of an image, gets
    ``masks/a~ID.png``, and a key that not every store can hold gets ``masks/~ID.png``, where ID is
    the key's :func:`key_id`. A key that looks like such a name gets an ID too.
    """

    def __init__(self) -> None:
        # All keys that start with "a." are adjacent, so the stems of the current key suffice.
        self._open_stems: list[str] = []

    def assign(self, key: str, *, taken: bool = False) -> str:
        """Return the mask's key for the next image of the listing.

        Args:
            key: Key of the image.
            taken: Whether another image has the mask :func:`plain_name`.
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
    """Return the mask's key without ID; None if the image's key needs one."""
    stem = _plain_stem(key)
    return None if stem is None else f"{MASKS_PREFIX}/{stem}.png"


def _plain_stem(key: str) -> str | None:
    match = _PLAIN.fullmatch(key)
    if match is None or _LOOKS_HASHED.search(match[1]):
        return None
    return match[1] if _valid_name(f"{MASKS_PREFIX}/{match[1]}.png") else None


def _valid_name(name: str) -> str | None:
    """Return the name if every store can hold it beside all other masks, else None.

    A folder cannot hold both ``a.png`` and ``a.png/b.png``.
    """
    in_mask = any(folder.lower().endswith(".png") for folder in name.split("/")[:-1])
    return None if key_error(name) or in_mask or len(name.encode()) > _MAX_BYTES else name
