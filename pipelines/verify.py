"""`python -m pipelines.verify OUTPUT`: re-reads a dataset of images or latents and proves it by its manifests."""

import argparse
import hashlib
import io
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from safetensors.numpy import load

from pipelines import latents, layout, leftovers, report
from pipelines.sinks import MANIFEST
from pipelines.storage import REMEDY, Store, parallel_map
from sdjax.console import interrupted, says_why, show
from sdjax.request import field_types, id_of
from sdjax.training.encoded import SHARED, is_whole
from sdjax.values import one_line

_SHOWN = 20
_ID = "S32"  # as NumPy holds one


@dataclass
class Findings:
    """What a dataset holds, and what is wrong with it."""

    images: int = 0
    units: int = 0
    bytes: int = 0
    flagged: int = 0
    rejected: int = 0
    orphans: list[str] = field(default_factory=list)  # not data: no manifest commits them
    faults: list[str] = field(default_factory=list)


def verify(output: str) -> Findings:
    """Check every manifest against its files, hashes, sizes and ids, ids with each other, and counts with the summary.

    Reads the whole dataset once, a few units at a time, and holds the ids, of 32 bytes each. An output that a job has
    not finished is no fault in itself.
    """
    store = Store(output)
    found = Findings(orphans=leftovers.orphans(store, tolerant=True))
    manifests = layout.find(store, "manifest")
    ids = bytearray()
    for name, (rows, faults) in zip(manifests, parallel_map(partial(_unit, store), manifests, 4), strict=True):
        found.faults += [f"{name}: {fault}" for fault in faults]
        found.units += 1
        found.images += len(rows)
        found.bytes += sum(row["bytes"] for row in rows)
        found.flagged += sum(bool(row["flags"]) for row in rows)
        ids += np.array([row["id"].encode() for row in rows], _ID).tobytes()
    found.faults += [f"image {id} is in {n} manifests" for id, n in _repeated(np.frombuffer(ids, _ID))]
    found.rejected = sum(len(store.read(name).splitlines()) for name in layout.find(store, "rejected"))
    summary = store.read_json(report.SUMMARY)
    if summary and summary.get("finished"):
        found.faults += _counts(summary, found)
    return found


def _repeated(ids: np.ndarray) -> list[tuple[str, int]]:
    """Each id that is there more than once, and how often; sorts them where they lie."""
    ids.sort()
    return [(id.decode(), n + 1) for id, n in Counter(ids[1:][ids[1:] == ids[:-1]].tolist()).items()]


def _counts(summary: dict[str, Any], found: Findings) -> list[str]:
    """Where a finished job's summary counts otherwise."""
    rejected, images, done = (summary.get(name) for name in ("rejected", "images", "already_done"))
    if not (isinstance(rejected, int) and isinstance(images, int) and isinstance(done, int)):
        return ["summary.json lacks the counts of a finished job"]
    faults = []
    if rejected != found.rejected:
        faults.append(f"summary.json counts {rejected} rejected rows, rejected/ {found.rejected}")
    if images + done > found.images:
        faults.append(f"summary.json counts {images + done} images, the manifests {found.images}")
    return faults


