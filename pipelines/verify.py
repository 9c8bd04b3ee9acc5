"""`python -m pipelines.verify OUTPUT`: re-reads a dataset of images or latents and proves it by its manifests."""

import argparse
import hashlib
import io
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError
from safetensors.numpy import load

from pipelines import latents, layout, leftovers, report
from pipelines.sinks import MANIFEST
from pipelines.storage import Store
from pipelines.units import unit_name

_SHOWN = 20


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
    """Check every manifest against its files, hashes and sizes, ids against each other, and counts against the summary.

    Reads the whole dataset once, a few units at a time. An output that a job has not finished is no fault in itself.
    """
    store = Store(output)
    found = Findings(orphans=leftovers.orphans(store, tolerant=True))
    orphans = set(found.orphans)
    manifests = [name for name in store.find("manifest") if name not in orphans]
    ids: Counter[str] = Counter()
    with ThreadPoolExecutor(4) as pool:
        for name, (rows, faults) in zip(manifests, pool.map(lambda n: _unit(store, n), manifests), strict=True):
            found.faults += [f"{name}: {fault}" for fault in faults]
            found.units += 1
            found.images += len(rows)
            found.bytes += sum(row["bytes"] for row in rows)
            found.flagged += sum(bool(row["flags"]) for row in rows)
            ids.update(row["id"] for row in rows)
    found.faults += [f"image {id} is in {n} manifests" for id, n in ids.items() if n > 1]
    found.rejected = sum(len(store.read(name).splitlines()) for name in layout.find(store, "rejected"))
    summary = store.read_json(report.SUMMARY)
    if summary and summary.get("finished"):
        if summary["rejected"] != found.rejected:
            found.faults.append(f"summary.json counts {summary['rejected']} rejected rows, rejected/ {found.rejected}")
        if summary["images"] + summary["already_done"] > found.images:
            made = summary["images"] + summary["already_done"]
            found.faults.append(f"summary.json counts {made} images, the manifests {found.images}")
    return found


def _unit(store: Store, name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """A manifest's rows, and what is wrong with them or the files that they name."""
    try:
        table = pq.read_table(pa.BufferReader(store.read(name)))
    except pa.ArrowInvalid as error:
        return [], [f"not a manifest: {error}"]
    check = next((check for check, schema, used in _KINDS if _fits(table.schema, schema, used)), None)
    if check is None:
        return [], ["its columns are not those of a manifest"]
    rows, faults = table.to_pylist(), []
    if unit_name(row["id"] for row in rows) != name.rsplit("/", 1)[1].removesuffix(".parquet"):
        faults.append("its ids are not those that named it")
    shards = {row["shard"] for row in rows}
    for shard in shards - {None}:
        faults += check(store, shard, [row for row in rows if row["shard"] == shard])
    for row in rows:
        if row["shard"] is None:
            try:
                faults += _image(row, store.read(row["file"]))
            except FileNotFoundError:
                faults.append(f"{row['file']} is missing")
    return rows, faults


def _shard(store: Store, shard: str, rows: list[dict[str, Any]]) -> list[str]:
    try:
        data = store.read(shard)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    except FileNotFoundError:
        return [f"{shard} is missing"]
    except tarfile.TarError as error:
        return [f"{shard} is not a whole tar: {error}"]
    faults = []
    for row in rows:
        image = members.pop(row["file"], None)
        text, facts = members.pop(f"{row['id']}.txt", None), members.pop(f"{row['id']}.json", None)
        if image is None or text is None or facts is None:
            faults.append(f"{shard} lacks a file of {row['id']}")
            continue
        faults += _image(row, image)
        if data[row["offset"] : row["offset"] + row["bytes"]] != image:
            faults.append(f"{shard} does not hold {row['file']} at byte {row['offset']}")
        if text.decode() != row["prompt"]:
            faults.append(f"{shard} has another prompt for {row['id']}")
        if json.loads(facts)["sha256"] != row["sha256"]:
            faults.append(f"{shard} has facts of another image for {row['id']}")
    return faults + [f"{shard} holds {name}, which its manifest does not know" for name in members]


def _latents(store: Store, shard: str, rows: list[dict[str, Any]]) -> list[str]:
    try:
        tensors = load(store.read(shard))
        examples = list(zip(tensors["moments"], tensors["text"], strict=True))
    except FileNotFoundError:
        return [f"{shard} is missing"]
    except (SafetensorError, KeyError, ValueError) as error:
        return [f"{shard} is no whole shard of latents: {error}"]
    if sorted(row["index"] for row in rows) != list(range(len(examples))):
        return [f"{shard} holds {len(examples)} examples, and its manifest names others"]
    faults = []
    for row in rows:
        moments, text = examples[row["index"]]
        example = latents.Arrays(moments, text, tensors["unconditional"])
        if (example.bytes, example.sha256) != (row["bytes"], row["sha256"]):
            faults.append(f"{shard} does not hold the example {row['id']} that its manifest describes")
    return faults


_CHECKED = ("id", "shard", "bytes", "sha256", "flags")
_KINDS = (
    (_shard, MANIFEST, (*_CHECKED, "prompt", "file", "offset")),
    (_latents, latents.MANIFEST, (*_CHECKED, "caption", "index")),
)
"""How shards are checked, the manifests' schema today, and which of its columns a manifest of any version has."""


def _fits(found: pa.Schema, schema: pa.Schema, used: tuple[str, ...]) -> bool:
    known = [column for column in found if column.name in schema.names]
    return set(used) <= set(found.names) and all(schema.field(column.name).type == column.type for column in known)


def _image(row: dict[str, Any], data: bytes) -> list[str]:
    if len(data) != row["bytes"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
        return [f"{row['file']} is not the image that the manifest describes"]
    return []


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was found; exit status 0 where nothing is wrong, 1 where something is, 2 where there is no dataset."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.verify", description="Prove a dataset.")
    parser.add_argument("output", help="the --output of a job: a folder or an fsspec URL")
    output = parser.parse_args(argv).output
    found = verify(output)
    if not found.units and Store(output).read_json(report.SUMMARY) is None:
        print(f"verify: {output} holds no dataset: neither manifests nor {report.SUMMARY}", file=sys.stderr)
        return 2
    print(
        f"{found.images:,} images in {found.units:,} units, {found.bytes:,} bytes, {found.flagged:,} flagged;"
        f" {found.rejected:,} rows rejected; {len(found.orphans):,} leftovers, {len(found.faults):,} faults"
    )
    for kind, names in (("leftover", found.orphans), ("fault", found.faults)):
        for name in names[:_SHOWN]:
            print(f"{kind}: {name}")
        if len(names) > _SHOWN:
            print(f"{kind}: and {len(names) - _SHOWN:,} more")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
