"""Latents and text states as a job makes and stores them: planned, encoded, and a safetensors shard a unit.

    shards/<unit>.safetensors   moments     float16 [examples, h, w, 2 c]: the latent's mean, then its log-variance
                                text        float16 [examples, length, hidden]: the captions' states
                                unconditional  float16 [length, hidden]: the empty caption's
                                of Stable Diffusion XL also
                                pooled      float16 [examples, pooled]: the captions' vectors
                                unconditional_pooled  float16 [pooled]: the empty caption's
    manifest/<unit>.parquet     a row an example, `index` its place in the shard's tensors

`sdjax.training.encoded` reads them.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import tee
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from safetensors.numpy import save

from pipelines import image_sets
from pipelines.image_sets import Found, Picture
from pipelines.layout import shard_name
from pipelines.sinks import Encoded, Provenance, columns, commit
from pipelines.sources import Place
from pipelines.storage import Store
from pipelines.units import Row, Unit, extras_json
from sdjax.training.encoded import SHARED, TENSORS, encoding_parts
from sdjax.training.framing import cut, frame

SUFFIX = "safetensors"
MANIFEST = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("key", pa.string()),  # the sample's name in its set
        pa.field("caption", pa.string()),
        pa.field("image_sha256", pa.string()),
        pa.field("size", pa.int64()),  # pixels of a side, as encoded
        pa.field("frame", pa.list_(pa.int32())),  # `sdjax.training.framing.Frame`: the picture before it was cut
        pa.field("shard", pa.string()),  # its path in the output
        pa.field("index", pa.int64()),  # in the shard's tensors
        pa.field("bytes", pa.int64()),
        pa.field("sha256", pa.string()),  # of the bytes of its tensors and the empty caption's
        pa.field("flags", pa.list_(pa.string())),  # nan: not finite, and not to be trained on
        pa.field("seconds", pa.float64()),  # the unit's time on the device, shared out evenly
        pa.field("model", pa.string()),
        pa.field("model_fingerprint", pa.string()),  # of the VAE, the text encoders and the tokenizers
        pa.field("dtype", pa.string()),  # in which the networks computed
        pa.field("versions", pa.string()),
        pa.field("device", pa.string()),
        pa.field("extras", pa.string()),  # the sample's other columns, as a JSON object
        pa.field("input_file", pa.string()),
        pa.field("input_row", pa.int64()),
    ]
)


class LatentError(ValueError):
    """A size at which nothing can be encoded; one line."""


class Arrays(NamedTuple):
    """What is stored of an example, and of the empty caption, by the tensors' names; and the picture's frame."""

    own: dict[str, np.ndarray]
    shared: dict[str, np.ndarray]
    frame: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self.own.values())

    @property
    def sha256(self) -> str:
        found = self.own | self.shared
        return hashlib.sha256(b"".join(found[name].tobytes() for name in TENSORS + SHARED if name in found)).hexdigest()


@dataclass(frozen=True)
class Result:
    """An encoded picture."""

    request: Picture
    arrays: Arrays
    flags: tuple[str, ...]


class LatentSpec:
    """What a checkpoint promises of pictures that it encodes at `size` x `size`, without its weights.

    Raises:
        CheckpointError: nothing that it encodes could be trained on here.
        LatentError: nothing can be encoded at this size.
    """

    def __init__(self, spec: Any, size: int | None) -> None:
        self.spec, self.size = spec, size or min(spec.default_size)
        self.name, self.dtype = spec.name, spec.dtype
        spec.family.check_trainable(self.name)
        if self.size % spec.scale:
            raise LatentError(f"--size={self.size} is not a multiple of {spec.scale}, which this model's VAE needs")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files of the networks that encode, in hex, as they were when first asked for."""
        return self.hashed()

    def hashed(self) -> str:
        """What the fingerprint would be of the files as they are now."""
        return self.spec.checkpoint.fingerprint(encoding_parts(self.spec.family.text_encoders))

    def resolve(self, picture: Picture) -> Picture:
        """The picture as it is. Raises RequestError where it cannot be read any more."""
        for _ in image_sets.load([picture], Picture.decode):
            pass
        return picture

    def id(self, picture: Picture) -> str:
        return id_of(self.fingerprint, self.dtype, self.size, picture.sha256, picture.caption)


