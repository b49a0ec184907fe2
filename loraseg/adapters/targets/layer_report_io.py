"""Reading of layer reports from a path or URI."""

from loraseg.adapters.targets.layer_report import MAX_REPORT_BYTES, LayerReport
from loraseg.errors import ConfigError, IntegrityError
from loraseg.storage import ObjectNotFoundError, open_parent_store

__all__ = ["find_layer_report", "read_layer_report"]


def read_layer_report(uri: str) -> LayerReport:
    """Read a report.

    Raises:
        ConfigError: The file does not exist.
        IntegrityError: The file is not a valid report.
        StoreError: The file cannot be read.
    """
    report = find_layer_report(uri)
    if report is None:
        raise ConfigError(f"{uri}: layer report does not exist")
    return report


def find_layer_report(uri: str) -> LayerReport | None:
    """Read a report; return None if the file does not exist.

    Raises:
        IntegrityError: The file is not a valid report.
        StoreError: The file cannot be read.
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
