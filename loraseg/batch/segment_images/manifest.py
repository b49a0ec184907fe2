"""The manifest of a segmentation output: its presence says that all listed images are done."""

import contextlib
from collections import Counter
from collections.abc import Mapping

from loraseg.batch.core.output import publish
from loraseg.batch.segment_images.completed import FileSummary
from loraseg.batch.segment_images.state import STATE_FORMAT, SegmentationRunState
from loraseg.storage import ObjectNotFoundError, ObjectStore
from loraseg.storage.json_io import readable_json

__all__ = ["MANIFEST", "count_statuses", "encode_manifest", "write_manifest"]

MANIFEST = "manifest.json"


def count_statuses(files: Mapping[str, FileSummary]) -> dict[str, int]:
    """Return the number of images by status."""
    total: Counter[str] = Counter()
    for summary in files.values():
        total.update(summary.statuses)
    return dict(sorted(total.items()))


def encode_manifest(state: SegmentationRunState, files: Mapping[str, FileSummary]) -> bytes:
    """Return the manifest: settings, counts, and every explanation file with its sha256.

    It holds no time of day: equal inputs give equal bytes.
    """
    statuses = count_statuses(files)
    content = {
        **STATE_FORMAT.to_json(state),
        "images": sum(statuses.values()),
        "statuses": statuses,
        "explanations": [
            {"file": name, "images": sum(summary.statuses.values()), "sha256": summary.sha256}
            for name, summary in sorted(files.items())
        ],
    }
    return readable_json(content)


def write_manifest(output: ObjectStore, data: bytes) -> None:
    """Write the manifest, unless it is there already.

    Raises:
        StageError: Another run wrote another manifest at the same time.
        StoreError: The store cannot be read or written.
    """
    current, etag = None, None
    with contextlib.suppress(ObjectNotFoundError):
        current, etag = output.get_with_etag(MANIFEST)
    if current == data:
        return
    publish(
        output,
        MANIFEST,
        data,
        etag,
        conflict=(
            f"{output.uri}: another run finished at the same time with other images; run again"
        ),
    )
