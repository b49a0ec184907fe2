from loraseg.reports.text_table import align_columns, format_table


def test_columns_are_aligned_with_two_spaces_between_them():
    assert format_table(("a", "bb"), [("xyz", ""), ("", "q")]) == "a    bb\nxyz\n     q\n"


def test_numbers_are_aligned_to_the_right():
    rows = [("name", "mIoU", "note"), ("fog", "5.0", "x"), ("night", "50.0", "")]
    assert align_columns(rows, right=[1]) == [
        "name   mIoU  note",
        "fog     5.0  x",
        "night  50.0",
    ]
