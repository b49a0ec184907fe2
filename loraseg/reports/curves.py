"""Curves over training steps as SVG."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from loraseg.reports.formatting import ABSENT

__all__ = ["CurvePlot", "finite_points"]

# Size of a plot and the margins around its curves, in SVG units.
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 560, 240, 52, 14, 12, 30
_TICKS = 4


def finite_points(curve: Iterable[Sequence[Any]]) -> list[tuple[int, float]]:
    """Return the points of a curve, ``[step, value]`` each, whose value is a finite number."""
    return [
        (step, float(value)) for step, value in curve if value is not None and math.isfinite(value)
    ]


@dataclass(frozen=True, slots=True)
class CurvePlot:
    """One or two curves over the same steps.

    Attributes:
        title: What the curves show, with the unit.
        curves: Points (step, value) by name, in the order of steps; may be empty.
    """

    macro: ClassVar[str] = "curve_plot"
    title: str
    curves: Mapping[str, Sequence[tuple[int, float]]]

    def view(self) -> "_PlotView":
        """Return the curves and the tick marks in SVG units.

        The x axis runs from 0 to the last step, the y axis from the least to the largest value.
        """
        values = [value for curve in self.curves.values() for _, value in curve]
        steps = [step for curve in self.curves.values() for step, _ in curve]
        last_step, least = max(steps, default=1), min(values, default=0.0)
        span = (max(values, default=1.0) - least) or 1.0

        def x(share: float) -> float:
            return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * share, 1)

        def y(share: float) -> float:
            return round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share), 1)

        shares = [tick / _TICKS for tick in range(_TICKS + 1)]
        return _PlotView(
            title=self.title,
            curves=[
                _CurveView(
                    name=name,
                    points=" ".join(
                        f"{x(step / last_step)},{y((value - least) / span)}"
                        for step, value in curve
                    ),
                    last=f"{curve[-1][1]:.4g}" if curve else ABSENT,
                )
                for name, curve in self.curves.items()
            ],
            x_ticks=[(x(share), f"{last_step * share:.0f}") for share in shares],
            y_ticks=[(y(share), f"{least + span * share:.3g}") for share in shares],
        )


@dataclass(frozen=True, slots=True)
class _CurveView:
    name: str
    points: str
    last: str


@dataclass(frozen=True, slots=True)
class _PlotView:
    """Curves in SVG units, with the tick marks of both axes as (coordinate, text)."""

    title: str
    curves: list[_CurveView]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = _WIDTH
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT
    bottom: int = _HEIGHT - _BOTTOM
