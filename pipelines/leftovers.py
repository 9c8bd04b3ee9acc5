"""What killed runs leave behind: files that no manifest commits. Found for verify, swept before a job begins."""

import os
from collections.abc import Iterable
from functools import partial
from typing import Any

import fsspec
from fsspec.utils import get_protocol

from pipelines import contact_sheet, layout, progress, report
from pipelines.storage import Store, parallel_map


def orphans(store: Store, *, tolerant: bool = False) -> list[str]:
    """Shards and images without a manifest, and temporary files that a killed write left.

    Files that are named otherwise than jobs name theirs are none of either.

    Raises:
        ValueError: a manifest cannot be read, so that it is unknown what it commits; `tolerant` passes it over.
    """
    # Manifests last: what another worker commits between two listings is not taken for left over.
    names = {folder: store.find(folder) for folder in sorted(layout.RESULTS, key=lambda folder: folder == "manifest")}
    ours = {folder: list(filter(layout.is_ours, found)) for folder, found in names.items()}
    units = {layout.unit_of(name) for name in ours["manifest"]}
    shards = [name for name in ours["shards"] if layout.unit_of(name) not in units]
    images = set(ours["images"])
    if images:
        for committed in parallel_map(partial(_files, store, tolerant), ours["manifest"]):
            images.difference_update(committed)
    return sorted([*shards, *images, *_temporary(store, [name for found in names.values() for name in found])])


def _files(store: Store, tolerant: bool, manifest: str) -> list[str]:
    """The files of images that a manifest commits; one of latents commits none."""
    try:
        table = store.read_table(manifest, ["file"])
    except ValueError:
        if tolerant:
            return []
        raise
    return table["file"].to_pylist() if table.num_columns else []


def _temporary(store: Store, names: Iterable[str]) -> list[str]:
    """What a killed write left among these names, and beside the folders."""
    whole = {name: layout.whole_of(name) for name in [*names, *store.find("", maxdepth=1)]}
    beside = (report.SUMMARY, contact_sheet.NAME)
    return [name for name, made in whole.items() if made and (layout.is_ours(made) or made in beside)]


def sweep(store: Store, *, everything: bool = False) -> str:
    """Make the output ready for a job: delete what no manifest commits, the last job's rejects and its progress.

    Looks for leftovers only where a job has begun, and among images in files of their own only where it has not
    finished, or somebody has deleted manifests since, as `pipelines.verify` may advise. With `everything`, deletes what
    jobs wrote and nothing else; manifests go first, so that a reader never meets one whose images are gone. What jobs
    wrote is known by its name: other files in the same folders stay.

    Returns:
        What was deleted, in words; empty where nothing worth a word was.
    """
    if everything:
        found = [name for folder in layout.RESULTS for name in store.find(folder)]
        names = list(filter(layout.is_ours, found))
        manifests = [name for name in names if name.startswith("manifest/")]
        others = [name for name in names if not name.startswith("manifest/")]
        if names:  # killed amid this, the next run must not take the last job's word that nothing is left
            store.write_json(report.SUMMARY, {"finished": False})
        store.delete(manifests)
        store.delete([*others, *_temporary(store, found), report.SUMMARY, contact_sheet.NAME])
        progress.clear(store)
        return f"--overwrite deleted {len(names):,} files of earlier jobs" if names else ""
    last = store.read_json(report.SUMMARY)
    left = [] if last is None else _left(store, last)
    if left:  # a worker of the last job that still runs may have committed some while manifests were read
        units = {layout.unit_of(name) for name in layout.find(store, "manifest")}
        left = [name for name in left if not (name.startswith("shards/") and layout.unit_of(name) in units)]
    store.delete(left + layout.find(store, "rejected"))
    progress.clear(store)
    return f"deleted {len(left):,} files that no manifest commits" if left else ""


def _left(store: Store, last: dict[str, Any]) -> list[str]:
    """What may be left over of jobs, of which the last wrote this summary."""
    if last.get("finished") and last.get("manifests") == len(layout.find(store, "manifest")):
        return layout.find(store, "shards")
    return orphans(store)


def refuse_inputs(store: Store, files: Iterable[str]) -> None:
    """Refuse a job whose input lies where it sweeps, or is a folder that holds images of earlier jobs.

    Raises:
        ValueError: naming the file and the folder.
    """
    protocols = (store.fs.protocol,) if isinstance(store.fs.protocol, str) else store.fs.protocol
    swept = {folder: _real(store, store.path(folder)) for folder in layout.FOLDERS}
    for file in files:
        if get_protocol(file) not in protocols:  # others may ask a server as soon as they are named
            continue
        try:
            fs, path = fsspec.core.url_to_fs(file)
            path = _real(store, path)
        except Exception:  # what a row names may be no path; nothing can be read of it
            continue
        if fs != store.fs:
            continue
        inside = [folder for folder, root in swept.items() if f"{path}/".startswith(f"{root}/")]
        around = swept["images"].startswith(f"{path}/")
        if inside or (around and layout.find(store, "images")):
            where = f"{store.url.rstrip('/')}/{inside[0] if inside else 'images'}"
            lies = "lies in" if inside else "holds"
            raise ValueError(f"{file} {lies} {where}, where jobs delete what others left; choose another --output")


def _real(store: Store, path: str) -> str:
    return os.path.realpath(path) if store.is_local else path.rstrip("/")
