"""Latents of a whole data set, made once, and how large they are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float16, Float32, Int, UInt8
from tqdm import tqdm

from sdjax.files import write_whole
from sdjax.models import tiling
from sdjax.parallel import filled
from sdjax.training import identity
from sdjax.training.data import buckets_of, framed
from sdjax.training.networks import Params, bind
from sdjax.training.objective import to_unit

if TYPE_CHECKING:
    from sdjax.training.loop import Run

_BATCH = 64
_SAMPLE = 512  # images that the scaling factor is measured on


def moments(
    module: nnx.Module, params: Params, pixels: UInt8[Array, "batch height width 3"]
) -> Float[Array, "batch h w moments"]:
    """The latents' mean, then their logvar; of large pictures in the memory that one takes."""
    return jnp.concatenate(tiling.encode(bind(module, params), to_unit(pixels)), axis=-1)


def _encoder(run: Run):
    """The function uint8 [batch, h, w, 3] -> mean and logvar [batch, h / f, w / f, 2 c], which all devices share."""
    params, devices = run.state.average if run.config.task == "vae" else run.networks.params, run.devices
    copies = {name: devices.replicate(np.asarray(leaf)) for name, leaf in params["vae"].items()}
    compiled = devices.pmap(partial(moments, run.networks.modules["vae"]))
    return lambda pixels: devices.join(compiled(copies, devices.split(pixels))).astype(np.float32)


def _encoded(
    run: Run, encode: Callable, chunks: Sequence[Sequence[int]]
) -> Generator[tuple[Float32[np.ndarray, "chunk h w moments"], Any], None, None]:
    """The moments and frames of each chunk of the examples, none longer than the first; the next one is read ahead."""
    size = -(-len(chunks[0]) // len(run.devices)) * len(run.devices)
    pool, read = ThreadPoolExecutor(run.config.data.workers), partial(framed, run.pictures)
    try:
        ahead = pool.map(read, chunks[0])
        for chunk, following in zip(chunks, [*chunks[1:], ()], strict=True):
            pixels, frames = zip(*ahead, strict=True)
            ahead = pool.map(read, following)
            yield encode(filled(np.stack(pixels), size))[: len(chunk)], frames  # one shape, one program
    finally:
        pool.shutdown(cancel_futures=True)


class _Parts:
    """What is kept of every example in several arrays, each of one shape: to be asked for examples of one of them."""

    def __init__(self, places: Sequence[Int[np.ndarray, " examples"]], arrays: Sequence[np.ndarray]) -> None:
        self._arrays, count = arrays, sum(map(len, places))
        self._part, self._row = np.zeros(count, int), np.zeros(count, int)
        for number, own in enumerate(places):
            self._part[own], self._row[own] = number, np.arange(len(own))

    def __getitem__(self, indices: Int[np.ndarray, " batch"]) -> Float16[np.ndarray, "batch h w moments"]:
        return self._arrays[int(self._part[indices[0]])][self._row[indices]]


class Cache(NamedTuple):
    """Of every example of a data set the latent's mean and logvar, and the picture's frame."""

    moments: Float16[np.ndarray, "examples h w moments"] | _Parts
    frames: Int[np.ndarray, "examples 4"]


def cached(run: Run, stop: threading.Event | None = None) -> Cache | None:
    """Return what a data set's pictures are trained on as, or None if `stop` was set before it was made.

    It is kept in the run's folder, and made anew where the pictures, their shapes or the VAE are others.
    """
    buckets, count = buckets_of(run.pictures), len(run.pictures)
    groups = {run.folder / "latents.npy": np.arange(count)}
    if buckets is not None:
        groups = {run.folder / f"latents-{'x'.join(map(str, shape))}.npy": own for shape, own in buckets.groups()}
    note, digest, beside = run.folder / "latents.sha256", _digest(run), run.folder / "frames.npy"
    there = note.exists() and beside.exists() and all(path.exists() for path in groups)
    if not (there and note.read_text(encoding="utf-8") == digest):
        note.unlink(missing_ok=True)
        for other in set(run.folder.glob("latents*.npy")) - groups.keys():  # of other shapes
            other.unlink()
        encode, frames = _encoder(run), np.zeros((count, 4), np.int32)
        for path, places in groups.items():
            if not _written(run, encode, path, places, frames, stop):
                return None
        np.save(beside, frames)
        write_whole(note, digest.encode())
    parts = [np.load(path, mmap_mode="r") for path in groups]
    return Cache(parts[0] if len(parts) == 1 else _Parts(list(groups.values()), parts), np.load(beside))


def _written(
    run: Run,
    encode: Callable,
    path: Path,
    places: Int[np.ndarray, " examples"],
    frames: Int[np.ndarray, "all 4"],
    stop: threading.Event | None,
) -> bool:
    """Write the moments of examples of one shape, and put their frames into `frames`; whether `stop` was not set."""
    unfinished = run.folder / "latents.part.npy"
    chunks = [places[start : start + _BATCH].tolist() for start in range(0, len(places), _BATCH)]
    # Not mapped: there a full disk is a signal that ends the process.
    with unfinished.open("wb") as file, contextlib.closing(_encoded(run, encode, chunks)) as encoded:
        for chunk in tqdm(chunks, desc=path.stem, unit="batch", dynamic_ncols=True):
            if stop is not None and stop.is_set():
                return False
            part, frames[chunk] = next(encoded)
            part = part.astype(np.float16)
            if chunk is chunks[0]:
                header = np.lib.format.header_data_from_array_1_0(part)
                np.lib.format.write_array_header_1_0(file, header | {"shape": (len(places), *part.shape[1:])})
            file.write(part.tobytes())
    unfinished.replace(path)
    return True


def _digest(run: Run) -> str:
    """Of all that the latents follow from."""
    data, networks = run.config.data, run.networks
    pictures = [identity.of_source(run.pictures, times=True), data.generator, data.options, data.size]
    if (buckets := buckets_of(run.pictures)) is not None:
        pictures += [buckets.shapes, buckets.of.tolist()]
    digest = hashlib.sha256(json.dumps([*pictures, networks.configs["vae"]], default=str, sort_keys=True).encode())
    for name, leaf in sorted(networks.params["vae"].items()):
        digest.update(name.encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def scaling_factor(run: Run) -> float:
    """Return what makes the standard deviation of the data set's latents 1 (Rombach et al. 2022, appendix G)."""
    starts, count = range(0, _SAMPLE, _BATCH), len(run.pictures)
    chunks = [[index % count for index in range(start, start + _BATCH)] for start in starts]
    parts = [part for part, _ in _encoded(run, _encoder(run), chunks)]
    means = np.split(np.concatenate(parts), 2, axis=-1)[0]
    return round(float(1 / means.std()), 5)
