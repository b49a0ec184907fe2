"""A street seen from a car: ground in perspective with objects on it."""

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from loraseg.miniature.world.batched_rng import BatchedRng, hsv_to_rgb
from loraseg.miniature.world.canvas import (
    CLASSES,
    COLUMN,
    ROW,
    SIZE,
    Canvas,
    Scene,
    class_id,
    ellipse,
    rectangle,
)
from loraseg.miniature.world.palette import Palette, random_building_colour, random_vehicle_colour

__all__ = ["draw_street"]

# Probability of each class, in class order. Every class, even sky and road, is often absent, so
# that captions carry information about it.
_PRESENCE = np.array([0.65, 0.45, 0.55, 0.5, 0.55, 0.55, 0.7, 0.5, 0.42, 0.5, 0.5, 0.47])


@dataclass(frozen=True)
class _Camera:
    """Cameras of a chunk: all fields are (n,) in pixels, except ``present``, (n, c) booleans."""

    horizon: ndarray
    vanishing_column: ndarray
    road: ndarray
    kerb: ndarray
    present: ndarray

    @property
    def ground(self) -> ndarray:
        """Height of the ground in the image, (n,)."""
        return SIZE - self.horizon

    def has(self, name: str) -> ndarray:
        """Return (n,) booleans, the scenes with a class."""
        return self.present[:, class_id(name)]

    def ground_position(self, rng: BatchedRng, near: float, far: float) -> tuple[ndarray, ndarray]:
        """Draw (n,) rows between two shares of the ground, and the (n,) scale of objects there."""
        row = self.horizon + self.ground * rng.uniform(near, far)
        return row, np.maximum((row - self.horizon) / self.ground, 0.12)

    def roadside(self, rng: BatchedRng, scale: ndarray, span: float) -> tuple[ndarray, ndarray]:
        """Draw (n,) sides and columns from the road's edge to ``span`` kerb widths beyond it."""
        side = rng.sign()
        strip = (self.kerb - 0.4 * self.road) * scale * rng.uniform(0.1, span)
        return side, self.vanishing_column + side * (self.road * scale * 0.6 + strip)


def draw_street(rng: BatchedRng, palette: Palette) -> Scene:
    """Draw a chunk of street views, far objects first."""
    view = _draw_camera(rng)
    canvas = Canvas(rng.count, rng.colour_near(palette.sky, 0.05))
    _backdrop(canvas, view, rng, palette)
    _mountain(canvas, view, rng, palette)
    _ground(canvas, view, rng, palette)
    for number in range(6):
        _building(canvas, view, rng, palette, number)
    for number in range(4):
        _tree(canvas, view, rng, palette, first=number == 0)
    for number in range(2):
        _pole(canvas, view, rng, palette, first=number == 0)
    for number in range(2):
        _sign(canvas, view, rng, first=number == 0)
    _bus(canvas, view, rng)
    for number in range(4):
        _car(canvas, view, rng, first=number == 3)
    for number in range(3):
        _person(canvas, view, rng, first=number == 2)
    return _compose_scene(canvas, view)


def _compose_scene(canvas: Canvas, view: _Camera) -> Scene:
    image = canvas.colours()
    glow = ROW[..., None] / SIZE * np.float32(0.25)
    image = np.where((canvas.labels == 0)[..., None], image + glow, image)
    share = (canvas.depth - view.horizon[:, None, None]) / view.ground[:, None, None]
    distance = np.where(canvas.depth < 0, 1, 1 - np.clip(share, 0, 1)).astype(np.float32)
    return Scene(image, canvas.labels, distance, canvas.lights())


def _draw_camera(rng: BatchedRng) -> _Camera:
    road = rng.uniform(22, 40)
    present = rng.generator.random((rng.count, len(CLASSES))) < _PRESENCE
    bare = ~present[:, class_id("grass")] & ~present[:, class_id("sidewalk")]
    present[bare, class_id("road")] = True
    return _Camera(
        horizon=rng.uniform(20, 30),
        vanishing_column=rng.uniform(22, 42),
        road=road,
        kerb=road * rng.uniform(1.2, 1.45),
        present=present,
    )


