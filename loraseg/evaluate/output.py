"""Write what an evaluation found into a folder."""

from loraseg.evaluate.page import build_report
from loraseg.evaluate.report import render_report
from loraseg.evaluate.results import EvaluationResults, results_table
from loraseg.storage import absolute_uri, open_store

__all__ = ["write_results"]


def write_results(results: EvaluationResults, output: str) -> str:
    """Write results.json, table.txt and report.html; return where the report is.

    Each file appears whole or not at all, results.json last.

    Args:
        results: What was found.
        output: A folder or a store URI; jobs of a cluster want a store, since the folder that they
            run in goes away.

    Raises:
        StoreError: It cannot be written to.
    """
    place = absolute_uri(output)
    store = open_store(place)
    store.put("report.html", render_report(build_report(results)).encode())
    store.put("table.txt", results_table(results).encode())
    store.put("results.json", results.to_json().encode())
    return f"{place.rstrip('/')}/report.html"
