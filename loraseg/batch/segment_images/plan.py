"""What is left to do: images of the listing that no explanation file names."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from loraseg.batch.segment_images.completed import EXPLANATIONS_PREFIX, CompletedIndex, etag_digest
from loraseg.batch.segment_images.mask_names import MaskNamer, key_id, plain_name, text_digest
from loraseg.storage import ObjectInfo, ObjectNotFoundError, ObjectStore
from loraseg.storage.store import key_error

__all__ = ["MAX_IMAGE_BYTES", "ImageItem", "ImageWorkUnit", "plan_units", "stale_files"]

# An object is read whole; no PNG or JPEG of as many pixels as are decoded is larger.
MAX_IMAGE_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class ImageItem:
    """One image to segment, and where its mask goes; ``etag`` as it was listed, "" if unknown."""

    key: str
    size_bytes: int
    etag: str
    mask: str


@dataclass(frozen=True, slots=True)
class ImageWorkUnit:
    """A unit of work: the images of one explanation file."""

    file: str
    items: tuple[ImageItem, ...]


def stale_files(images: ObjectStore, completed: CompletedIndex) -> set[str]:
    """Return the explanation files with an image that was replaced since, or that failed.

    A folder keeps no etags: there, every image that is done is read once more.
    """
    files = {name for name, facts in completed.files.items() if facts.statuses.get("failed")}
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
    """Cut the images that are not done into units of ``images_per_unit``, in listing order.

    Needs memory for one part. Markers of empty folders are no images.
    """
    names = MaskNamer()
    waiting: list[ImageItem] = []
    for listed in listing:
        if listed.key.endswith("/"):
            continue
        done = text_digest(listed.key) in completed
        plain = plain_name(listed.key)
        taken = not done and plain is not None and completed.has_mask(plain)
        mask = names.assign(listed.key, taken=taken)
        if done:
            continue
        waiting.append(ImageItem(listed.key, listed.size_bytes, listed.etag or "", mask))
        if len(waiting) == images_per_unit:
            yield _make_unit(waiting)
            waiting = []
    if waiting:
        yield _make_unit(waiting)


def _make_unit(items: Sequence[ImageItem]) -> ImageWorkUnit:
    ids = "\n".join(key_id(item.key) for item in items)
    return ImageWorkUnit(
        f"{EXPLANATIONS_PREFIX}/{hashlib.sha256(ids.encode()).hexdigest()[:32]}.parquet",
        tuple(items),
    )


def _read_etag(images: ObjectStore, listed: ObjectInfo) -> str | None:
    """Return the etag by reading the object, None if it has gone; results of it stay."""
    if listed.size_bytes > MAX_IMAGE_BYTES or key_error(listed.key):
        return ""
    try:
        return images.get_with_etag(listed.key)[1]
    except ObjectNotFoundError:
        return None