def _backdrop(canvas: Canvas, view: _Camera, rng: BatchedRng, palette: Palette) -> None:
    """Fill the background of scenes without sky with a mountain, a wood or a wall."""
    above = (view.horizon + 1)[:, None, None] > ROW
    choice = rng.choice([0, 1, 2])
    closed = ~view.has("sky")
    canvas.paint(
        above, rng.colour_near(palette.mountain), label="mountain", where=closed & (choice == 0)
    )
    leaves = rng.colour_near(palette.tree)
    wood = canvas.paint(above, leaves, label="tree", where=closed & (choice == 1))
    canvas.paint(wood & ((COLUMN + ROW) % 7 < 2), np.clip(leaves * 1.2, 0, 1))
    wall_colour = random_building_colour(rng)
    wall = canvas.paint(above, wall_colour, label="building", where=closed & (choice == 2))
    canvas.paint(wall & (COLUMN % 6 >= 2) & (ROW % 7 >= 3), wall_colour * 0.55)


def _mountain(canvas: Canvas, view: _Camera, rng: BatchedRng, palette: Palette) -> None:
    height, frequency, phase = rng.uniform(2, 8), rng.uniform(0.05, 0.2), rng.uniform(0, 6)
    wave = 1 + np.sin(COLUMN[:, 0] * frequency[:, None] + phase[:, None])
    ridge = view.horizon[:, None] - height[:, None] * wave - rng.uniform(1, 4)[:, None]
    mask = (ridge[:, None, :] <= ROW) & (view.horizon[:, None, None] > ROW)
    canvas.paint(
        mask, rng.colour_near(palette.mountain), label="mountain", where=view.has("mountain")
    )


def _ground(canvas: Canvas, view: _Camera, rng: BatchedRng, palette: Palette) -> None:
    depth = np.broadcast_to(ROW, canvas.labels.shape)
    ground = view.horizon[:, None, None] <= ROW
    scale = np.clip((ROW - view.horizon[:, None, None]) / view.ground[:, None, None], 0, None)
    grass, sidewalk = view.has("grass"), view.has("sidewalk")
    canvas.paint(ground, rng.colour_near(palette.grass), label="grass", depth=depth, where=grass)
    stone, tar = rng.colour_near(palette.sidewalk, 0.04), rng.colour_near(palette.road, 0.04)
    canvas.paint(ground, tar, label="road", depth=depth, where=~grass & ~sidewalk)
    canvas.paint(ground, stone, label="sidewalk", depth=depth, where=~grass & sidewalk)
    lateral = np.abs(COLUMN - view.vanishing_column[:, None, None])
    kerb = ground & (lateral < view.kerb[:, None, None] * scale)
    canvas.paint(kerb, stone, label="sidewalk", depth=depth, where=sidewalk)
    lane = ground & (lateral < view.road[:, None, None] * scale)
    road = canvas.paint(lane, tar, label="road", depth=depth, where=view.has("road"))
    dashes = np.floor(4 / np.maximum(scale, 0.04) + rng.uniform(0, 2)[:, None, None]) % 2 < 1
    marking = road & dashes & (scale > 0.05) & (lateral < 1.3 * scale)
    canvas.paint(marking, rng.colour_near((0.85, 0.85, 0.8), 0.05))


