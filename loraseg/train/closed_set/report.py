"""The HTML report of a segmenter's training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loraseg.reports.curves import CurvePlot, finite_points
from loraseg.reports.formatting import format_difference, format_percent
from loraseg.reports.heatmaps import HeatmapTable
from loraseg.reports.page import HtmlReport, Section, StatTile, render_report
from loraseg.reports.pictures import Prediction, ReportExample
from loraseg.reports.settings import KeyValues, flatten
from loraseg.reports.tables import Table
from loraseg.segment.closed_set.checkpoint import decode_closed_set_segmenter
from loraseg.train.closed_set.loop import TrainingData

__all__ = ["render_training_report"]

_EXAMPLES = 6
# Smaller shares of a confusion matrix are printed as empty cells.
_SMALLEST_SHARE = 0.005


def render_training_report(
    results: Mapping[str, Any], data: TrainingData, segmenters: Mapping[str, bytes]
) -> str:
    """Return a self-contained HTML page.

    Args:
        results: The content of ``results.json``.
        data: The training data; its first validation pairs are shown.
        segmenters: The segmenter file of each run, by name.

    Raises:
        DatasetError: A validation pair is not usable.
        IntegrityError: A file is not a segmenter.
    """
    runs: Mapping[str, Any] = results["arms"]
    classes: Sequence[str] = results["classes"]
    settings = flatten({**results["settings"], "code": results["code_revision"]})
    digests = [(f"sha256 of {name}", str(run["sha256"])) for name, run in runs.items()]
    return render_report(
        HtmlReport(
            title="Segmenter training",
            summary=_summary(runs),
            tiles=[
                StatTile(
                    label=f"{name}, mIoU",
                    value=f"{format_percent(run['miou'])} %",
                    note=f"after {run['step']} steps",
                )
                for name, run in runs.items()
            ],
            sections=[
                Section(title="Curves", blocks=_plots(runs)),
                Section(
                    title="IoU by class",
                    note="Percent, of the best checkpoint on the validation images; a dash where a "
                    "class neither occurs nor was predicted.",
                    blocks=[_class_table(classes, runs)],
                ),
                *(
                    Section(
                        title=f"Confusion of {name}",
                        note="Predicted classes (columns) of the pixels of each labelled class "
                        "(rows), in percent of the row; below half a percent left out.",
                        blocks=[_confusion_table(classes, run)],
                    )
                    for name, run in runs.items()
                ),
                Section(title="Examples", blocks=_examples(data, segmenters)),
                Section(title="Settings", blocks=[KeyValues(rows=[*settings, *digests])]),
            ],
        )
    )


def _summary(runs: Mapping[str, Any]) -> str:
    parts = [
        f"{name}: mIoU {format_percent(run['miou'])} % after {run['step']} steps"
        for name, run in runs.items()
    ]
    if len(runs) > 1:
        parts.append("the control was trained on the real images alone, for the same steps")
    return "; ".join(parts) + "."


def _plots(runs: Mapping[str, Any]) -> list[CurvePlot]:
    scores = {
        name: [(step, 100 * score) for step, score in finite_points(run["scores"])]
        for name, run in runs.items()
    }
    losses = {name: finite_points(run["losses"]) for name, run in runs.items()}
    return [CurvePlot("Validation mIoU, percent", scores), CurvePlot("Training loss", losses)]


def _class_table(classes: Sequence[str], runs: Mapping[str, Any]) -> Table:
    """Return the IoU by class and run, the mean in the last row, and the difference of two runs."""
    rows = [(name, [run["iou"][name] for run in runs.values()]) for name in classes]
    rows.append(("mean", [run["miou"] for run in runs.values()]))
    compared = len(runs) == 2
    return Table(
        header=["Class", *runs, *(["difference"] if compared else [])],
        rows=[
            [
                name,
                *(format_percent(value) for value in values),
                *([format_difference(*values)[0]] if compared else []),
            ]
            for name, values in rows
        ],
        has_total=True,
    )


def _confusion_table(classes: Sequence[str], run: Mapping[str, Any]) -> HeatmapTable:
    """Return the row-normalised confusion matrix, without the rows of classes that do not occur."""
    counts = np.array(run["confusion"], np.float64)
    totals = counts.sum(axis=1)
    present = [index for index in range(len(classes)) if totals[index]]
    return HeatmapTable(
        rows=[classes[index] for index in present],
        columns=classes,
        values=[(counts[index, : len(classes)] / totals[index]).tolist() for index in present],
        digits=0,
        blank_below=_SMALLEST_SHARE,
    )


def _examples(data: TrainingData, segmenters: Mapping[str, bytes]) -> list[ReportExample]:
    """Return the first validation pairs with the label map of every segmenter."""
    networks = {name: decode_closed_set_segmenter(file, name) for name, file in segmenters.items()}
    examples: list[ReportExample] = []
    for index in range(min(_EXAMPLES, sum(data.val.windows[0]))):
        image, label = data.val.load(0, index)
        maps = {"truth": label}
        maps |= {name: network.labels(image[None])[0] for name, network in networks.items()}
        examples.append(
            ReportExample(
                title=f"Validation image {index + 1}",
                image=image,
                label_space=data.label_space,
                predictions=[Prediction(title=title, labels=map_) for title, map_ in maps.items()],
            )
        )
    return examples
