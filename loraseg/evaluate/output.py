"""Write what an evaluation found into a folder."""

from loraseg.evaluate.page import report_of
from loraseg.evaluate.report import render_report
from loraseg.evaluate.results import Results, table
from loraseg.storage import absolute, open_store

__all__ = ["write_results"]


def write_results(results: Results, output: str) -> str:
    """Write results.json, table.txt and report.html; return where the report is.

    Each file appears whole or not at all, results.json last.

    Args:
        results: What was found.
        output: A folder or a store URI; jobs of a cluster want a store, since the folder that they
            run in goes away.

    Raises:
        StoreError: It cannot be written to.
    """
    place = absolute(output)
    store = open_store(place)
    store.put("report.html", render_report(report_of(results)).encode())
    store.put("table.txt", table(results).encode())
    store.put("results.json", results.to_json().encode())
    return f"{place.rstrip('/')}/report.html"
