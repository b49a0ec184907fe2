import numpy as np
import pytest

from loraseg.data.labels import LabelSpace
from loraseg.errors import DatasetError
from loraseg.synth.sheet import SheetRow, contact_sheet

SPACE = LabelSpace(("road", "sky", "car"))


def picture(value, size=(20, 30)):
    return np.full((*size, 3), value, dtype=np.uint8)


def test_masks_and_pictures_are_drawn_side_by_side():
    """Small pictures are enlarged by an integer factor without smoothing."""
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[:10] = 1
    mask[0, 0] = 255
    sheet = contact_sheet(
        [
            SheetRow("one", mask, [("0", picture(10)), ("1", picture(200))]),
            SheetRow("two", mask, [("0", picture(77))]),
        ],
        SPACE,
    )
    factor = 5  # from 20 to at least 96 rows
    line, cell = 16 + factor * 20 + 4, factor * 30 + 4
    assert sheet.shape[:2] == (2 * line + 22, 3 * cell)
    for row, column, color in (
        (16 + 3 * factor, 10 * factor, SPACE.palette[1]),
        (16 + 15 * factor, 10 * factor, SPACE.palette[0]),
        (16, 0, (245, 245, 245)),
        (16 + 1, cell + 1, (10, 10, 10)),
        (16 + factor * 20 - 1, 2 * cell + factor * 30 - 1, (200, 200, 200)),
        (line + 16, cell + 2, (77, 77, 77)),
        (line + 40, 2 * cell + 20, (255, 255, 255)),  # no picture in this cell
    ):
        assert tuple(sheet[row, column]) == tuple(color), (row, column)
    for color in SPACE.palette[:2]:  # the legend shows the classes that occur
        assert (sheet[2 * line :] == color).all(axis=2).any()
    assert not (sheet[2 * line :] == SPACE.palette[2]).all(axis=2).any()


def test_pictures_are_resized_to_the_height_of_the_mask():
    mask = np.zeros((600, 300), dtype=np.uint8)
    row = SheetRow("a title that is far too long for its picture", mask, [("k", picture(9))])
    sheet = contact_sheet([row], SPACE)
    assert sheet.shape[0] == 16 + 256 + 4 + 22
    assert sheet.shape[1] == (128 + 4) + (384 + 4)


def test_a_mask_of_ignored_pixels_only_has_no_legend():
    mask = np.full((96, 96), 255, dtype=np.uint8)
    assert contact_sheet([SheetRow("x", mask, [])], SPACE).shape == (116, 100, 3)


def test_no_rows_are_refused():
    with pytest.raises(DatasetError, match="got no rows"):
        contact_sheet([], SPACE)
