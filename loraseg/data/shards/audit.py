"""Checks a committed synthetic dataset."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import get_args

from loraseg.data.shards.manifest import SHARDS_PREFIX, ShardEntry
from loraseg.data.shards.pictures import decode_label, decode_pair
from loraseg.data.shards.reader import ShardDataset
from loraseg.data.shards.schema import PairRow, PairStatus, rows_digest
from loraseg.data.untrusted_images import image_size
from loraseg.errors import DatasetError, IntegrityError
from loraseg.storage import ObjectNotFoundError

__all__ = ["ShardAuditReport", "audit_shards"]

_SETTINGS_KEY = "dataset.json"
_ALL = get_args(PairStatus)


@dataclass(frozen=True, slots=True)
class ShardAuditReport:
    """The result of a check.

    Attributes:
        rows: Number of rows.
        problems: Damage, one line each.
        uncommitted: Shards that the manifest does not name, of a running or stopped job.
            Readers do not see them.
        digest: :func:`loraseg.data.shards.schema.rows_digest` of all rows, None if there is damage.
    """

    rows: int
    problems: tuple[str, ...]
    uncommitted: tuple[str, ...]
    digest: str | None


def audit_shards(dataset: ShardDataset) -> ShardAuditReport:
    """Compare every digest, decode every image, and search for duplicate pairs.

    Raises:
        StoreError: The store cannot be read.
    """
    audit = _ShardAuditor(dataset)
    digest = rows_digest(audit.rows())
    audit.check_settings()
    named = {entry.file for entry in dataset.manifest.shards}
    stored = [key for key in dataset.store.list(f"{SHARDS_PREFIX}/") if key not in named]
    problems = tuple(audit.problems)
    return ShardAuditReport(audit.count, problems, tuple(stored), None if problems else digest)


class _ShardAuditor:
    def __init__(self, dataset: ShardDataset) -> None:
        self._dataset = dataset
        self._seen_pair_ids: set[str] = set()
        self.problems: list[str] = []
        self.count = 0

    def rows(self) -> Iterator[PairRow]:
        for entry in self._dataset.manifest.shards:
            try:
                yield from self._rows_of(entry)
            except IntegrityError as error:
                self.problems.append(str(error))

    def _rows_of(self, entry: ShardEntry) -> Iterator[PairRow]:
        where = f"{self._dataset.store.uri}/{entry.file}"
        for row in self._dataset.read_shard(entry):
            self.count += 1
            try:
                self._check_row(row, where)
            except IntegrityError as error:
                self.problems.append(str(error))
            yield row

    def _check_row(self, row: PairRow, where: str) -> None:
        if row.pair_id is not None:
            if row.pair_id in self._seen_pair_ids:
                raise IntegrityError(f"{where}: pair {row.pair_id} is in another shard too")
            self._seen_pair_ids.add(row.pair_id)
        classes = len(self._dataset.manifest.classes)
        if row.image is not None and row.label is not None:
            decode_pair(row, classes, where)
        try:
            for data in (row.mask, row.predicted):
                if data is not None:
                    decode_label(data, classes)
                    if row.width is not None and image_size(data) != (row.width, row.height):
                        raise DatasetError("mask or prediction of another size")
        except DatasetError as error:
            raise IntegrityError(f"{where}: pair {row.pair_id}: {error}") from error

    def check_settings(self) -> None:
        where = f"{self._dataset.store.uri}/{_SETTINGS_KEY}"
        try:
            digest = sha256(self._dataset.store.get(_SETTINGS_KEY)).hexdigest()
        except ObjectNotFoundError:
            self.problems.append(f"{where}: is missing")
            return
        if digest != self._dataset.manifest.dataset_sha256:
            self.problems.append(f"{where}: is not the one that the manifest was made with")
