import math
import re

import pytest

from loraseg.reports.curves import CurvePlot, finite_points


def coordinates(curve):
    return [tuple(map(float, point.split(","))) for point in curve.points.split()]


def test_points_are_linear_in_step_and_value():
    view = CurvePlot("Loss", {"main": [(10, 4.0), (20, 1.0), (40, 2.0)]}).view()
    (curve,) = view.curves
    points = coordinates(curve)
    width = view.right - view.left
    assert [x for x, _ in points] == pytest.approx(
        [view.left + width * share for share in (0.25, 0.5, 1.0)], abs=0.05
    )
    top, bottom = points[0][1], points[1][1]
    assert bottom == view.bottom
    assert points[2][1] == pytest.approx(bottom + (top - bottom) / 3, abs=0.1)
    assert curve.last == "2"


def test_ticks_cover_both_axes():
    view = CurvePlot("Loss", {"a": [(0, 1.0), (8, 3.0)], "b": [(4, 2.0)]}).view()
    assert [text for _, text in view.x_ticks] == ["0", "2", "4", "6", "8"]
    assert [text for _, text in view.y_ticks] == ["1", "1.5", "2", "2.5", "3"]
    heights = [y for y, _ in view.y_ticks]
    assert heights == sorted(heights, reverse=True)


def test_constant_and_empty_curves_have_finite_coordinates():
    view = CurvePlot("Loss", {"flat": [(1, 2.0), (2, 2.0)], "none": []}).view()
    assert re.fullmatch(r"[\d.]+,[\d.]+ [\d.]+,[\d.]+", view.curves[0].points)
    assert view.curves[1].points == ""
    assert view.curves[1].last == "\N{EN DASH}"


def test_points_without_a_finite_value_are_left_out():
    curve = [(1, None), (2, math.nan), (3, 0.5), (4, math.inf)]
    assert finite_points(curve) == [(3, 0.5)]
