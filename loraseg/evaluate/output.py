"""Write what an evaluation found into a folder."""

from pathlib import Path

from loraseg.errors import StoreError
from loraseg.evaluate.page import report_of
from loraseg.evaluate.report import render_report
from loraseg.evaluate.results import Results, table

__all__ = ["write_results"]


def write_results(results: Results, folder: str | Path) -> Path:
    """Write results.json, table.txt and report.html; return the report's path.

    Each file appears whole or not at all, results.json last.

    Raises:
        StoreError: The folder cannot be written to.
    """
    folder = Path(folder).expanduser().resolve()
    files = {
        "report.html": render_report(report_of(results)),
        "table.txt": table(results),
        "results.json": results.to_json(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            partial = folder / f".{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.rename(folder / name)
    except OSError as error:
        raise StoreError(f"{folder}: cannot write the results: {error.strerror}") from error
    return folder / "report.html"
