"""What all exports share: checked pairs, safe names, and a folder that appears when it is whole."""

import contextlib
import re
import shutil
import uuid
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from loraseg.data.shards.pictures import decode_pair
from loraseg.data.shards.reader import ShardDataset
from loraseg.errors import ConfigError, DatasetError, IntegrityError, StoreError
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["ExportPair", "atomic_directory", "check_file_name", "iter_pairs"]

# No dot in front and no separator: such a name stays in its folder on every system.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_PNG = b"\x89PNG"
_COLUMNS = ("image", "label", "height", "width", "mask_id", "k", "seed", "prompt", "kept")


@dataclass(frozen=True, slots=True, eq=False)
class ExportPair:
    """An ``ok`` pair whose pictures are known to be whole.

    Attributes:
        id: Hex digits, so that it may name a file.
        suffix: Of the image file, ``png`` or ``jpg``.
        image: The file's bytes.
        label: Bytes of a PNG.
        pixels: The image, RGB.
        label_ids: The label (h, w), uint8 or uint16.
        metadata: The other columns of a pair, as JSON values.
    """

    id: str
    suffix: str
    image: bytes
    label: bytes
    pixels: UInt8[ndarray, "h w 3"]
    label_ids: ndarray
    metadata: dict[str, str | int | float | None]


def iter_pairs(dataset: ShardDataset) -> Iterator[ExportPair]:
    """Yield every ``ok`` pair, decoded and so known to be whole.

    Raises:
        IntegrityError: A shard or picture is damaged, or two pairs have one id.
        StoreError: The store cannot be read.
    """
    where = dataset.store.uri
    seen: set[bytes] = set()
    for row in dataset.rows(columns=_COLUMNS):
        pixels, ids = decode_pair(row, len(dataset.manifest.classes), where)
        if row.pair_id is None or row.image is None or row.label is None:
            raise IntegrityError(f"{where}: a pair of mask {row.mask_name!r} is not whole")
        key = row.pair_id.encode()
        if key in seen:
            raise IntegrityError(f"{where}: pair {row.pair_id} is in two shards")
        seen.add(key)
        facts = {name: getattr(row, name) for name in ("mask_name", *_COLUMNS[4:])}
        suffix = "png" if row.image.startswith(_PNG) else "jpg"
        yield ExportPair(row.pair_id, suffix, row.image, row.label, pixels, ids, facts)


@contextlib.contextmanager
def atomic_directory(folder: str | Path) -> Generator[Path, None, None]:
    """Give a hidden folder beside ``folder``, which gets that name if all goes well.

    Raises:
        DatasetError: There is something at ``folder`` already.
        StoreError: It cannot be written.
    """
    target = Path(folder)
    partial = target.parent / f".{target.name}-{uuid.uuid4().hex}"
    if target.exists():
        raise DatasetError(f"{target}: is there already; an export makes a new folder")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{target}: cannot write: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_file_name(name: str, what: str) -> str:
    """Return a name that files may start with.

    Raises:
        ConfigError: It might leave its folder.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{what}: got {name[:80]!r}, expected letters, digits, '_' and '-'")
    return name
