"""Scenes: a procedural data set of captioned pictures, one or two flat shapes on a plain background.

Everything is a function of an index and a seed: `scene(index)` decides what is in the picture, `draw` paints it with
anti-aliased edges and `caption` says it in one of several phrasings. What a caption leaves out follows a rule, so that
a caption can be checked: no position means the centre; no size or no background means any.

One combination of (shape, colour, position) in eight is held out by a hash of its words (`is_held_out`). No training
scene, single or pair, contains a held-out combination; every scene of the "heldout" split contains one.
"""

import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 48),
    "orange": (247, 134, 30),
    "yellow": (252, 218, 60),
    "green": (52, 160, 84),
    "blue": (44, 98, 208),
    "purple": (132, 62, 168),
    "pink": (246, 158, 192),
    "brown": (122, 74, 42),
    "black": (24, 24, 28),
    "white": (248, 248, 246),
}
SIZES: dict[str, float] = {  # the diameter, as a part of the picture's side
    "small": 0.26,
    "medium": 0.36,
    "large": 0.50,
}
POSITIONS: dict[str, tuple[float, float]] = {  # (x, y) of the centre, before a large shape is moved inside the picture
    "centre": (0.50, 0.50),
    "left": (0.25, 0.50),
    "right": (0.75, 0.50),
    "top": (0.50, 0.25),
    "bottom": (0.50, 0.75),
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
RELATIONS: dict[str, tuple[str, str]] = {  # the positions of the first and of the second thing
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
    "to the left of": ("left", "right"),
    "to the right of": ("right", "left"),
}
PAIRS = 0.4  # the part of scenes with two things
PAIR_SCALE = 0.82  # things of a pair are drawn this much smaller, so that two large ones keep apart
SUPERSAMPLING = 4


def _regular(corners: int, radius: float = 1.0) -> Float[np.ndarray, "corners 2"]:
    """A regular polygon standing on its side or, turned by half a corner, with one corner up: y points down."""
    angle = 2 * np.pi * np.arange(corners) / corners - np.pi / 2
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def _star() -> Float[np.ndarray, "10 2"]:
    points = _regular(10, 1.1)
    points[1::2] *= 0.42
    return points + [0, 0.08]


def _heart() -> Float[np.ndarray, "96 2"]:
    t = 2 * np.pi * np.arange(96) / 96
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.5], 1) / 16


