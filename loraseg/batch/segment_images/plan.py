"""Planning: the images of the listing that no explanation file names, cut into work units."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from loraseg.batch.core.content_digest import read_etag
from loraseg.batch.segment_images.completed import EXPLANATIONS_PREFIX, CompletedIndex, etag_digest
from loraseg.batch.segment_images.mask_names import MaskNamer, key_id, plain_name, text_digest
from loraseg.storage import ObjectInfo, ObjectStore

__all__ = ["MAX_IMAGE_BYTES", "ImageItem", "ImageWorkUnit", "plan_units", "stale_files"]

# An object is read whole; a PNG or JPEG within the pixel limit is never larger.
MAX_IMAGE_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class ImageItem:
    """An image to segment.

    Attributes:
        key: Key of the image.
        size_bytes: Size of the object as listed.
        etag: Etag as listed, "" if unknown.
        mask: Key of its mask in the output.
    """

    key: str
    size_bytes: int
    etag: str
    mask: str


@dataclass(frozen=True, slots=True)
class ImageWorkUnit:
    """The images of one explanation file.

    Attributes:
        id: Key of the explanation file, derived from the keys of the images.
        items: The images in the order of the listing.
    """

    id: str
    items: tuple[ImageItem, ...]

    def __str__(self) -> str:
        """Return the first and the last key."""
        return f"images {self.items[0].key!r} to {self.items[-1].key!r}"


def stale_files(images: ObjectStore, completed: CompletedIndex) -> set[str]:
    """Return the explanation files with an image that was replaced since, or that failed.

    The listing of a folder has no etags: there, every completed image is read.
    """
    files = {name for name, summary in completed.files.items() if summary.statuses.get("failed")}
    for listed in images.list_objects() if len(completed.ids) else ():
        entry = completed.find_image(text_digest(listed.key))
        if entry is None or entry[1] in files:
            continue
        etag = listed.etag if listed.etag is not None else _read_etag(images, listed)
        if etag is not None and etag_digest(etag) != entry[0]:
            files.add(entry[1])
    return files


def plan_units(
    listing: Iterable[ObjectInfo], completed: CompletedIndex, images_per_unit: int
) -> Iterator[ImageWorkUnit]:
    """Cut the images that are not completed into units, in listing order.

    Needs memory for one unit. Keys that end with "/" mark folders and are skipped.

    Args:
        listing: Objects below the URI of the images, in code point order.
        completed: Images of earlier runs.
        images_per_unit: Size of a unit; the last one may be smaller.
    """
    namer = MaskNamer()
    pending: list[ImageItem] = []
    for listed in listing:
        if listed.key.endswith("/"):
            continue
        done = text_digest(listed.key) in completed
        plain = plain_name(listed.key)
        taken = not done and plain is not None and completed.has_mask(plain)
        mask = namer.assign(listed.key, taken=taken)
        if done:
            continue
        pending.append(ImageItem(listed.key, listed.size_bytes, listed.etag or "", mask))
        if len(pending) == images_per_unit:
            yield _make_unit(pending)
            pending = []
    if pending:
        yield _make_unit(pending)


def _make_unit(items: Sequence[ImageItem]) -> ImageWorkUnit:
    ids = "\n".join(key_id(item.key) for item in items)
    return ImageWorkUnit(
        f"{EXPLANATIONS_PREFIX}/{hashlib.sha256(ids.encode()).hexdigest()[:32]}.parquet",
        tuple(items),
    )


def _read_etag(images: ObjectStore, listed: ObjectInfo) -> str | None:
    """Return the etag, "" for an image too large to read, None for a deleted one."""
    # An image that has become too large differs from the one that was segmented.
    return "" if listed.size_bytes > MAX_IMAGE_BYTES else read_etag(images, listed.key)
