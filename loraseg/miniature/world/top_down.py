"""A crossing seen from above, the second viewpoint of the world."""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from loraseg.miniature.world.batched_rng import BatchedRng, hsv_to_rgb
from loraseg.miniature.world.canvas import (
    CLASSES,
    COLUMN,
    ROW,
    Canvas,
    Scene,
    class_id,
    ellipse,
    rectangle,
)
from loraseg.miniature.world.palette import Palette, random_building_colour, random_vehicle_colour

__all__ = ["draw_top_down"]


@dataclass(frozen=True)
class _StreetPlan:
    """Street plans of a chunk: (n,) each, lengths in pixels; ``present`` is (n, c) booleans."""

    upright: ndarray
    axis: ndarray
    road: ndarray
    kerb: ndarray
    cross_axis: ndarray
    cross_road: ndarray
    crossed: ndarray
    present: ndarray

    def has(self, name: str) -> ndarray:
        """Return (n,) booleans, the scenes with a class."""
        return self.present[:, class_id(name)]

    def band(self, centre: ndarray, half: ndarray, upright: ndarray) -> ndarray:
        """Return the (n, h, w) pixels within ``half`` of a line."""
        line = np.where(upright[:, None, None], COLUMN, ROW)
        return np.abs(line - centre[:, None, None]) < half[:, None, None]

    def random_position(
        self, rng: BatchedRng, near: ndarray, far: ndarray
    ) -> tuple[ndarray, ndarray]:
        """Draw (n,) x and y at a lateral distance in [near, far) from the road's axis."""
        lateral = self.axis + rng.sign() * (rng.uniform(0, 1) * (far - near) + near)
        along = rng.uniform(2, 62)
        return np.where(self.upright, lateral, along), np.where(self.upright, along, lateral)


def draw_top_down(rng: BatchedRng, palette: Palette) -> Scene:
    """Draw a chunk of top-down views."""
    plan = _draw_plan(rng)
    canvas = Canvas(rng.count, rng.colour_near(palette.grass))
    _streets(canvas, plan, rng, palette)
    for _ in range(5):
        _house(canvas, plan, rng)
    for number in range(5):
        _tree(canvas, plan, rng, palette, first=number == 0)
    for number in range(4):
        _vehicle(canvas, plan, rng, "car", first=number == 0)
    _vehicle(canvas, plan, rng, "bus", first=True)
    for number in range(4):
        _pedestrian(canvas, plan, rng, first=number == 0)
    flat = np.zeros(canvas.labels.shape, np.float32)
    return Scene(canvas.colours(), canvas.labels, flat, canvas.lights())


def _draw_plan(rng: BatchedRng) -> _StreetPlan:
    road = rng.uniform(7, 11)
    return _StreetPlan(
        upright=rng.bernoulli(0.5),
        axis=rng.uniform(18, 46),
        road=road,
        kerb=road + rng.uniform(3, 5),
        cross_axis=rng.uniform(10, 54),
        cross_road=rng.uniform(5, 8),
        crossed=rng.bernoulli(0.5),
        present=rng.generator.random((rng.count, len(CLASSES))) < 0.55,
    )


def _streets(canvas: Canvas, plan: _StreetPlan, rng: BatchedRng, palette: Palette) -> None:
    everywhere = np.ones(canvas.labels.shape, bool)
    stone, tar = rng.colour_near(palette.sidewalk, 0.04), rng.colour_near(palette.road, 0.04)
    canvas.paint(everywhere, rng.colour_near(palette.grass), label="grass")
    canvas.paint(everywhere, stone, label="sidewalk", where=~plan.has("grass"))
    crossed = plan.crossed[:, None, None]
    main = plan.band(plan.axis, plan.kerb, plan.upright)
    cross = plan.band(plan.cross_axis, plan.cross_road + 3, ~plan.upright) & crossed
    canvas.paint(main | cross, stone, label="sidewalk", where=plan.has("sidewalk"))
    main = plan.band(plan.axis, plan.road, plan.upright)
    cross = plan.band(plan.cross_axis, plan.cross_road, ~plan.upright) & crossed
    canvas.paint(main | cross, tar, label="road")
    dashes = np.where(plan.upright[:, None, None], ROW, COLUMN) % 8 < 4
    line = plan.band(plan.axis, np.full(rng.count, 0.7, np.float32), plan.upright)
    canvas.paint(line & dashes, rng.colour_near((0.85, 0.85, 0.8), 0.05))


