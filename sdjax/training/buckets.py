"""Aspect-ratio buckets: a batch's pictures have one shape, which is the nearest to their own, not all the same one."""

import json
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from sdjax.files import write_whole

Shape = tuple[int, ...]  # height and width
_READERS = 32  # threads, which mostly wait for a header
_AHEAD = 4096  # pictures that they are given at once


@runtime_checkable
class Measured(Protocol):
    """A data set of pictures of any sides."""

    def __len__(self) -> int: ...
    def sides(self, index: int) -> Shape: ...


class Buckets:
    """Which bucket each example of a data set goes to.

    Attributes:
        shapes: of each bucket's pictures.
        of: each example's bucket.
    """

    def __init__(self, shapes: Sequence[Shape], of: Int[np.ndarray, " examples"]) -> None:
        self.shapes, self.of = tuple(shapes), of
        self._counts = np.bincount(of, minlength=len(self.shapes))
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def shape(self, index: int) -> Shape:
        """What an example's pictures are cut to."""
        return self.shapes[self.of[index]]

    def groups(self) -> list[tuple[Shape, Int[np.ndarray, " examples"]]]:
        """The shapes, each with its examples, that have some."""
        own = [(shape, np.flatnonzero(self.of == number)) for number, shape in enumerate(self.shapes)]
        return [(shape, examples) for shape, examples in own if len(examples)]

    def indices(self, step: int, batch_size: int, seed: int) -> Int[np.ndarray, " batch"]:
        """Return which examples step `step` sees, all of one bucket: as many steps are an epoch each time."""
        epoch, place = divmod(step, int((-(-self._counts // batch_size)).sum()))
        return self._epoch(batch_size, seed, epoch)[place]

    def _shuffled(self, batch_size: int, seed: int, epoch: int) -> Int[np.ndarray, "batches batch"]:
        """An epoch's batches: each bucket's examples, of which the first come again where a batch lacks some."""
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(self.of))
        own = [order[self.of[order] == bucket] for bucket in range(len(self.shapes))]
        batches = [np.resize(each, (-(-len(each) // batch_size), batch_size)) for each in own]
        return rng.permutation(np.concatenate(batches))


def nearest(sides: Shape, shapes: Sequence[Shape]) -> int:
    """Which of the shapes a picture loses least to: that of the nearest ratio of height to width, in logarithms."""
    (height, width), (heights, widths) = sides, np.transpose(shapes)
    return int(np.abs(np.log(height / width) - np.log(heights / widths)).argmin())


def kept(
    path: Path, source: Measured, shapes: Sequence[Shape], *, data: str, stop: threading.Event | None
) -> Buckets | None:
    """Return the buckets of a run's data set, or None if `stop` was set before each picture's sides were known.

    They are written to `path`, and taken from there while the shapes and the examples, whose digest `data` is, are the
    same: a picture that was mended changes no order.
    """
    made = {"shapes": [list(shape) for shape in shapes], "data": data}
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if {key: there.get(key) for key in made} != made:
        of, progress = [], tqdm(total=len(source), desc="buckets", unit="image", dynamic_ncols=True)
        with ThreadPoolExecutor(_READERS) as pool, progress:
            for start in range(0, len(source), _AHEAD):
                for sides in pool.map(source.sides, range(start, min(start + _AHEAD, len(source)))):
                    if stop is not None and stop.is_set():
                        pool.shutdown(cancel_futures=True)
                        return None
                    of.append(nearest(sides, shapes))
                    progress.update()
        there = made | {"of": of}
        write_whole(path, (json.dumps(there) + "\n").encode())
    buckets = Buckets(shapes, np.array(there["of"]))
    for shape in (shape for number, shape in enumerate(shapes) if number not in buckets.of):
        print(f"data.aspect_ratio_buckets: no picture is nearest to {list(shape)}", file=sys.stderr)
    return buckets
