import json

import numpy as np
import pytest

from loraseg.data.labels import IGNORE, LabelSpace, read_classes, write_classes
from loraseg.data.palette import IGNORE_COLOR, class_colors
from loraseg.errors import DatasetError


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "content",
    [
        ["road", "sky"],
        {"road": 0, "sky": 1},
        {"1": "sky", "0": "road"},
        {"classes": ["road", "sky"], "licence": "x"},
        {"classes": {"sky": 1, "road": 0}, "ignore_index": 255},
        {"classes": [{"id": 1, "name": "sky", "source_name": "Sky"}, {"id": 0, "name": "road"}]},
    ],
)
def test_reads_every_form(tmp_path, content):
    assert read_classes(write(tmp_path / "classes.json", content)).names == ("road", "sky")


def test_write_then_read_gives_it_back(tmp_path):
    space = LabelSpace(("sky", "Straße", "traffic light", "木"))
    write_classes(tmp_path / "classes.json", space)
    assert read_classes(tmp_path / "classes.json") == space


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"\xff\xfe{", "not valid JSON"),
        (b'["stra\xdfe"]', "not valid JSON: 'utf-8'"),
        (b"{", "not valid JSON"),
        (b'"road"', "expected a list or an object of classes, got str"),
        (b"[]", "1 to 255 classes, got 0"),
        (b'["road", "Road"]', "class name 'Road' appears twice"),
        (b'["traffic light", "traffic  light "]', "appears twice"),
        (b'{"road": 0, "road": 1}', "key 'road' appears twice"),
        (b'{"road": 0, "sky": 2}', r"class ids must be 0 to 1, got \[0, 2\]"),
        (b'{"road": 0, "sky": 0}', "id 0 belongs to both 'road' and 'sky'"),
        (b'["road", ""]', "class name ''"),
        (b'["road", "a\\u0000b"]', "expected printable text"),
        (b'["road", 3]', "class 3 with id 1: expected text and an integer"),
        (b'{"road": true}', "class 'road' with id True"),
        (b'[{"id": 0}]', "class None with id 0"),
        (b'{"classes": ["road"], "ignore_index": 0}', "ignored pixels by 255"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_refuses_naming_the_file(tmp_path, content, match):
    path = tmp_path / "classes.json"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=match) as caught:
        read_classes(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_too_many_classes(tmp_path):
    with pytest.raises(DatasetError, match=r"classes\.json: cannot read the class list"):
        read_classes(tmp_path / "classes.json")
    with pytest.raises(DatasetError, match="1 to 255 classes, got 256"):
        LabelSpace(tuple(f"class {index}" for index in range(256)))
    assert len(LabelSpace(tuple(f"class {index}" for index in range(255))).palette) == 255


def test_spaces_meet_by_name():
    ours = LabelSpace(("sky", "Traffic Sign", "pole"))
    theirs = LabelSpace(("road", "traffic sign", "car", "sky"))
    mask = np.array([0, 1, 2, 3, 200, IGNORE], dtype=np.uint8)
    expected = [3, 1, IGNORE, IGNORE, IGNORE, IGNORE]
    np.testing.assert_array_equal(ours.remap_table(theirs)[mask], expected)
    assert theirs.index("TRAFFIC sign") == 1
    with pytest.raises(DatasetError, match="no class 'fence' among sky, Traffic Sign, pole"):
        ours.index("fence")


def test_remapping_there_and_back_keeps_the_shared_classes():
    ours, theirs = LabelSpace(("a", "b", "c", "d")), LabelSpace(("d", "b", "x"))
    back = theirs.remap_table(ours)[ours.remap_table(theirs)]
    np.testing.assert_array_equal(back[:4], [IGNORE, 1, IGNORE, 3])


def test_accents_compose_alike():
    assert LabelSpace(("caf\u00e9",)).index("cafe\u0301") == 0


def test_colours_are_distinct_and_follow_the_name():
    names = (*tuple(f"class {index}" for index in range(200)), "road", "pavement", "sidewalk")
    colors = class_colors(names)
    assert len({tuple(color) for color in colors} | {IGNORE_COLOR}) == len(names) + 1
    np.testing.assert_array_equal(class_colors(("class 7",))[0], colors[7])
    np.testing.assert_array_equal(class_colors(("sky", "ROAD"))[1], (128, 64, 128))


def test_palette_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        LabelSpace(("road",)).palette[0] = 0
