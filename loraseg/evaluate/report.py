"""The HTML report of an evaluation."""

from collections.abc import Sequence

from loraseg.data.labels import LabelSpace
from loraseg.evaluate.leave_one_out import ScoredExample, TargetScores
from loraseg.evaluate.methods import METHODS, Method
from loraseg.evaluate.results import EvaluationResults, hmeans
from loraseg.reports.heatmaps import HeatmapTable, WeightMatrix
from loraseg.reports.page import HtmlReport, Section, StatTile
from loraseg.reports.pictures import MixEntry, Prediction, ReportExample
from loraseg.reports.scores import MethodRow, ScoreTable
from loraseg.reports.settings import KeyValues, flatten
from loraseg.reports.tables import Notes
from loraseg.segment.metrics import ConfusionMatrix
from loraseg.tensor_types import UInt8, ndarray

__all__ = ["build_report"]

_TILE_METHODS: tuple[Method, ...] = ("zero_shot", "uniform", "semla")
_HEATMAP_METHODS: tuple[Method, ...] = ("zero_shot", "semla")


def build_report(results: EvaluationResults) -> HtmlReport:
    """Return the report of an evaluation: scores, mixing weights, IoU by class, examples."""
    targets = results.targets
    examples = [_example(target, example) for target in targets for example in target.examples]
    return HtmlReport(
        title="Leave-one-out evaluation",
        summary=_summary(results),
        tiles=_tiles(results),
        sections=[
            Section(title="mIoU by domain", blocks=[_score_table(targets)]),
            *_isolated_section(results),
            Section(
                title="Mixing weights",
                note="Mean mixing weight of each adapter (columns) over the images of each domain "
                "(rows). Each row sums to one; a dash marks the adapter that was left out.",
                blocks=[_weight_matrix(targets)],
            ),
            *_class_sections(targets),
            *([Section(title="Examples", blocks=examples)] if examples else []),
            _settings_section(results),
        ],
    )


def _summary(results: EvaluationResults) -> str:
    summary = results.summary()
    means = ", ".join(
        f"{METHODS[method].label} {100 * mean:.1f}" for method, mean in summary["hmean"].items()
    )
    return (
        f"{len(results.targets)} domains, each scored without its own adapter. h-mean of mIoU: "
        f"{means}. SemLA is ahead of uniform in {summary['semla_ahead_of_uniform']} of "
        f"{len(results.targets)} domains."
    )


def _tiles(results: EvaluationResults) -> list[StatTile]:
    summary = results.summary()
    gap = summary["gap_closed"]
    tiles = [
        StatTile(
            label=f"{METHODS[method].label}, h-mean",
            value=f"{100 * summary['hmean'][method]:.1f}",
            note=f"paper {100 * METHODS[method].published_hmean:.1f}",
        )
        for method in _TILE_METHODS
    ]
    value = "undefined" if gap is None else f"{100 * gap:.0f} %"
    return [*tiles, StatTile(label="gap to the oracle closed", value=value, note="paper 68 %")]


def _score_table(targets: Sequence[TargetScores]) -> ScoreTable:
    means = hmeans(targets)
    return ScoreTable(
        domains=tuple(target.name for target in targets),
        rows=tuple(
            MethodRow(
                name=method.label,
                scores=tuple(
                    target.methods[name].miou if name in target.methods else None
                    for target in targets
                ),
                hmean=means[name],
                note=method.summary,
                is_bound=method.needs_own_adapter,
            )
            for name, method in METHODS.items()
            if name in means
        ),
        baseline=METHODS["zero_shot"].label,
    )


def _isolated_section(results: EvaluationResults) -> list[Section]:
    related = [target for target in results.targets if target.name not in results.isolated]
    if not results.isolated or not related:
        return []
    title = f"Without {', '.join(results.isolated)}"
    return [Section(title=title, blocks=[_score_table(related)])]


def _weight_matrix(targets: Sequence[TargetScores]) -> WeightMatrix:
    # Rows and columns in one order, so that the empty cells form the diagonal.
    order = {target.name: index for index, target in enumerate(targets)}
    names = dict.fromkeys(name for target in targets for name in target.weights)
    adapters = sorted(names, key=lambda name: order.get(name, len(order)))
    return WeightMatrix(
        targets=[target.name for target in targets],
        adapters=adapters,
        weights=[[target.weights.get(name) for name in adapters] for target in targets],
    )


