"""The toy world's images: a few coloured shapes on a light ground, drawn from a description.

A scene places its things in the cells of a 3 x 3 grid. Six of the 36 kinds (shape and colour) are
held out: no training image shows one, and every held-out image does.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

IMAGE_SIZE = 72  # pixels
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (45, 85, 215),
    "yellow": (240, 205, 40),
    "purple": (140, 50, 165),
    "orange": (240, 120, 20),
}
# colours that occur only in the vision tower's own pre-training
RARE_COLOURS = {
    "pink": (245, 150, 190),
    "brown": (120, 75, 40),
    "black": (35, 35, 40),
    "grey": (130, 130, 135),
    "cyan": (60, 200, 215),
    "olive": (130, 140, 40),
}
HELD_OUT_KINDS = frozenset(
    (shape, list(COLOURS)[(index + 2) % len(COLOURS)]) for index, shape in enumerate(SHAPES)
)
RADIUS = {"small": 0.095, "large": 0.15}  # fraction of the image's side
CELLS = (
    ("top left", "top middle", "top right"),
    ("middle left", "centre", "middle right"),
    ("bottom left", "bottom middle", "bottom right"),
)
SUPERSAMPLING = 3
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    row: int
    column: int

    @property
    def kind(self) -> tuple[str, str]:
        return self.shape, self.colour

    @property
    def place(self) -> str:
        return CELLS[self.row][self.column]


@dataclass(frozen=True)
class Scene:
    """groups: things of one kind and size; no two groups share shape or colour."""

    name: str
    groups: tuple[tuple[Thing, ...], ...]

    @property
    def things(self) -> tuple[Thing, ...]:
        return tuple(thing for group in self.groups for thing in group)


def make_scenes(
    prefix: str, count: int, seed: int, held_out: bool = False, rare: bool = False
) -> list[Scene]:
    """`count` scenes named prefix_00000, prefix_00001, ...

    held_out: the first group is of a held-out kind; rare: half the colours are rare ones.
    """
    rng = random.Random(f"{prefix} {seed}")
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    kinds = [kind for kind in kinds if kind not in HELD_OUT_KINDS]
    if rare:
        kinds += [(shape, colour) for shape in SHAPES for colour in RARE_COLOURS]
    first_kinds = sorted(HELD_OUT_KINDS) if held_out else kinds
    return [_make_scene(f"{prefix}_{i:05d}", first_kinds, kinds, rng) for i in range(count)]


def _make_scene(name: str, first_kinds: list, kinds: list, rng: random.Random) -> Scene:
    layout = rng.choices(("single", "pair", "many"), weights=(2, 4, 4))[0]
    first, second = rng.choice(first_kinds), rng.choice(kinds)
    while second[0] == first[0] or second[1] == first[1]:
        second = rng.choice(kinds)
    if layout == "single":
        return Scene(name, (_place(first, [rng.randrange(9)], rng),))
    if layout == "pair":
        cells = _aligned_cells(rng)
        return Scene(name, (_place(first, cells[:1], rng), _place(second, cells[1:], rng)))
    cells = rng.sample(range(9), rng.choice((2, 3, 4)) + 1)
    groups = [_place(first, cells[1:], rng)]
    if rng.random() < 0.5:
        groups.append(_place(second, cells[:1], rng))
    return Scene(name, tuple(groups))


def _aligned_cells(rng: random.Random) -> list[int]:
    """Two cells of one row or one column, in random order: one of the four SIDES is true."""
    line, (first, second) = rng.randrange(3), rng.sample(range(3), 2)
    if rng.random() < 0.5:
        return [3 * line + first, 3 * line + second]
    return [3 * first + line, 3 * second + line]


def _place(kind: tuple[str, str], cells: list[int], rng: random.Random) -> tuple[Thing, ...]:
    size = rng.choice(sorted(RADIUS))
    return tuple(Thing(*kind, size, *divmod(cell, 3)) for cell in cells)


# ---- drawing ----


def _outline(shape: str) -> list[tuple[float, float]]:
    """The shape's corners in a circle of radius 1, y downwards."""
    if shape == "circle":
        return [_on_circle(0.92, step / 40) for step in range(40)]
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)]
    if shape == "star":
        return [_on_circle(1.1 if step % 2 == 0 else 0.42, step / 10) for step in range(10)]
    if shape == "cross":
        arm, end = 0.3, 0.95
        corner = [(-arm, -end), (arm, -end), (arm, -arm)]
        return [_rotate(x, y, quarter * math.pi / 2) for quarter in range(4) for x, y in corner]
    assert shape == "heart", shape
    return [_on_heart(2 * math.pi * step / 40) for step in range(40)]


def _on_circle(radius: float, fraction: float) -> tuple[float, float]:
    angle = 2 * math.pi * fraction
    return radius * math.sin(angle), -radius * math.cos(angle)


def _on_heart(t: float) -> tuple[float, float]:
    x = 16 * math.sin(t) ** 3
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return x / 16, -y / 15 - 0.1


def _rotate(x: float, y: float, angle: float) -> tuple[float, float]:
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def render(scene: Scene) -> Image.Image:
    """The image of a scene; light, tilt, tint and position vary a little, seeded by its name."""
    rng = random.Random(scene.name)
    side = IMAGE_SIZE * SUPERSAMPLING
    light = rng.randint(225, 250)
    ground = tuple(light + rng.randint(-6, 5) for _ in range(3))
    image = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        radius = RADIUS[thing.size] * side
        x = ((thing.column + 0.5) / 3 + rng.uniform(-0.015, 0.015)) * side
        y = ((thing.row + 0.5) / 3 + rng.uniform(-0.015, 0.015)) * side
        tilt = rng.uniform(-0.12, 0.12)
        corners = [_rotate(*corner, tilt) for corner in _outline(thing.shape)]
        colour = (COLOURS | RARE_COLOURS)[thing.colour]
        tint = tuple(max(0, min(255, level + rng.randint(-10, 10))) for level in colour)
        draw.polygon([(x + radius * cx, y + radius * cy) for cx, cy in corners], fill=tint)
    return image.reduce(SUPERSAMPLING)


def save_jpeg(scene: Scene, folder: Path) -> None:
    """Write folder/NAME.jpg."""
    # no chroma subsampling: a small thing must keep its colour
    render(scene).save(folder / f"{scene.name}.jpg", quality=JPEG_QUALITY, subsampling=0)
