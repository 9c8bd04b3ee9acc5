"""Reading safetensors files tensor by tensor from any file object, so that no second copy is held; and writing them.

The format: https://huggingface.co/docs/safetensors. The library maps a file into memory, which keeps every page that
was read, and it knows no bucket; here a tensor is one seek and one read.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_KEY = 1000  # characters of a tensor's key; Stable Diffusion's have up to a hundred

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file or tensor and what was expected."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file: bytes from `start` to `end`.

    axes: in the order in which they lie, the outermost first; None where that is their own.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    axes: tuple[int, ...] | None = None


def read_header(file: IO[bytes], name: str) -> dict[str, Entry]:
    """The tensors of a safetensors file; `name` is what errors call it.

    Raises:
        CheckpointError: the file is cut short, is not safetensors, has tensors that overlap or gaps between them, or
            holds a dtype that cannot be read.
    """
    return read_header_and_metadata(file, name)[0]


def read_header_and_metadata(file: IO[bytes], name: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """As `read_header`, with what the file's maker noted in it."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(f"{name} is not a whole safetensors file: {size:,} bytes, a header of {length:,}")
    try:
        header = json.loads(file.read(length))
        metadata = dict(header.pop("__metadata__", None) or {})
        entries = {key: _entry(key, value, 8 + length) for key, value in header.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise CheckpointError(f"{name} is not a safetensors file: its header cannot be read") from None
    # Bytes that many tensors share would be read over and over.
    last = 8 + length
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.end > size:
            raise CheckpointError(f"{name} is truncated: {key} ends at byte {entry.end:,} of {size:,}")
        if entry.start != last:
            raise CheckpointError(f"{name}: {key} begins at byte {entry.start:,}, where byte {last:,} is next")
        last = entry.end
    if last != size:
        raise CheckpointError(f"{name} has {size - last:,} bytes that belong to no tensor")
    return entries, {key: str(value) for key, value in metadata.items()}


def check_key(key: str) -> str:
    """A tensor's key. Raises CheckpointError where it is too long to be one."""
    if len(key) > MAX_KEY:
        raise CheckpointError(f"its key {key[:40]!r}... has {len(key):,} characters; allowed are {MAX_KEY:,}")
    return key


def _entry(key: str, value: Mapping, base: int) -> Entry:
    check_key(key)
    if value["dtype"] not in _DTYPES:
        raise CheckpointError(f"{key} is {value['dtype']}; readable are {', '.join(_DTYPES)}")
    dtype, shape = _DTYPES[value["dtype"]], tuple(map(int, value["shape"]))
    start, end = map(int, value["data_offsets"])
    if start < 0 or any(side < 0 for side in shape) or end - start != dtype.itemsize * math.prod(shape):
        raise CheckpointError(f"{key} takes {end - start} bytes, which does not fit {dtype} {list(shape)}")
    return Entry(dtype, shape, base + start, base + end)


def read_tensors(file: IO[bytes], entries: Mapping[str, Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor with its key, in the order in which they lie in the file."""
    for key, entry in sorted(entries.items(), key=lambda item: item[1].start):
        file.seek(entry.start)
        data = bytearray(file.read(entry.end - entry.start))
        if len(data) != entry.end - entry.start:
            raise CheckpointError(f"{key} is truncated: {len(data):,} of {entry.end - entry.start:,} bytes")
        axes = entry.axes or range(len(entry.shape))
        lies = np.frombuffer(data, entry.dtype).reshape([entry.shape[axis] for axis in axes])
        yield key, lies.transpose(np.argsort(axes))


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a file as PyTorch's users expect it, which whoever may read its folder may read."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library's own is 0o600