def _class_sections(targets: Sequence[TargetScores]) -> list[Section]:
    classes = list(dict.fromkeys(name for target in targets for name in target.classes))
    domains = [target.name for target in targets]
    values = {method: _class_iou(method, targets, classes) for method in _HEATMAP_METHODS}
    gains = [
        [None if a is None or b is None else b - a for a, b in zip(*rows, strict=True)]
        for rows in zip(values["zero_shot"], values["semla"], strict=True)
    ]
    tables = {
        f"IoU by class, {METHODS[method].label}": HeatmapTable(
            rows=domains, columns=classes, values=values[method]
        )
        for method in _HEATMAP_METHODS
    }
    tables["IoU by class, SemLA minus zero-shot"] = HeatmapTable(
        rows=domains, columns=classes, values=gains, signed=True
    )
    return [Section(title=title, blocks=[table]) for title, table in tables.items()]


def _class_iou(
    method: Method, targets: Sequence[TargetScores], classes: Sequence[str]
) -> list[list[float | None]]:
    """Return the IoU by domain and class; None where the domain lacks the class."""
    by_class = [
        dict(zip(target.classes, target.methods[method].iou, strict=True)) for target in targets
    ]
    return [[row.get(name) for name in classes] for row in by_class]


def _example(target: TargetScores, example: ScoredExample) -> ReportExample:
    predictions = [Prediction(title="truth", labels=example.label)]
    predictions += [
        Prediction(
            title=METHODS[method].label,
            labels=labels,
            score=_image_miou(example.label, labels, len(target.classes)),
        )
        for method, labels in example.predictions.items()
    ]
    return ReportExample(
        title=f"{target.name}, image {example.sample}",
        image=example.image,
        label_space=LabelSpace(target.classes),
        predictions=predictions,
        retrieved=[
            MixEntry(adapter=name, weight=weight, distance=distance)
            for name, weight, distance in example.retrieved
        ],
    )


def _image_miou(
    label: UInt8[ndarray, "h w"], predicted: UInt8[ndarray, "h w"], classes: int
) -> float | None:
    if (label == 255).all():
        return None
    count = ConfusionMatrix(classes)
    count.add(label, predicted)
    return count.miou()


def _settings_section(results: EvaluationResults) -> Section:
    notes = (
        "mIoU is the mean over the classes that occur in a domain's labels; a class that is only "
        "predicted lowers the IoU of the others.",
        "K and tau of a domain were chosen on domains of other families."
        if results.tuning
        else "K and tau were set by the config, the same for all domains.",
        "The paper's figures are for 20 public datasets and CAT-Seg L: compare the differences "
        "between methods, not the level.",
    )
    settings = flatten(results.provenance.get("config", {}))
    provenance = _provenance(results)
    return Section(
        title="Settings and origin",
        blocks=[
            Notes(notes),
            *([KeyValues(rows=provenance)] if provenance else []),
            *(
                [KeyValues(rows=settings, summary=f"All settings ({len(settings)})")]
                if settings
                else []
            ),
        ],
    )


def _provenance(results: EvaluationResults) -> list[tuple[str, str]]:
    provenance = results.provenance
    rows = [
        ("code", str(provenance.get("code_revision", ""))),
        ("seed", str(provenance.get("seed", ""))),
        ("encoder", str(provenance.get("encoder", ""))),
    ]
    if base := provenance.get("base"):
        rows.append(("base", f"{base['name']} {base['digest']}"))
    for name, adapter in provenance.get("adapters", {}).items():
        rows.append((f"adapter {name}", f"{adapter['digest']} (version {adapter['version']})"))
    for target in results.targets:
        rows.append((f"images {target.name}", f"{target.data_digest} ({target.images} images)"))
    papers = {method.paper.name: method.paper.url for method in METHODS.values()}
    rows += [(f"paper {name}", url) for name, url in papers.items()]
    return [(name, text) for name, text in rows if text]
