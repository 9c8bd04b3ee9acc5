"""Data sets that `python -m pipelines.encode_latents` has encoded: latents and text states in place of pictures."""

import posixpath
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float16

from sdjax.training.samples import DataError
from sdjax.weights.safetensors import CheckpointError, Entry, read_header

_COLUMNS = ["shard", "index", "caption", "frame", "flags", "model_fingerprint", "size", "dtype"]
_ONE = {"model_fingerprint": "models", "size": "sizes", "dtype": "dtypes"}  # columns that have one value in a data set
_MANIFEST = re.compile(r"[0-9a-f]{32}\.parquet")  # other files are somebody's own
TENSORS = ("moments", "text", "pooled")
"""What a shard has of each example; the last of Stable Diffusion XL's alone."""
SHARED = ("unconditional", "unconditional_pooled")
"""What a shard has of the empty caption."""


def is_whole(tensors: Iterable[str]) -> bool:
    """Whether a shard has all tensors and no others."""
    return set(tensors) in ({*TENSORS[:2], SHARED[0]}, {*TENSORS, *SHARED})


def encoding_parts(text_encoders: Sequence[str]) -> tuple[str, ...]:
    """The components whose fingerprint says what encoded a data set."""
    return (*text_encoders, *(name.replace("text_encoder", "tokenizer") for name in text_encoders), "vae")


class _Place(NamedTuple):
    shard: str
    index: int  # in the shard's tensors
    is_empty: bool  # its caption
    frame: tuple[int, ...]


class Text(NamedTuple):
    """A caption as a UNet is told of it."""

    states: Float16[np.ndarray, "length hidden"]
    pooled: Float16[np.ndarray, " pooled"] | None = None


class EncodedSet:
    """The examples that the manifests of a folder or fsspec URL commit, but for those flagged as NaN.

    An example is read by its place in its shard, so any of them is at hand at once.

    Attributes:
        fingerprint: of the `encoding_parts` that made it.
        size: pixels of a side of the pictures.
        is_xl: whether it has what Stable Diffusion XL is told beside states.
        unconditional: the empty caption's states, and if `is_xl` its pooled vector.

    Raises:
        DataError: no manifest is there, or they are of different models, sizes or dtypes.
    """

    def __init__(self, url: str) -> None:
        self._fs, root = fsspec.core.url_to_fs(url)
        self._url, self._headers, self._lock = url, {}, threading.Lock()
        paths = sorted(map(str, self._fs.find(f"{root.rstrip('/')}/manifest", maxdepth=1)))
        self._examples: list[_Place] = []
        kinds: dict[str, set[Any]] = {column: set() for column in _ONE}
        for path in (path for path in paths if _MANIFEST.fullmatch(posixpath.basename(path))):
            data = self._fs.cat_file(path)
            try:
                for row in pq.ParquetFile(pa.BufferReader(data)).read(_COLUMNS, use_threads=False).to_pylist():
                    for column, found in kinds.items():
                        found.add(row[column])
                    if not row["flags"]:
                        shard, frame = f"{root.rstrip('/')}/{row['shard']}", tuple(row["frame"])
                        self._examples.append(_Place(shard, row["index"], not row["caption"], frame))
            except Exception:  # damage makes pyarrow raise all sorts
                raise DataError(f"{path} is no whole manifest of encoded images") from None
        if not self._examples:
            raise DataError(f"{url} holds no encoded image; python -m pipelines.encode_latents writes such a folder")
        for column, found in kinds.items():
            if len(found) > 1:
                raise DataError(f"{url} holds encodings of {len(found)} {_ONE[column]}; name a folder of one")
        [self.fingerprint], [self.size] = kinds["model_fingerprint"], kinds["size"]
        first = self._examples[0]
        self.is_xl = "pooled" in self._header(first.shard)
        self.unconditional = Text(*(self._tensor(first, name) for name in SHARED[: 1 + self.is_xl]))

    def __len__(self) -> int:
        return len(self._examples)

    def moments(self, index: int) -> Float16[np.ndarray, "h w moments"]:
        """The latent's mean, then its log-variance; not scaled."""
        return self._tensor(self._examples[index], "moments")

    def text(self, index: int) -> Text:
        """The caption's states, and if `is_xl` its pooled vector."""
        return Text(*(self._tensor(self._examples[index], name) for name in ("text", "pooled")[: 1 + self.is_xl]))

    def is_empty(self, index: int) -> bool:
        """Whether the caption is."""
        return self._examples[index].is_empty

    def frame(self, index: int) -> tuple[int, ...]:
        """The picture's `sdjax.training.framing.Frame`."""
        return self._examples[index].frame

    def files(self) -> Iterator[tuple[str | int | None, ...]]:
        """What encoded them, and each example's place."""
        yield self.fingerprint, None
        for place in self._examples:
            yield posixpath.basename(place.shard), place.index, None

    def _tensor(self, place: _Place, name: str) -> np.ndarray:
        entry = self._header(place.shard)[name]
        shape, start, end = entry.shape, entry.start, entry.end
        if name not in SHARED:
            each, shape = (end - start) // shape[0], shape[1:]
            start, end = start + place.index * each, start + (place.index + 1) * each
        return np.frombuffer(self._fs.cat_file(place.shard, start, end), entry.dtype).reshape(shape)

    def _header(self, shard: str) -> dict[str, Entry]:
        with self._lock:
            if shard not in self._headers:
                try:
                    with self._fs.open(shard, "rb") as stream:
                        header = read_header(stream, shard)
                except FileNotFoundError:
                    raise DataError(f"{shard} is not there, and a manifest of {self._url} names it") from None
                except CheckpointError as error:
                    raise DataError(str(error)) from None
                if not is_whole(header):
                    raise DataError(f"{shard} is no shard of encoded images: it holds {', '.join(sorted(header))}")
                self._headers[shard] = header
            return self._headers[shard]
