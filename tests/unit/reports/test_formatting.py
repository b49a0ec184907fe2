import math

import pytest

from loraseg.reports.formatting import format_difference, format_percent, share_of

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_undefined_values_have_no_digits(value):
    assert format_percent(value) == DASH
    assert format_percent(value, absent="-") == "-"
    assert format_difference(value, 0.5) == format_difference(0.5, value) == ("", "")
    assert share_of(value, 1.0) == 0.0


def test_percent_is_rounded():
    assert format_percent(0.12345) == "12.3"
    assert format_percent(0.12345, digits=0) == "12"


def test_difference_has_sign_and_direction():
    assert format_difference(0.5, 0.4) == ("+10.0", "up")
    assert format_difference(0.4, 0.5) == (f"{MINUS}10.0", "down")
    assert format_difference(0.50001, 0.5) == ("0.0", "same")


def test_share_is_clipped():
    assert [share_of(value, 2.0) for value in (-1.0, 0.5, 3.0)] == [0.0, 0.25, 1.0]
    assert share_of(1.0, 0.0) == 0.0
