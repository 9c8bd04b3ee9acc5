"""A unit's images to a WebDataset tar or to files, then its manifest: the Parquet file whose presence commits them.

`Sink` is what a job writes with; `Images` is the one for pictures, `pipelines.latents` has one for latents.
"""

import functools
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.layout import image_name, manifest_name, shard_name
from pipelines.storage import Store, parallel_map
from pipelines.units import Row, Unit
from sdjax.images import encode, parameters
from sdjax.request import Request, field_types

FORMATS = ("tar", "files")

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
MANIFEST = pa.schema(
    [pa.field("id", pa.string())]
    + [pa.field(name, _ARROW[kind]) for name, kind in field_types().items()]
    + [
        pa.field("file", pa.string()),  # the tar's member, or the path in the output
        pa.field("shard", pa.string()),  # the tar's path in the output; null with --format files
        pa.field("offset", pa.int64()),  # of the image's bytes in the shard or file
        pa.field("bytes", pa.int64()),
        pa.field("sha256", pa.string()),
        pa.field("flags", pa.list_(pa.string())),
        pa.field("seconds", pa.float64()),  # the unit's time on the device, shared out evenly
        pa.field("model", pa.string()),
        pa.field("model_fingerprint", pa.string()),
        pa.field("versions", pa.string()),
        pa.field("device", pa.string()),
        pa.field("extras", pa.string()),  # the input's other columns, as a JSON object
        pa.field("input_file", pa.string()),
        pa.field("input_row", pa.int64()),
    ]
)


class Picture(Protocol):
    """What a unit is made of: `sdjax.generate.Result`."""

    request: Request
    pixels: np.ndarray
    flags: tuple[str, ...]


class Encoded(NamedTuple):
    """A result as it is stored, and what the manifest says of it."""

    data: Any  # an image file's bytes
    sha256: str
    flags: tuple[str, ...]


class Provenance(NamedTuple):
    """What made the images of a unit."""

    model: str
    fingerprint: str
    device: str


class Sink(Protocol):
    """How a job stores its results."""

    def encode(self, result: Any, made_by: Provenance) -> Encoded:
        """A result as it is stored; called by many threads."""
        ...

    def write(self, store: Store, unit: Unit, encoded: list[Encoded], made_by: Provenance, seconds: float) -> int:
        """Write a unit's results whole, then the manifest that commits them; the bytes of results written.

        Where another worker has committed the unit meanwhile, its results stand, these are dropped, with those of their
        files that its manifest does not name, and it returns 0.
        """
        ...


