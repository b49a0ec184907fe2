"""Layer reports at a path or URI."""

from loraseg.adapters.layer_report import MAX_REPORT_BYTES, LayerReport
from loraseg.errors import ConfigError, IntegrityError
from loraseg.storage import ObjectNotFoundError, ObjectStore, absolute, open_store

__all__ = ["find_report", "read_report", "split_place", "store_of"]


def split_place(place: str) -> tuple[str, str]:
    """Return folder and name of a file such as ``s3://bucket/reports/fog.json``.

    Raises:
        ConfigError: It names no file.
    """
    folder, _, name = absolute(place).rpartition("/")
    if name in ("", ".", "..") or folder.endswith(("://", ":/")):
        raise ConfigError(f"{place!r}: expected a file, such as reports/fog.json")
    return folder or "/", name


def store_of(place: str) -> tuple[ObjectStore, str]:
    """Return the store and the key of a file.

    Raises:
        ConfigError: It names no file, or a store of an unknown kind.
    """
    folder, name = split_place(place)
    return open_store(folder), name


def read_report(place: str) -> LayerReport:
    """Read a report.

    Raises:
        ConfigError: There is no such file.
        IntegrityError: It is damaged, or something else.
        StoreError: It cannot be read.
    """
    report = find_report(place)
    if report is None:
        raise ConfigError(f"{place}: no such layer report")
    return report


def find_report(place: str) -> LayerReport | None:
    """Read a report; None if there is nothing.

    Raises:
        IntegrityError: As in :func:`read_report`, like the others.
    """
    store, key = store_of(place)
    try:
        data = store.get(key)
    except ObjectNotFoundError:
        return None
    if len(data) > MAX_REPORT_BYTES:
        raise IntegrityError(
            f"{place}: {len(data)} bytes, a layer report has at most {MAX_REPORT_BYTES}"
        )
    try:
        return LayerReport.parse(data)
    except IntegrityError as error:
        raise IntegrityError(f"{place}: {error}") from error