_ARM = 0.34
# Outlines about the origin in units of the thing's radius, y down; a second outline is a hole.
SHAPES: dict[str, tuple[Float[np.ndarray, "points 2"], ...]] = {
    "circle": (_regular(96),),
    "square": (np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.88,),
    "triangle": (_regular(3, 1.16) * [1.0, 1.08] + [0, 0.28],),
    "diamond": (_regular(4) * [0.8, 1.1],),
    "star": (_star(),),
    "heart": (_heart(),),
    "cross": (
        np.array(
            [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]
            + [(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]
        ),
    ),
    "ring": (_regular(96), _regular(96, 0.52)),
}


@dataclass(frozen=True)
class Thing:
    """One shape of a scene: its words, and where exactly it is (parts of the picture's side)."""

    shape: str
    colour: str
    size: str
    position: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one thing, or two with the relation of the first to the second."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None


def is_held_out(shape: str, colour: str, position: str) -> bool:
    """Whether training never sees this combination: one in eight, by a hash of its words."""
    return zlib.crc32(f"{shape}, {colour}, {position}".encode()) % 8 == 0


def scene(index: int, seed: int = 0, split: str = "train") -> Scene:
    """Return scene `index` of the data set `seed`; `split` is "train" or "heldout"."""
    if split not in ("train", "heldout"):
        raise ValueError(f'split {split!r} is unknown: it is "train" or "heldout"')
    rng = np.random.default_rng([seed, index, split == "heldout"])
    while True:
        candidate = _candidate(rng)
        held_out = any(is_held_out(thing.shape, thing.colour, thing.position) for thing in candidate.things)
        if held_out == (split == "heldout"):
            return candidate


def _candidate(rng: np.random.Generator) -> Scene:
    colours = [str(word) for word in rng.permutation(list(COLOURS))]
    background = colours.pop()
    if rng.random() < PAIRS:
        relation = str(rng.choice(list(RELATIONS)))
        positions, scale = RELATIONS[relation], PAIR_SCALE
    else:
        relation, scale = None, 1.0
        positions = (str(rng.choice(list(POSITIONS))),)
    things = tuple(_thing(rng, colours.pop(), position, scale) for position in positions)
    return Scene(things, background, relation)


def _thing(rng: np.random.Generator, colour: str, position: str, scale: float) -> Thing:
    shape, size = str(rng.choice(list(SHAPES))), str(rng.choice(list(SIZES)))
    radius = scale * SIZES[size] / 2 * rng.uniform(0.95, 1.05)
    inside = radius * 1.15 + 0.01
    x, y = np.clip(np.array(POSITIONS[position]) + rng.uniform(-0.02, 0.02, 2), inside, 1 - inside)
    return Thing(shape, colour, size, position, float(x), float(y), float(radius))


def coverage(thing: Thing, size: int) -> Float[np.ndarray, "size size"]:
    """Return the part of each pixel that the thing covers, 0 to 1, in a picture of `size` x `size`."""
    canvas = Image.new("L", (size * SUPERSAMPLING, size * SUPERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    for outline, ink in zip(SHAPES[thing.shape], (255, 0), strict=False):
        points = (outline * thing.radius + [thing.x, thing.y]) * size * SUPERSAMPLING - 0.5
        pen.polygon([tuple(point) for point in points.tolist()], fill=ink)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float64) / 255


def draw(scene: Scene, size: int = 64) -> UInt8[np.ndarray, "size size 3"]:
    """Paint the scene as an sRGB picture of `size` x `size`, 0 to 255."""
    picture = np.full((size, size, 3), COLOURS[scene.background], np.float64)
    for thing in scene.things:
        alpha = coverage(thing, size)[..., None]
        picture += alpha * (np.array(COLOURS[thing.colour]) - picture)
    return np.round(picture).astype(np.uint8)


def outlines(scene: Scene, size: int = 64) -> UInt8[np.ndarray, "size size 3"]:
    """The outlines of the scene's things, white on black, as an sRGB picture: what a ControlNet is trained on."""
    picture = np.zeros((size, size, 3), np.uint8)
    for thing in scene.things:
        inside = np.pad(coverage(thing, size) > 0.5, 1)
        core = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        picture[inside[1:-1, 1:-1] & ~core] = 255
    return picture


@cache
def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


_PLACES: dict[str, tuple[str, ...]] = {
    "centre": ("in the centre", "in the center", "in the middle"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "top left": ("in the top left corner", "in the top left"),
    "top right": ("in the top right corner", "in the top right"),
    "bottom left": ("in the bottom left corner", "in the bottom left"),
    "bottom right": ("in the bottom right corner", "in the bottom right"),
}


def caption(scene: Scene, rng: np.random.Generator, full: bool = False) -> str:
    """Say the scene in one of several phrasings, drawn from `rng`.

    `full` always names the background and the position; otherwise the background is left out of one caption in ten,
    and the centre out of one in two. The size is named in three captions of five.
    """

    def pick(*words: str) -> str:
        return words[rng.integers(len(words))]

    def noun(thing: Thing) -> str:
        words = ([thing.size] if rng.random() < 0.6 else []) + [thing.colour, thing.shape]
        return " ".join([_article(words[0]), *words])

    first = scene.things[0]
    if len(scene.things) == 2:
        relation = scene.relation or ""
        if rng.random() < 0.3:
            relation = relation.removeprefix("to the ")
        what = f"{noun(first)} {relation} {noun(scene.things[1])}"
    elif first.position == "centre" and not full and rng.random() < 0.5:
        what = noun(first)
    else:
        what = f"{noun(first)} {pick(*_PLACES[first.position])}"
    if not full and rng.random() < 0.1:
        return what
    ground = f"{_article(scene.background)} {scene.background} background"
    return pick(
        f"{what} on {ground}",
        f"{what} on {ground}",
        f"{what} on {scene.background}",
        f"{what}, {scene.background} background",
        f"{ground} with {what}",
        f"a picture of {what} on {ground}",
    )