@functools.cache
def versions() -> str:
    """The packages that decide about pixels and files, with their versions."""
    found = []
    for name in ("sdjax", "jax", "jaxlib", "numpy", "pillow"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def columns(row: Row, stored: Encoded, made_by: Provenance, seconds: float) -> dict[str, Any]:
    """What every manifest says of a result."""
    return {
        "id": row.id,
        "model": made_by.model,
        "model_fingerprint": made_by.fingerprint,
        "versions": versions(),
        "device": made_by.device,
        "sha256": stored.sha256,
        "flags": list(stored.flags),
        "seconds": seconds,
        "extras": row.extras,
        "input_file": row.place.file,
        "input_row": row.place.row,
    }


def committed(store: Store, unit: Unit) -> dict[str, int] | None:
    """The unit's share of the account, by its manifest; None where there is none.

    What that lacks of the unit's rows is rejected: fewer than none where it holds rows that were counted as such.
    """
    try:
        table = store.read_table(manifest_name(unit.name), ["bytes", "flags"])
    except FileNotFoundError:
        return None
    return {
        "images": table.num_rows,
        "units": 1,
        "rejected": len(unit.rows) - table.num_rows,
        "bytes": sum(table["bytes"].to_pylist()),
        "flagged": sum(map(bool, table["flags"].to_pylist())),
    }


def places(store: Store, unit: Unit) -> set[tuple[str, int]]:
    """Where in the input the rows lie that a unit's manifest commits."""
    table = store.read_table(manifest_name(unit.name), ["input_file", "input_row"])
    return set(zip(table["input_file"].to_pylist(), table["input_row"].to_pylist(), strict=True))


def make_tar(unit: Unit, images: list[Encoded], image_format: str, fingerprint: str) -> tuple[bytes, list[int]]:
    """The unit as a WebDataset tar, and where each image's bytes begin in it; equal images give equal bytes."""
    buffer = io.BytesIO()
    offsets = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, image in zip(unit.rows, images, strict=True):
            told = {"id": row.id, **vars(row.request), "model_fingerprint": fingerprint, **image._asdict()}
            offsets.append(tar.offset + tarfile.BLOCKSIZE)
            _add(tar, f"{row.id}.{image_format}", image.data)
            _add(tar, f"{row.id}.txt", row.request.prompt.encode())
            _add(tar, f"{row.id}.json", json.dumps(facts({**told, "extras": row.extras}), ensure_ascii=False).encode())
    return buffer.getvalue(), offsets


def facts(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a tar's .json says of an image, from its row of the manifest."""
    # Empty text for null, so that readers which infer types from the first samples find one type.
    fields = {name: "" if row.get(name) is None else row[name] for name in ("id", *field_types())}
    made = {name: row[name] for name in ("model_fingerprint", "sha256")}
    return {**fields, **made, "flags": ",".join(row["flags"]), "extras": row["extras"]}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # owner 0, time 0: nothing of this machine or moment
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@dataclass(frozen=True)
class Images:
    """The sink for pictures.

    Args:
        format: `tar`, a WebDataset shard a unit, or `files`.
        image_format: of `sdjax.images.FORMATS`.
    """

    format: str
    image_format: str

    def encode(self, result: Picture, made_by: Provenance) -> Encoded:
        data = encode(result.pixels, self.image_format, text=parameters(result.request, made_by.model))
        return Encoded(data, hashlib.sha256(data).hexdigest(), tuple(result.flags))

    def write(self, store: Store, unit: Unit, encoded: list[Encoded], made_by: Provenance, seconds: float) -> int:
        if self.format == "tar":
            data, offsets = make_tar(unit, encoded, self.image_format, made_by.fingerprint)
            names, shard = [f"{row.id}.{self.image_format}" for row in unit.rows], shard_name(unit.name)
            files = {shard: data}
        else:
            offsets, shard = [0] * len(encoded), None
            names = [image_name(row.id, self.image_format) for row in unit.rows]
            files = {name: image.data for name, image in zip(names, encoded, strict=True)}
        rows = [
            {
                **columns(row, image, made_by, seconds / len(encoded)),
                **vars(row.request),
                "file": file,
                "shard": shard,
                "offset": offset,
                "bytes": len(image.data),
            }
            for row, image, file, offset in zip(unit.rows, encoded, names, offsets, strict=True)
        ]
        done = commit(store, unit.name, files, rows, MANIFEST)
        return sum(len(image.data) for image in encoded) if done else 0


def commit(store: Store, unit: str, files: dict[str, bytes], rows: list[dict[str, Any]], schema: pa.Schema) -> bool:
    """Put a unit's files, then the manifest of these rows; False where another worker has committed the unit meanwhile.

    What was replaced of that worker's is put back then. A kill before that, or a write of both at one moment, leaves a
    manifest that its shard does not match, which `pipelines.verify` finds: it takes two workers at one unit whose bytes
    differ. What was put new and that worker's manifest does not name is deleted: images of rows that it rejected, which
    no later job makes before this one has ended.
    """
    replaced: dict[str, bytes] = {}
    new: list[str] = []

    def place(name: str) -> bool:
        """Put a file that no manifest speaks of yet, and keep what it replaced; False where the unit is committed."""
        try:
            store.write(name, files[name], create=True)
            new.append(name)
            return True
        except FileExistsError:
            if store.exists(manifest_name(unit)):
                return False
            old = store.read(name)
            if old != files[name]:  # a killed run's, or another worker's that has this unit too
                replaced[name] = old
                store.write(name, files[name])
            return True

    placed = list(parallel_map(place, files))
    if all(placed) and _write_manifest(store, unit, rows, schema):
        return True
    ours, theirs = map(_held, (rows, store.read_table(manifest_name(unit)).to_pylist()))
    for name, data in replaced.items():  # not what is theirs too, nor what they have replaced since
        if ours[name] != theirs.get(name) and store.read(name) == files[name]:
            store.write(name, data)
    store.delete([name for name in new if name not in theirs])
    return False


def _held(rows: list[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """What each file holds by these rows of a manifest: ids and hashes."""
    held: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        held.setdefault(row["shard"] or row["file"], []).append((row["id"], row["sha256"]))
    return held


def _write_manifest(store: Store, unit: str, rows: list[dict[str, Any]], schema: pa.Schema) -> bool:
    """False where there is another."""
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema), buffer, compression="zstd")
    data = buffer.getvalue().to_pybytes()
    try:
        store.write(manifest_name(unit), data, create=True)
    except FileExistsError:
        return store.read(manifest_name(unit)) == data  # the first answer to this very write was lost
    return True