def _house(canvas: Canvas, plan: _StreetPlan, rng: BatchedRng) -> None:
    width, height = rng.uniform(6, 10), rng.uniform(6, 10)
    x, y = plan.random_position(rng, plan.kerb + 9, plan.kerb + 26)
    along = np.where(plan.upright, y, x)
    blocks = plan.crossed & (np.abs(along - plan.cross_axis) < plan.cross_road + 12)
    where = plan.has("building") & rng.bernoulli(0.8) & ~blocks
    colour = random_building_colour(rng)
    outer = rectangle(x - width, x + width, y - height, y + height)
    canvas.paint(outer, colour * 0.75, label="building", where=where)
    roof = rectangle(x - width + 2, x + width - 2, y - height + 2, y + height - 2)
    canvas.paint(roof, colour, where=where)
    canvas.paint(rectangle(x - 2, x + 1, y - 2, y + 1), colour * 0.5, where=where)


def _tree(
    canvas: Canvas, plan: _StreetPlan, rng: BatchedRng, palette: Palette, *, first: bool
) -> None:
    x, y = plan.random_position(rng, plan.kerb + 2, plan.kerb + 24)
    radius = rng.uniform(3.5, 6.5)
    where = plan.has("tree") & rng.bernoulli(1.0 if first else 0.7)
    leaves = rng.colour_near(palette.tree, 0.07)
    canvas.paint(ellipse(x, y, radius, radius), leaves, label="tree", where=where)
    light = ellipse(x - radius * 0.2, y - radius * 0.2, radius * 0.5, radius * 0.5)
    canvas.paint(light, np.clip(leaves * 1.2, 0, 1), where=where)


def _vehicle(canvas: Canvas, plan: _StreetPlan, rng: BatchedRng, kind: str, *, first: bool) -> None:
    bus = kind == "bus"
    x, y = plan.random_position(rng, np.full(rng.count, 2.5, np.float32), plan.road - 2.5)
    long = rng.uniform(10, 13) if bus else rng.uniform(5, 6.5)
    wide = rng.uniform(3.8, 4.5) if bus else rng.uniform(2.8, 3.5)
    where = plan.has(kind) & rng.bernoulli(1.0 if first else 0.5)
    half_x, half_y = np.where(plan.upright, wide, long), np.where(plan.upright, long, wide)
    colour = random_vehicle_colour(rng, bus=bus)
    body = rectangle(x - half_x, x + half_x, y - half_y, y + half_y)
    canvas.paint(body, colour, label=kind, where=where)
    half_x, half_y = half_x * 0.6, half_y * 0.6
    roof = rectangle(x - half_x, x + half_x, y - half_y, y + half_y)
    canvas.paint(roof, colour * 0.6, where=where)
    nose = np.where(plan.upright, y - long, x - long)
    nose_x, nose_y = np.where(plan.upright, x, nose), np.where(plan.upright, nose, y)
    lamp = rectangle(nose_x - 1, nose_x + 1, nose_y - 1, nose_y + 1)
    canvas.paint(
        lamp & (canvas.labels == class_id(kind)),
        rng.colour_near((0.95, 0.9, 0.6), 0.03),
        where=where,
    )
    canvas.add_light()


def _pedestrian(canvas: Canvas, plan: _StreetPlan, rng: BatchedRng, *, first: bool) -> None:
    x, y = plan.random_position(rng, plan.road, plan.kerb)
    radius = rng.uniform(2.3, 3.1)
    where = plan.has("person") & rng.bernoulli(1.0 if first else 0.6)
    coat = hsv_to_rgb(rng.uniform(0, 1), rng.uniform(0.4, 0.95), rng.uniform(0.4, 0.95))
    canvas.paint(ellipse(x, y, radius, radius), coat, label="person", where=where)
    hair = ellipse(x, y, radius * 0.5, radius * 0.5)
    canvas.paint(hair, rng.colour_near((0.35, 0.25, 0.2), 0.08), where=where)
