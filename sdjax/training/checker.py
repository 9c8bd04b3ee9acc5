"""What a picture of a scene shows, read from its pixels alone.

The background is the colour of the picture's border. What differs from it falls into connected regions; a region's
colour is that of its inner pixels, its position that of its bounding box, and its shape the one whose outline, drawn
into the same bounding box, overlaps it best.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from sdjax.training.scenes import COLOURS, SHAPES, Scene, Thing, coverage

# RGB distance from the background at which a pixel belongs to a thing; the two nearest colours are 89 apart.
_DIFFERENT = 45.0
_LEAST_AREA = 0.006  # part of the picture that a region must fill to be a thing: a third of a small star
_LEAST_OVERLAP = 0.7  # intersection over union with the best outline, below which a region has no known shape
_AROUND = np.ones((3, 3), bool)
_NAMES = tuple(COLOURS)
_VALUES = np.array([COLOURS[name] for name in _NAMES], np.float64)


@dataclass(frozen=True)
class Seen:
    """A thing in a picture; `shape` is None where it resembles none."""

    shape: str | None
    colour: str
    position: str
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows: things from the largest to the smallest."""

    background: str
    things: tuple[Seen, ...]


def read(pixels: UInt8[np.ndarray, "size size 3"]) -> Reading:
    """Read a square picture."""
    values = pixels.astype(np.float64)
    border = np.concatenate([values[:2].reshape(-1, 3), values[-2:].reshape(-1, 3), values[:, :2].reshape(-1, 3)])
    ground = np.median(np.concatenate([border, values[:, -2:].reshape(-1, 3)]), axis=0)
    different = np.linalg.norm(values - ground, axis=-1) > _DIFFERENT
    labels = np.zeros(different.shape, int)
    ndimage.label(different, structure=_AROUND, output=labels)
    regions = [labels == number for number in range(1, labels.max() + 1)]
    regions = [region for region in regions if region.mean() >= _LEAST_AREA]
    regions.sort(key=lambda region: -region.sum())
    return Reading(_nearest(ground), tuple(_see(values, ground, region) for region in regions))


def _nearest(value: Float[np.ndarray, "3"]) -> str:
    return _NAMES[int(np.linalg.norm(_VALUES - value, axis=1).argmin())]


def _see(
    values: Float[np.ndarray, "size size 3"], ground: Float[np.ndarray, "3"], region: Bool[np.ndarray, "size size"]
) -> Seen:
    size = len(region)
    inner = np.asarray(ndimage.binary_erosion(region))
    colour = np.median(values[np.nonzero(inner if inner.sum() >= 4 else region)], axis=0)
    # How much of a pixel the thing covers: the place of the pixel's colour between the background's and the thing's.
    way = colour - ground
    alpha = np.clip((values - ground) @ way / (way @ way), 0, 1) * ndimage.binary_dilation(region, structure=_AROUND)
    rows, columns = np.nonzero(alpha.max(axis=1) > 0.5)[0], np.nonzero(alpha.max(axis=0) > 0.5)[0]
    if not len(rows) or not len(columns):
        rows, columns = np.nonzero(region.any(axis=1))[0], np.nonzero(region.any(axis=0))[0]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    x, y = (left + right) / 2 / size, (top + bottom) / 2 / size
    side = max(right - left, bottom - top)
    # A box of whole pixels is up to a pixel too large, which on a small square looks like a circle's corners.
    sides = [(side - less) / size for less in (0, 0.5, 1)]
    overlaps = {shape: max(_overlap(alpha, shape, x, y, side) for side in sides) for shape in SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])
    return Seen(shape if overlaps[shape] >= _LEAST_OVERLAP else None, _nearest(colour), _position(x, y), x, y)


@cache
def _box(shape: str) -> tuple[Float[np.ndarray, "2"], float]:
    """The centre and the longer side of an outline's bounding box, in radii."""
    low, high = SHAPES[shape][0].min(axis=0), SHAPES[shape][0].max(axis=0)
    return (low + high) / 2, float((high - low).max())


def _overlap(alpha: Float[np.ndarray, "size size"], shape: str, x: float, y: float, side: float) -> float:
    """Intersection over union with the outline drawn at the same place and size."""
    centre, extent = _box(shape)
    radius = side / extent
    drawn = coverage(Thing(shape, "", "", "", x - centre[0] * radius, y - centre[1] * radius, radius), len(alpha))
    return float(np.minimum(alpha, drawn).sum() / np.maximum(alpha, drawn).sum())


def _position(x: float, y: float) -> str:
    """The nearest of the nine positions; a large thing keeps off the edges, so thirds are cut nearer to the middle."""
    across = "left" if x < 0.415 else "right" if x > 0.585 else ""
    down = "top" if y < 0.415 else "bottom" if y > 0.585 else ""
    return " ".join(word for word in (down, across) if word) or "centre"


def check(scene: Scene, reading: Reading) -> dict[str, bool]:
    """Compare a reading with the scene that was asked for.

    Returns the facts that the scene has: `background` always; `colour`, `shape`, `side` and `alone` (nothing else is in
    the picture) of one thing; of two, `pair` (both present with their colours), `pair shapes` (with shapes also) and
    `relation` (the two colours in the right order).
    """
    facts = {"background": reading.background == scene.background}
    if len(scene.things) == 1:
        thing, seen = scene.things[0], reading.things[0] if reading.things else None
        facts["colour"] = seen is not None and seen.colour == thing.colour
        facts["shape"] = seen is not None and seen.shape == thing.shape
        facts["side"] = seen is not None and seen.position == thing.position
        facts["alone"] = len(reading.things) == 1
        return facts
    found = [next((s for s in reading.things if s.colour == thing.colour), None) for thing in scene.things]
    first, second = found
    facts["pair"] = first is not None and second is not None
    facts["pair shapes"] = all(s is not None and s.shape == t.shape for s, t in zip(found, scene.things, strict=True))
    facts["relation"] = first is not None and second is not None and _relation(first, second) == scene.relation
    return facts


def _relation(first: Seen, second: Seen) -> str:
    if abs(first.x - second.x) > abs(first.y - second.y):
        return "to the left of" if first.x < second.x else "to the right of"
    return "above" if first.y < second.y else "below"