def id_of(model_fingerprint: str, dtype: str, size: int, image_sha256: str, caption: str) -> str:
    """The name of an example: 32 hex digits of a hash of what it is made of and by."""
    asked = f"{model_fingerprint} {dtype} {size} {image_sha256} {caption}"
    return hashlib.sha256(asked.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class PlanPicture:
    """A picture that was found, as one to encode."""

    planner: LatentSpec

    def __call__(self, place: Place, found: Found) -> Row:
        """Raises any of `rejected.UNUSABLE` for one that cannot be used."""
        picture, extras = found
        # Of one program all: pictures come in one size.
        return Row(self.planner.id(picture), "", 1, picture, extras_json(extras), place)


class LatentPipe:
    """Pictures to results, on the devices of this host."""

    def __init__(self, spec: LatentSpec, encoder: Any) -> None:
        self.spec, self._encoder = spec, encoder
        self.batch_size, self.devices = encoder.batch_size, encoder.devices

    def stream(self, pictures: Iterable[Picture]) -> Iterator[Result]:
        """Each picture encoded, in order. Raises RequestError where one cannot be read any more."""
        here, there = tee(pictures)
        framed, examples = tee(image_sets.load(there, self._example))
        encoded = self._encoder.stream(example for example, _ in examples)
        for picture, (_, before), found in zip(here, framed, encoded, strict=True):
            text, pooled = self._encoder.unconditional
            own, shared = {"moments": found.moments, "text": found.text}, {"unconditional": text}
            if found.pooled is not None:
                own |= {"pooled": found.pooled}
                shared |= {"unconditional_pooled": pooled}
            yield Result(picture, Arrays(own, shared, before), () if found.finite else ("nan",))

    def _example(self, picture: Picture, data: bytes) -> Any:
        from sdjax.encode import Example

        image, size = picture.decode(data), self.spec.size
        return Example(cut(image, size, size), picture.caption), frame(image, size, size)


def load_encoder(
    model: LatentSpec, *, dtype: str, first: Any, batch_size: int | None = None, compilation_cache: str | None = None
) -> LatentPipe:
    """The pipe of a spec, with JAX imported where it is called.

    dtype, first: what every pipe of a job is told; the spec knows its dtype, and nothing is compiled before it is run.
    """
    from sdjax import compile_cache
    from sdjax.encode import Encoder

    compile_cache.use(compilation_cache)
    return LatentPipe(model, Encoder.from_pretrained(model.spec, batch_size=batch_size))


@dataclass(frozen=True)
class Latents:
    """The sink for latents and text states of one size."""

    size: int
    dtype: str

    def encode(self, result: Result, made_by: Provenance) -> Encoded:
        return Encoded(result.arrays, result.arrays.sha256, result.flags)

    def write(self, store: Store, unit: Unit, encoded: list[Encoded], made_by: Provenance, seconds: float) -> int:
        shard, arrays = shard_name(unit.name, SUFFIX), [item.data for item in encoded]
        tensors = {name: np.stack([item.own[name] for item in arrays]) for name in arrays[0].own}
        files = {shard: save(tensors | arrays[0].shared)}
        rows = [
            {
                **columns(row, item, made_by, seconds / len(encoded)),
                "key": row.request.key,
                "caption": row.request.caption,
                "image_sha256": row.request.sha256,
                "size": self.size,
                "frame": item.data.frame,
                "dtype": self.dtype,
                "shard": shard,
                "index": index,
                "bytes": item.data.bytes,
            }
            for index, (row, item) in enumerate(zip(unit.rows, encoded, strict=True))
        ]
        return sum(item.bytes for item in arrays) if commit(store, unit.name, files, rows, MANIFEST) else 0
