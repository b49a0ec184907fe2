"""Write the results of an evaluation."""

from loraseg.evaluate.report import build_report
from loraseg.evaluate.results import EvaluationResults, results_table
from loraseg.reports.page import render_report
from loraseg.storage import absolute_uri, open_store

__all__ = ["write_results"]


def write_results(results: EvaluationResults, output: str) -> str:
    """Write results.json, table.txt and report.html; return the URI of the report.

    Each file is written atomically, results.json last.

    Args:
        results: The results.
        output: A folder or a store URI. Jobs on a cluster need a store: the working directory of a
            Ray job is temporary.

    Raises:
        DatasetError: An example cannot be drawn.
        StoreError: The store cannot be written to.
    """
    uri = absolute_uri(output)
    store = open_store(uri)
    store.put("report.html", render_report(build_report(results)).encode())
    store.put("table.txt", results_table(results).encode())
    store.put("results.json", results.to_json().encode())
    return f"{uri.rstrip('/')}/report.html"