def _unit(store: Store, name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """A manifest's rows, and what is wrong with them or the files that they name."""
    try:
        table = store.read_table(name)
    except ValueError as error:
        return [], [str(error).removeprefix(f"{name} ")]
    kind = next((kind for kind in _KINDS if _fits(table.schema, kind)), None)
    if kind is None:
        return [], ["its columns are not those of a manifest"]
    if any(table[column].null_count for column in kind.used if column != "shard"):
        return [], ["a row lacks a value"]
    rows, faults = table.select(kind.used).to_pylist(), []
    if any(row["shard"] and layout.unit_of(row["shard"]) != layout.unit_of(name) for row in rows):
        faults.append("its rows lie in the shard of another unit")
    if {*table.column_names} <= {*kind.schema.names}:  # of a later version's columns the id may tell too
        told = table.select([name for name in table.column_names if name in kind.hashed]).to_pylist()
        for row, values in zip(rows, told, strict=True):
            if kind.id(values) != row["id"]:
                faults.append(f"{row['id']} is not the id of what its row says")
    places: dict[str | None, list[dict[str, Any]]] = {}
    for row in rows:
        places.setdefault(row["shard"] or row.get("file"), []).append(row)
    for place, there in places.items():
        if place is None or not layout.is_ours(place):
            faults.append(f"{place} is no name that jobs give")
            continue
        try:
            faults += kind.check(place, store.read(place), there)
        except FileNotFoundError:
            faults.append(f"{place} is missing; {REMEDY}")
    return rows, faults


def _images(place: str, data: bytes, rows: list[dict[str, Any]]) -> list[str]:
    if rows[0]["shard"] is None:
        return [fault for row in rows for fault in _image(row, data)]
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    except Exception as error:  # damage makes it raise all sorts, as with the parsers below
        return [f"{place} is not a whole tar: {error}"]
    faults = []
    for row in rows:
        image = members.pop(row["file"], None)
        text, facts = members.pop(f"{row['id']}.txt", None), members.pop(f"{row['id']}.json", None)
        if image is None or text is None or facts is None:
            faults.append(f"{place} lacks a file of {row['id']}")
            continue
        faults += _image(row, image)
        if data[row["offset"] : row["offset"] + row["bytes"]] != image:
            faults.append(f"{place} does not hold {row['file']} at byte {row['offset']}")
        if text != row["prompt"].encode():
            faults.append(f"{place} has another prompt for {row['id']}")
        if _hash_in(facts) != row["sha256"]:
            faults.append(f"{place} has facts of another image for {row['id']}")
    return faults + [f"{place} holds {name}, which its manifest does not know" for name in members]


def _hash_in(facts: bytes) -> Any:
    try:
        return json.loads(facts)["sha256"]
    except Exception:
        return None


def _image(row: dict[str, Any], data: bytes) -> list[str]:
    if layout.unit_of(row["file"]) != row["id"]:
        return [f"{row['file']} is not the file of image {row['id']}"]
    if len(data) != row["bytes"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
        return [f"{row['file']} is not the image that the manifest describes"]
    return []


def _latents(place: str, data: bytes, rows: list[dict[str, Any]]) -> list[str]:
    try:
        tensors = load(data)
        if not is_whole(tensors):
            raise ValueError(f"it holds {', '.join(sorted(tensors))}")
        shared = {name: tensors.pop(name) for name in SHARED if name in tensors}
        examples = [dict(zip(tensors, each, strict=True)) for each in zip(*tensors.values(), strict=True)]
    except Exception as error:
        return [f"{place} is no whole shard of latents: {error}"]
    if sorted(row["index"] for row in rows) != list(range(len(examples))):
        return [f"{place} holds {len(examples)} examples, and its manifest names others"]
    faults = []
    for row in rows:
        example = latents.Arrays(examples[row["index"]], shared)
        if (example.bytes, example.sha256) != (row["bytes"], row["sha256"]):
            faults.append(f"{place} does not hold the example {row['id']} that its manifest describes")
    return faults


class _Kind(NamedTuple):
    """A kind of manifest.

    check: what is wrong with a file that rows name.
    schema: today's.
    used: columns that a manifest of any version has; none lacks a value but the shard of an image in a file of its own.
    hashed: columns that an id is a hash of.
    id: what it is by those.
    """

    check: Callable[[str, bytes, list[dict[str, Any]]], list[str]]
    schema: pa.Schema
    used: tuple[str, ...]
    hashed: Collection[str]
    id: Callable[[dict[str, Any]], str | None]


def _image_id(values: dict[str, Any]) -> str | None:
    try:
        return id_of(values.pop("model_fingerprint"), values)
    except ValueError:  # a number that no request has
        return None


_CHECKED = ("id", "shard", "bytes", "sha256", "flags")
_OF_IMAGES = {"model_fingerprint", *field_types()}
_OF_LATENTS = ("model_fingerprint", "dtype", "size", "image_sha256", "caption")
_KINDS = (
    _Kind(_images, MANIFEST, (*_CHECKED, "model_fingerprint", "prompt", "file", "offset"), _OF_IMAGES, _image_id),
    _Kind(
        _latents, latents.MANIFEST, (*_CHECKED, *_OF_LATENTS, "index"), _OF_LATENTS, lambda told: latents.id_of(**told)
    ),
)


def _fits(found: pa.Schema, kind: _Kind) -> bool:
    known = [column for column in found if column.name in kind.schema.names]
    same = all(kind.schema.field(column.name).type == column.type for column in known)
    return same and set(kind.used) <= set(found.names)


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was found; exit status 0 where nothing is wrong, 1 where something is, 2 where there is no dataset."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.verify", description="Prove a dataset.")
    parser.add_argument("output", help="the --output of a job: a folder or an fsspec URL")
    output = parser.parse_args(argv).output
    try:
        found = verify(output)
    except KeyboardInterrupt:
        return interrupted("verify")
    except Exception as error:
        if not says_why(error):
            raise
        print(f"verify: {output} cannot be read: {one_line(error)}", file=sys.stderr)
        return 2
    if not found.units and Store(output).read_json(report.SUMMARY) is None:
        print(f"verify: {output} holds no dataset: neither manifests nor {report.SUMMARY}", file=sys.stderr)
        return 2
    show(
        f"{found.images:,} images in {found.units:,} units, {found.bytes:,} bytes, {found.flagged:,} flagged;"
        f" {found.rejected:,} rows rejected; {len(found.orphans):,} leftovers, {len(found.faults):,} faults"
    )
    for kind, names in (("leftover", found.orphans), ("fault", found.faults)):
        for name in names[:_SHOWN]:
            show(f"{kind}: {name}")
        if len(names) > _SHOWN:
            show(f"{kind}: and {len(names) - _SHOWN:,} more")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
