"""The manifest: written when all images of a listing are done, so it says that they are."""

import contextlib
import json
from collections import Counter
from collections.abc import Mapping

from loraseg.batch.segment_images.completed import FileSummary
from loraseg.batch.segment_images.state import SegmentationRunState
from loraseg.errors import StageError
from loraseg.storage import ObjectNotFoundError, ObjectStore

__all__ = ["MANIFEST", "count_statuses", "encode_manifest", "write_manifest"]

MANIFEST = "manifest.json"


def count_statuses(files: Mapping[str, FileSummary]) -> dict[str, int]:
    """Return how many images ended how."""
    total: Counter[str] = Counter()
    for facts in files.values():
        total.update(facts.statuses)
    return dict(sorted(total.items()))


def encode_manifest(state: SegmentationRunState, files: Mapping[str, FileSummary]) -> bytes:
    """Return the manifest: settings, counts, and every explanation file with its sha256.

    It holds no time of day: equal inputs give equal bytes.
    """
    statuses = count_statuses(files)
    content = {
        **state.to_json(),
        "images": sum(statuses.values()),
        "statuses": statuses,
        "explanations": [
            {"file": name, "images": sum(facts.statuses.values()), "sha256": facts.sha256}
            for name, facts in sorted(files.items())
        ],
    }
    return (json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_manifest(output: ObjectStore, data: bytes) -> bool:
    """Write the manifest unless it is there already; return whether it was written.

    Raises:
        StageError: Another run wrote another one at the same time.
    """
    with contextlib.suppress(ObjectNotFoundError):
        known, etag = output.get_with_etag(MANIFEST)
        if known == data:
            return False
        if output.put_if_match(MANIFEST, data, etag):
            return True
    if not output.put_if_absent(MANIFEST, data) and output.get(MANIFEST) != data:
        raise StageError(
            f"{output.uri}: another run finished at the same time with other images; run again"
        )
    return True
