import colorsys

import numpy as np
import pytest

from loraseg.miniature.world.batched_rng import BatchedRng, hsv_to_rgb
from loraseg.miniature.world.canvas import CLASSES, SIZE, Canvas, class_id, ellipse, rectangle


def float_array(*values):
    return np.array(values, np.float32)


def test_shapes_equal_their_definition_pixel_by_pixel():
    box = rectangle(
        float_array(2, 10.5), float_array(5, 20), float_array(1, 3), float_array(4.5, 60)
    )
    disc = ellipse(float_array(10, 30), float_array(12, 31), float_array(4, 7.5), float_array(2, 3))
    for n, (left, right, top, bottom) in enumerate([(2, 5, 1, 4.5), (10.5, 20, 3, 60)]):
        expected = [
            [left <= x < right and top <= y < bottom for x in range(SIZE)] for y in range(SIZE)
        ]
        assert box[n].tolist() == expected
    for n, (cx, cy, rx, ry) in enumerate([(10, 12, 4, 2), (30, 31, 7.5, 3)]):
        expected = [
            [((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1 for x in range(SIZE)]
            for y in range(SIZE)
        ]
        assert disc[n].tolist() == expected


def test_hsv_equals_colorsys():
    generator = np.random.default_rng(0)
    h, s, v = generator.random((3, 50)).astype(np.float32)
    expected = [colorsys.hsv_to_rgb(*map(float, triple)) for triple in zip(h, s, v, strict=True)]
    np.testing.assert_allclose(hsv_to_rgb(h, s, v), expected, atol=2e-6)


def test_draws_are_in_their_ranges():
    rng = BatchedRng(np.random.default_rng(0), 1000)
    assert ((rng.uniform(2, 3) >= 2) & (rng.uniform(2, 3) <= 3)).all()
    assert set(rng.sign().tolist()) == {-1.0, 1.0}
    assert set(rng.choice([1, 5]).tolist()) == {1.0, 5.0}
    shades = rng.colour_near((0.5, 0.02, 1.0), 0.1)
    assert shades.min() >= 0
    assert shades.max() <= 1
    assert np.abs(shades[:, 0] - 0.5).max() <= 0.2 + 1e-6
    assert abs(rng.bernoulli(0.3).mean() - 0.3) < 0.06
    assert abs(rng.normal((1000,), 0.5).std() - 0.5) < 0.05


def red(count=1):
    return np.tile(float_array(1, 0, 0), (count, 1))


def test_nearer_parts_are_not_painted_over():
    canvas = Canvas(1, np.zeros((1, 3)))
    everywhere = np.ones((1, SIZE, SIZE), bool)
    canvas.paint(everywhere, red(), label="car", depth=float_array(40))
    painted = canvas.paint(everywhere, red() * 0.5, label="bus", depth=float_array(30))
    assert not painted.any()
    assert (canvas.labels == class_id("car")).all()
    canvas.paint(everywhere, red() * 0.5, label="bus", depth=float_array(41))
    assert (canvas.labels == class_id("bus")).all()
    np.testing.assert_allclose(
        canvas.colours(), np.full((1, SIZE, SIZE, 3), float_array(0.5, 0, 0))
    )


def test_details_change_colours_but_not_labels():
    canvas = Canvas(2, np.zeros((2, 3)))
    box = rectangle(float_array(0, 0), float_array(9, 9), float_array(0, 0), float_array(9, 9))
    canvas.paint(
        box, red(2), label="building", depth=float_array(20, 20), where=np.array([True, False])
    )
    canvas.paint(box, red(2) * 0.25, depth=float_array(20, 20))
    assert (canvas.labels[0][:9, :9] == class_id("building")).all()
    assert (canvas.labels[1] == class_id("sky")).all()
    assert canvas.colours()[:, 4, 4, 0].tolist() == [0.25, 0.25]


def test_lights_are_the_visible_pixels_of_marked_parts():
    canvas = Canvas(1, np.zeros((1, 3)))
    canvas.paint(rectangle(float_array(0), float_array(4), float_array(0), float_array(4)), red())
    canvas.add_light()
    canvas.paint(rectangle(float_array(2), float_array(6), float_array(0), float_array(4)), red())
    assert canvas.lights()[0, 0].nonzero()[0].tolist() == [0, 1]


def test_class_ids_are_indices():
    assert [class_id(name) for name in CLASSES] == list(range(12))
    with pytest.raises(ValueError, match="not in tuple"):
        class_id("zebra")
