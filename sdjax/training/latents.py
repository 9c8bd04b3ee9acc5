"""Latents of a whole data set, made once, and how large they are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float16, Float32, Int, UInt8
from tqdm import tqdm

from sdjax.files import write_whole
from sdjax.models import tiling
from sdjax.training import identity
from sdjax.training.data import framed
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
    run: Run, chunks: Sequence[Sequence[int]]
) -> Generator[tuple[Float32[np.ndarray, "chunk h w moments"], Any], None, None]:
    """The moments and frames of each chunk of the examples, none longer than the first; the next one is read ahead."""
    encode, size = _encoder(run), -(-len(chunks[0]) // len(run.devices)) * len(run.devices)
    pool, read = ThreadPoolExecutor(run.config.data.workers), partial(framed, run.pictures)
    try:
        ahead = pool.map(read, chunks[0])
        for chunk, following in zip(chunks, [*chunks[1:], ()], strict=True):
            pixels, frames = zip(*ahead, strict=True)
            ahead = pool.map(read, following)
            filled = np.stack(pixels)[np.minimum(np.arange(size), len(chunk) - 1)]  # one shape, one program
            yield encode(filled)[: len(chunk)], frames
    finally:
        pool.shutdown(cancel_futures=True)


class Cache(NamedTuple):
    """Of every example of a data set the latent's mean and logvar, and the picture's frame."""

    moments: Float16[np.ndarray, "examples h w moments"]
    frames: Int[np.ndarray, "examples 4"]


def cached(run: Run, stop: threading.Event | None = None) -> Cache | None:
    """Return what a data set's pictures are trained on as, or None if `stop` was set before it was made.

    It is kept in the run's folder, and made anew where the pictures, their size or the VAE are others.
    """
    path, unfinished = run.folder / "latents.npy", run.folder / "latents.part.npy"
    note, digest, beside = run.folder / "latents.sha256", _digest(run), run.folder / "frames.npy"
    there = path.exists() and beside.exists() and note.exists()
    if not (there and note.read_text(encoding="utf-8") == digest):
        note.unlink(missing_ok=True)
        count = len(run.pictures)
        frames = np.zeros((count, 4), np.int32)
        chunks = [range(start, min(start + _BATCH, count)) for start in range(0, count, _BATCH)]
        # Not mapped: there a full disk is a signal that ends the process.
        with unfinished.open("wb") as file, contextlib.closing(_encoded(run, chunks)) as encoded:
            for chunk in tqdm(chunks, desc="latents", unit="batch", dynamic_ncols=True):
                if stop is not None and stop.is_set():
                    return None
                part, frames[chunk] = next(encoded)
                part = part.astype(np.float16)
                if chunk is chunks[0]:
                    header = np.lib.format.header_data_from_array_1_0(part)
                    np.lib.format.write_array_header_1_0(file, header | {"shape": (count, *part.shape[1:])})
                file.write(part.tobytes())
        unfinished.replace(path)
        np.save(beside, frames)
        write_whole(note, digest.encode())
    return Cache(np.load(path, mmap_mode="r"), np.load(beside))


def _digest(run: Run) -> str:
    """Of all that the latents follow from."""
    data, networks = run.config.data, run.networks
    pictures = [identity.of_source(run.pictures, times=True), data.generator, data.options, data.size]
    digest = hashlib.sha256(json.dumps([*pictures, networks.configs["vae"]], default=str, sort_keys=True).encode())
    for name, leaf in sorted(networks.params["vae"].items()):
        digest.update(name.encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def scaling_factor(run: Run) -> float:
    """Return what makes the standard deviation of the data set's latents 1 (Rombach et al. 2022, appendix G)."""
    starts, count = range(0, _SAMPLE, _BATCH), len(run.pictures)
    chunks = [[index % count for index in range(start, start + _BATCH)] for start in starts]
    parts = [part for part, _ in _encoded(run, chunks)]
    means = np.split(np.concatenate(parts), 2, axis=-1)[0]
    return round(float(1 / means.std()), 5)