def _building(
    canvas: Canvas, view: _Camera, rng: BatchedRng, palette: Palette, number: int
) -> None:
    side = 1.0 if number % 2 else -1.0
    row = view.horizon + view.ground * rng.uniform(0.02, 0.2) * (1 if number < 4 else 0.4)
    scale = (row - view.horizon) / view.ground
    width, height = rng.uniform(8, 20), rng.uniform(9, 26)
    gap = view.kerb * scale + rng.uniform(0, 3) + (number // 2) * rng.uniform(6, 11)
    near = view.vanishing_column + side * gap
    left = near if side > 0 else near - width
    colour = random_building_colour(rng)
    where = view.has("building") & rng.bernoulli(1.0 if number < 2 else 0.6)
    top = row - height
    wall = canvas.paint(
        rectangle(left, left + width, top, row), colour, label="building", depth=row, where=where
    )
    left, top, row = (edge[:, None, None] for edge in (left, top, row))
    pitch_x, pitch_y = rng.uniform(3.5, 5.5)[:, None, None], rng.uniform(4, 6)[:, None, None]
    panes_x = ((COLUMN - left) % pitch_x >= 1.5) & (left < COLUMN)
    panes_y = ((ROW - top) % pitch_y >= 2) & (row - 2 > ROW)
    lit = rng.bernoulli(palette.lit_windows)[:, None]
    dark = np.clip(colour * 0.55 + np.array([0, 0.03, 0.07]), 0, 1)
    canvas.paint(wall & panes_x & panes_y, np.where(lit, np.array([[1.0, 0.85, 0.45]]), dark))
    canvas.add_light()


def _tree(canvas: Canvas, view: _Camera, rng: BatchedRng, palette: Palette, *, first: bool) -> None:
    row, scale = view.ground_position(rng, 0.03, 0.45)
    size = 0.4 + 1.1 * scale
    where = view.has("tree") & rng.bernoulli(1.0 if first else 0.5)
    reach = view.kerb * scale + rng.uniform(0, 16) * size + 2 * size
    x = view.vanishing_column + rng.sign() * reach
    x = np.clip(x, 2, SIZE - 3) if first else x
    height, crown, trunk = rng.uniform(5, 9) * size, rng.uniform(4, 7) * size, 0.9 * size + 0.4
    stem = rectangle(x - trunk, x + trunk, row - height, row)
    canvas.paint(stem, rng.colour_near(palette.trunk, 0.04), label="tree", depth=row, where=where)
    leaves = rng.colour_near(palette.tree, 0.07)
    y = row - height - 0.6 * crown
    mass = ellipse(x, y, crown, crown * rng.uniform(0.9, 1.4))
    canvas.paint(mass, leaves, label="tree", depth=row, where=where)
    light = ellipse(x - crown * 0.25, y - 0.2 * crown, crown * 0.5, crown * 0.5)
    canvas.paint(light, np.clip(leaves * 1.2, 0, 1), label="tree", depth=row, where=where)


def _pole(canvas: Canvas, view: _Camera, rng: BatchedRng, palette: Palette, *, first: bool) -> None:
    row, scale = view.ground_position(rng, 0.3, 0.9)
    size = 0.5 + 0.8 * scale
    side, x = view.roadside(rng, scale, 0.9)
    x, height = np.clip(x, 4, SIZE - 5), rng.uniform(21, 29) * size
    where = view.has("pole") & rng.bernoulli(1.0 if first else 0.5)
    colour = rng.colour_near(palette.pole, 0.04)
    half = 0.85 * size + 0.6
    canvas.paint(
        rectangle(x - half, x + half, row - height, row),
        colour,
        label="pole",
        depth=row,
        where=where,
    )
    end = x + 6 * size * side
    arm = rectangle(np.minimum(x, end), np.maximum(x, end), row - height - 1, row - height + 1.6)
    canvas.paint(arm, colour, label="pole", depth=row, where=where)


def _sign(canvas: Canvas, view: _Camera, rng: BatchedRng, *, first: bool) -> None:
    """Draw a board on a thin post; the post has the class sign, not pole."""
    row, scale = view.ground_position(rng, 0.25, 0.8)
    size = 0.55 + 0.85 * scale
    _, x = view.roadside(rng, scale, 1.0)
    x, height, half = (
        np.clip(x, 5, 58),
        rng.uniform(8, 13) * size,
        rng.uniform(3.6, 5) * size + 0.8,
    )
    where = view.has("sign") & rng.bernoulli(1.0 if first else 0.4)
    foot = rectangle(x - 0.6, x + 0.6, row - height, row)
    canvas.paint(
        foot, rng.colour_near((0.6, 0.6, 0.62), 0.04), label="sign", depth=row, where=where
    )
    colour = hsv_to_rgb(
        rng.choice([0.0, 0.6, 0.14]), rng.uniform(0.75, 0.95), rng.uniform(0.7, 0.95)
    )
    y = row - height
    square = rectangle(x - half, x + half, y - 0.8 * half, y + 0.8 * half)
    board = np.where(rng.bernoulli(0.5)[:, None, None], ellipse(x, y, half, half), square)
    canvas.paint(board, colour, label="sign", depth=row, where=where)
    face = ellipse(x, y, half * 0.5, half * 0.5)
    canvas.paint(face, rng.colour_near((0.92, 0.92, 0.92), 0.04), depth=row, where=where)


def _bus(canvas: Canvas, view: _Camera, rng: BatchedRng) -> None:
    row, scale = view.ground_position(rng, 0.12, 0.6)
    size = 0.28 + scale
    x = np.clip(view.vanishing_column + rng.sign() * view.road * scale * 0.45, 6, SIZE - 7)
    width, height, where = 13 * size, rng.uniform(20, 25) * size, view.has("bus")
    body = rectangle(x - width * 0.62, x + width * 0.62, row - height, row)
    canvas.paint(body, random_vehicle_colour(rng, bus=True), label="bus", depth=row, where=where)
    glass = rectangle(x - width * 0.52, x + width * 0.52, row - height * 0.85, row - height * 0.45)
    canvas.paint(glass, rng.colour_near((0.25, 0.32, 0.4), 0.05), depth=row, where=where)
    wheel_colour = rng.colour_near((0.06, 0.06, 0.06), 0.03)
    for offset in (-0.4, 0.4):
        centre = x + offset * width
        wheel = rectangle(centre - 1.5 * size, centre + 1.5 * size, row - 2.2 * size, row)
        canvas.paint(wheel, wheel_colour, depth=row, where=where)


def _car(canvas: Canvas, view: _Camera, rng: BatchedRng, *, first: bool) -> None:
    row, scale = view.ground_position(rng, 0.18, 0.88)
    size = 0.4 + 0.85 * scale
    x = view.vanishing_column + view.road * scale * rng.uniform(-0.9, 0.9)
    x = np.clip(x, 5, SIZE - 6) if first else x
    width, height = rng.uniform(8, 10.5) * size, rng.uniform(8.5, 10.5) * size
    where = view.has("car") & rng.bernoulli(1.0 if first else 0.35)
    colour = random_vehicle_colour(rng)
    body = rectangle(x - width, x + width, row - height * 0.6, row)
    canvas.paint(body, colour, label="car", depth=row, where=where)
    roof = ellipse(x, row - height * 0.6, width * 0.72, height * 0.5)
    canvas.paint(roof, colour * 0.9, label="car", depth=row, where=where)
    glass = rectangle(x - width * 0.55, x + width * 0.55, row - height * 0.88, row - height * 0.58)
    canvas.paint(glass, rng.colour_near((0.2, 0.28, 0.35), 0.05), depth=row, where=where)

    def pair(inner: float, outer: float, top: float, bottom: float) -> ndarray:
        edges = row - height * top, row - height * bottom
        left = rectangle(x - width * outer, x - width * inner, *edges)
        return left | rectangle(x + width * inner, x + width * outer, *edges)

    wheels = pair(0.45, 0.9, 0.16, 0.0)
    canvas.paint(wheels, rng.colour_near((0.06, 0.06, 0.06), 0.03), depth=row, where=where)
    towards = rng.bernoulli(0.5)[:, None]
    lamp = np.where(towards, np.array([[0.95, 0.9, 0.6]]), np.array([[0.85, 0.1, 0.08]]))
    canvas.paint(pair(0.6, 0.9, 0.48, 0.32), lamp, depth=row, where=where)
    canvas.add_light()


def _person(canvas: Canvas, view: _Camera, rng: BatchedRng, *, first: bool) -> None:
    row, scale = view.ground_position(rng, 0.3, 0.92)
    size = 0.6 + 0.85 * scale
    beside = view.road * scale + (view.kerb - view.road) * scale * rng.uniform(0, 1.2)
    across = view.road * scale * rng.uniform(-1, 1)
    x = view.vanishing_column + np.where(rng.bernoulli(0.75), rng.sign() * beside, across)
    x, height = np.clip(x, 4, SIZE - 5), rng.uniform(13.5, 16.5) * size
    where = view.has("person") & rng.bernoulli(1.0 if first else 0.4)
    legs = rectangle(x - 1.6 * size, x + 1.6 * size, row - height * 0.45, row)
    trousers = hsv_to_rgb(rng.uniform(0.5, 0.7), rng.uniform(0.2, 0.7), rng.uniform(0.15, 0.45))
    canvas.paint(legs, trousers, label="person", depth=row, where=where)
    trunk = ellipse(x, row - height * 0.58, 2.4 * size + 0.3, height * 0.26)
    coat = hsv_to_rgb(rng.uniform(0, 1), rng.uniform(0.4, 0.95), rng.uniform(0.4, 0.95))
    canvas.paint(trunk, coat, label="person", depth=row, where=where)
    head = ellipse(x, row - height * 0.9, 1.6 * size + 0.3, 1.8 * size + 0.3)
    skin = rng.colour_near((0.8, 0.6, 0.48), 0.08)
    canvas.paint(head, skin, label="person", depth=row, where=where)
