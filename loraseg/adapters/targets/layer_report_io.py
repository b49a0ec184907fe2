"""Layer reports at a path or URI."""

from loraseg.adapters.targets.layer_report import MAX_REPORT_BYTES, LayerReport
from loraseg.errors import ConfigError, IntegrityError
from loraseg.storage import ObjectNotFoundError, open_parent_store

__all__ = ["find_layer_report", "read_layer_report"]


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
