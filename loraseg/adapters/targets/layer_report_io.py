"""Layer reports at a path or URI."""

from loraseg.adapters.targets.layer_report import MAX_REPORT_BYTES, LayerReport
from loraseg.errors import ConfigError, IntegrityError
from loraseg.storage import ObjectNotFoundError, ObjectStore, absolute_uri, open_store

__all__ = ["find_layer_report", "open_parent_store", "read_layer_report", "split_uri"]


def split_uri(uri: str) -> tuple[str, str]:
    """Return folder and name of a file such as ``s3://bucket/reports/fog.json``.

    Raises:
        ConfigError: It names no file.
    """
    folder, _, name = absolute_uri(uri).rpartition("/")
    if name in ("", ".", "..") or folder.endswith(("://", ":/")):
        raise ConfigError(f"{uri!r}: expected a file, such as reports/fog.json")
    return folder or "/", name


def open_parent_store(uri: str) -> tuple[ObjectStore, str]:
    """Return the store and the key of a file.

    Raises:
        ConfigError: It names no file, or a store of an unknown kind.
    """
    folder, name = split_uri(uri)
    return open_store(folder), name


def read_layer_report(uri: str) -> LayerReport:
    """Read a report.

    Raises:
        ConfigError: There is no such file.
        IntegrityError: It is damaged, or something else.
        StoreError: It cannot be read.
    """
    report = find_layer_report(uri)
    if report is None:
        raise ConfigError(f"{uri}: no such layer report")
    return report


def find_layer_report(uri: str) -> LayerReport | None:
    """Read a report; None if there is nothing.

    Raises:
        IntegrityError: As in :func:`read_report`, like the others.
    """
    store, key = open_parent_store(uri)
    try:
        data = store.get(key)
    except ObjectNotFoundError:
        return None
    if len(data) > MAX_REPORT_BYTES:
        raise IntegrityError(
            f"{uri}: {len(data)} bytes, a layer report has at most {MAX_REPORT_BYTES}"
        )
    try:
        return LayerReport.from_bytes(data)
    except IntegrityError as error:
        raise IntegrityError(f"{uri}: {error}") from error
