"""Turn results into the report's values."""

from collections.abc import Sequence

from loraseg.data.labels import LabelSpace
from loraseg.evaluate import leave_one_out, report_data
from loraseg.evaluate.leave_one_out import METHODS, Method, TargetScores
from loraseg.evaluate.results import METHOD_LABELS, PAPER_HMEANS, EvaluationResults, hmeans
from loraseg.segment.metrics import ConfusionMatrix
from loraseg.tensor_types import ndarray

__all__ = ["build_report"]

_METHOD_NOTES: dict[Method, str] = {
    "zero_shot": "the base alone",
    "uniform": "all other adapters, equal weights, one pass",
    "semla": "the nearest adapters of each image, fused by weight, one pass",
    "late_uniform": "every other adapter alone, score maps averaged",
    "late_semla": "SemLA's weights on score maps, one pass per adapter",
    "oracle": "the domain's own adapter",
}
_HEATMAP_METHODS: tuple[Method, ...] = ("zero_shot", "semla")


def build_report(results: EvaluationResults) -> report_data.HtmlReport:
    """Return what the HTML report shows of an evaluation."""
    targets = results.targets
    summary = results.summary()
    means, gap = summary["hmean"], summary["gap_closed"]
    share = "undefined" if gap is None else f"{100 * gap:.0f} %"
    return report_data.HtmlReport(
        title="Leave-one-out evaluation",
        summary=(
            f"{len(targets)} domains, each scored without its own adapter. h-mean of mIoU: "
            + ", ".join(f"{METHOD_LABELS[method]} {100 * means[method]:.1f}" for method in means)
            + f". SemLA is ahead of uniform in {summary['semla_ahead_of_uniform']} of "
            f"{len(targets)} domains."
        ),
        scores=_scores("mIoU by domain", targets),
        tiles=(
            *(
                report_data.StatTile(
                    label=f"{METHOD_LABELS[method]}, h-mean",
                    value=f"{100 * means[method]:.1f}",
                    note=f"paper {100 * PAPER_HMEANS[method]:.1f}",
                )
                for method in ("zero_shot", "uniform", "semla")
            ),
            report_data.StatTile(label="gap to the oracle closed", value=share, note="paper 68 %"),
        ),
        more_scores=_scores_without_isolated(results),
        weights=_weights(targets),
        heat_tables=_heatmap_tables(targets),
        examples=tuple(
            _example(target, example) for target in targets for example in target.examples
        ),
        settings=results.provenance.get("config", {}),
        provenance=_provenance(results),
        notes=(
            "mIoU runs over the classes that occur in a domain's labels; a class that is only "
            "predicted lowers the others' IoU.",
            "K and tau of a domain were chosen on domains of other families."
            if results.tuning
            else "K and tau were given, the same for all domains.",
            "The paper's figures stand for 20 public datasets and CAT-Seg L: for the shape of the "
            "comparison, not for its level.",
        ),
    )


def _scores(title: str, targets: Sequence[TargetScores]) -> report_data.ScoreTable:
    means = hmeans(targets)
    return report_data.ScoreTable(
        title=title,
        domains=tuple(target.name for target in targets),
        rows=tuple(
            report_data.MethodRow(
                name=METHOD_LABELS[method],
                scores=tuple(
                    target.methods[method].miou if method in target.methods else None
                    for target in targets
                ),
                hmean=means[method],
                note=_METHOD_NOTES[method],
                is_bound=method == "oracle",
            )
            for method in METHODS
            if method in means
        ),
        baseline=METHOD_LABELS["zero_shot"],
    )


def _scores_without_isolated(results: EvaluationResults) -> tuple[report_data.ScoreTable, ...]:
    kept = [target for target in results.targets if target.name not in results.isolated]
    if not results.isolated or not kept:
        return ()
    return (_scores(f"Without {', '.join(results.isolated)}", kept),)


def _weights(targets: Sequence[TargetScores]) -> report_data.WeightMatrix:
    adapters = tuple(dict.fromkeys(name for target in targets for name in target.weights))
    # Rows and columns in one order, so that the empty cells form the diagonal.
    order = {target.name: index for index, target in enumerate(targets)}
    adapters = tuple(sorted(adapters, key=lambda name: order.get(name, len(order))))
    return report_data.WeightMatrix(
        targets=tuple(target.name for target in targets),
        adapters=adapters,
        weights=tuple(tuple(target.weights.get(name) for name in adapters) for target in targets),
    )


def _heatmap_tables(targets: Sequence[TargetScores]) -> tuple[report_data.HeatmapTable, ...]:
    classes = tuple(dict.fromkeys(name for target in targets for name in target.classes))

    def values(method: Method) -> tuple[tuple[float | None, ...], ...]:
        by_class = [
            dict(zip(target.classes, target.methods[method].iou, strict=True)) for target in targets
        ]
        return tuple(tuple(row.get(name) for name in classes) for row in by_class)

    rows = tuple(target.name for target in targets)
    tables = [
        report_data.HeatmapTable(
            title=f"IoU by class, {METHOD_LABELS[method]}",
            rows=rows,
            columns=classes,
            values=values(method),
        )
        for method in _HEATMAP_METHODS
    ]
    base, ours = values("zero_shot"), values("semla")
    gains = tuple(
        tuple(None if a is None or b is None else b - a for a, b in zip(*pair, strict=True))
        for pair in zip(base, ours, strict=True)
    )
    title = "IoU by class, SemLA minus zero-shot"
    tables.append(
        report_data.HeatmapTable(title=title, rows=rows, columns=classes, values=gains, signed=True)
    )
    return tuple(tables)


def _example(
    target: TargetScores, example: leave_one_out.ScoredExample
) -> report_data.ReportExample:
    predictions = [report_data.Prediction(title="truth", labels=example.label)]
    for method, labels in example.predictions.items():
        score = _image_miou(example.label, labels, len(target.classes))
        predictions.append(
            report_data.Prediction(title=METHOD_LABELS[method], labels=labels, score=score)
        )
    return report_data.ReportExample(
        title=f"{target.name}, image {example.sample}",
        image=example.image,
        label_space=LabelSpace(target.classes),
        predictions=tuple(predictions),
        retrieved=tuple(
            report_data.MixEntry(adapter=name, weight=weight, distance=distance)
            for name, weight, distance in example.retrieved
        ),
    )


def _image_miou(label: ndarray, predicted: ndarray, classes: int) -> float | None:
    if (label == 255).all():
        return None
    count = ConfusionMatrix(classes)
    count.add(label, predicted)
    return count.miou()


def _provenance(results: EvaluationResults) -> dict[str, str]:
    known = results.provenance
    lines = {
        "code": str(known.get("code_revision", "")),
        "seed": str(known.get("seed", "")),
        "encoder": str(known.get("encoder", "")),
    }
    if base := known.get("base"):
        lines["base"] = f"{base['name']} {base['digest']}"
    for name, adapter in known.get("adapters", {}).items():
        lines[f"adapter {name}"] = f"{adapter['digest']} (version {adapter['version']})"
    for target in results.targets:
        lines[f"images {target.name}"] = f"{target.data_digest} ({target.images} images)"
    return {name: text for name, text in lines.items() if text}
