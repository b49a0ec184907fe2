"""What a segmenter's training looked like, as one HTML page without network or script."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loraseg.data.labels import LabelSpace
from loraseg.reports.templates import html_template
from loraseg.segment.closed_set.checkpoint import decode_closed_set_segmenter
from loraseg.segment.render import encode_png, overlay_with_legend
from loraseg.tensor_types import UInt8, ndarray
from loraseg.train.closed_set.loop import TrainingData

__all__ = ["render_training_report"]

_TEMPLATES = Path(__file__).parents[1] / "templates"
_EXAMPLES = 6
_MAX_SIDE = 320
_MIN_SIDE = 192
# Of a plot, in SVG units: the frame and what is left free around it.
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 560, 240, 52, 14, 12, 30
_TICKS = 4
_ABSENT = "\N{EN DASH}"


def render_training_report(
    results: Mapping[str, Any], data: TrainingData, segmenters: Mapping[str, bytes]
) -> str:
    """Return the page.

    Args:
        results: As in ``results.json``.
        data: Its first validation pairs are shown.
        segmenters: The arms' files, by name.

    Raises:
        DatasetError: A validation pair cannot be used.
        IntegrityError: A file is no segmenter.
    """
    arms: Mapping[str, Any] = results["arms"]
    return html_template(_TEMPLATES, "closed_set.html.j2").render(
        title="Segmenter training",
        summary=_summary(arms),
        plots=[
            _plot("Validation mIoU, percent", {n: _percents(a["scores"]) for n, a in arms.items()}),
            _plot("Training loss", {n: _points(a["losses"]) for n, a in arms.items()}),
        ],
        arms=list(arms),
        classes=_class_table(results["classes"], arms),
        confusions=[_confusion(name, results["classes"], arm) for name, arm in arms.items()],
        examples=_examples(data, segmenters),
        settings=_flatten({**results["settings"], "code": results["code_revision"]}),
        digests=[(name, arm["sha256"]) for name, arm in arms.items()],
    )


@dataclass(frozen=True, slots=True)
class _Curve:
    name: str
    points: str
    last: str


@dataclass(frozen=True, slots=True)
class _Plot:
    """Curves in SVG units, with the marks of both axes as (place, text)."""

    title: str
    lines: tuple[_Curve, ...]
    across: tuple[tuple[float, str], ...]
    upwards: tuple[tuple[float, str], ...]
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = _HEIGHT - _BOTTOM


def _summary(arms: Mapping[str, Any]) -> str:
    parts = [
        f"{name}: mIoU {_percent(arm['miou'])} % after {arm['step']} steps"
        for name, arm in arms.items()
    ]
    if len(arms) > 1:
        parts.append("the control saw the real images alone, for as many steps")
    return "; ".join(parts) + "."


def _points(curve: Sequence[Sequence[Any]]) -> list[tuple[int, float]]:
    return [
        (step, float(value)) for step, value in curve if value is not None and math.isfinite(value)
    ]


def _percents(curve: Sequence[Sequence[Any]]) -> list[tuple[int, float]]:
    return [(step, 100 * value) for step, value in _points(curve)]


def _plot(title: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> _Plot:
    steps = [step for curve in curves.values() for step, _ in curve]
    values = [value for curve in curves.values() for _, value in curve]
    last, least, most = max(steps, default=1), min(values, default=0.0), max(values, default=1.0)
    span = (most - least) or 1.0
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(share: float) -> float:
        return round(_LEFT + width * share, 1)

    def y(value: float) -> float:
        return round(_TOP + height * (1 - (value - least) / span), 1)

    marks = [least + span * i / _TICKS for i in range(_TICKS + 1)]
    return _Plot(
        title=title,
        lines=tuple(
            _Curve(
                name=name,
                points=" ".join(f"{x(step / last)},{y(value)}" for step, value in curve),
                last=f"{curve[-1][1]:.4g}" if curve else _ABSENT,
            )
            for name, curve in curves.items()
        ),
        across=tuple((x(i / _TICKS), f"{last * i / _TICKS:.0f}") for i in range(_TICKS + 1)),
        upwards=tuple((y(mark), f"{mark:.3g}") for mark in marks),
    )


def _class_table(classes: Sequence[str], arms: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row a class and one for the mean: IoU in percent by arm, and the difference."""
    rows = [(name, [arm["iou"][name] for arm in arms.values()]) for name in classes]
    rows.append(("mean", [arm["miou"] for arm in arms.values()]))
    return [
        {
            "name": name,
            "values": [_percent(value) for value in values],
            "gain": _difference(values),
            "mean": index == len(classes),
        }
        for index, (name, values) in enumerate(rows)
    ]


def _difference(values: Sequence[float | None]) -> str:
    if len(values) != 2 or values[0] is None or values[1] is None:
        return ""
    return f"{100 * (values[0] - values[1]):+.1f}"


def _confusion(name: str, classes: Sequence[str], arm: Mapping[str, Any]) -> dict[str, Any]:
    counts = np.array(arm["confusion"], np.float64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    rows = [
        (
            label,
            [
                (f"{100 * share:.0f}" if share >= 0.005 else "", round(float(share), 3))
                for share in row[: len(classes)]
            ],
        )
        for label, row, total in zip(classes, shares, counts.sum(1), strict=True)
        if total
    ]
    return {"name": name, "classes": list(classes), "rows": rows}


def _examples(data: TrainingData, segmenters: Mapping[str, bytes]) -> list[list[tuple[str, str]]]:
    """Return a row of pictures a validation pair: (title, data URI)."""
    networks = {name: decode_closed_set_segmenter(file, name) for name, file in segmenters.items()}
    rows: list[list[tuple[str, str]]] = []
    for place in range(min(_EXAMPLES, sum(data.val.windows[0]))):
        image, label = data.val.load(0, place)
        maps = {"truth": label}
        maps |= {name: network.labels(image[None])[0] for name, network in networks.items()}
        row = [("image", _data_uri(_scale_to_display(image)))]
        row += [
            (title, _overlay_uri(image, labels, data.label_space)) for title, labels in maps.items()
        ]
        rows.append(row)
    return rows


def _overlay_uri(
    image: UInt8[ndarray, "h w 3"], labels: UInt8[ndarray, "h w"], space: LabelSpace
) -> str:
    return _data_uri(
        overlay_with_legend(_scale_to_display(image), _scale_to_display(labels), space, opacity=0.8)
    )


def _scale_to_display(pixels: ndarray) -> ndarray:
    """Return every n-th pixel of a large picture, or each of a small one several times."""
    longest = max(pixels.shape[:2])
    every, times = max(1, -(-longest // _MAX_SIDE)), max(1, _MIN_SIDE // longest)
    return np.ascontiguousarray(pixels[::every, ::every].repeat(times, 0).repeat(times, 1))


def _data_uri(picture: UInt8[ndarray, "h w 3"]) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(picture)).decode()


def _percent(value: float | None) -> str:
    return _ABSENT if value is None else f"{100 * value:.1f}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _flatten(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", str(value)))
    return lines
