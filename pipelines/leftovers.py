"""What killed runs leave behind: files that no manifest commits. Found for verify, swept before a job begins."""

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import contact_sheet, progress, report
from pipelines.storage import Store

SHARDS = (".tar", ".safetensors")
_OURS = ("manifest", "shards", "images", "rejected", progress.FOLDER)
_TEMPORARY = tuple(f".{name}." for name in (report.SUMMARY, contact_sheet.NAME))


def orphans(store: Store, *, tolerant: bool = False) -> list[str]:
    """Shards and images without a manifest, and temporary files that a killed write left.

    Raises:
        ValueError: a manifest cannot be read, so that it is unknown what it commits; `tolerant` passes it over.
    """
    manifests = store.find("manifest")
    temporary = _temporary(store)
    units = {name.rsplit("/", 1)[1].removesuffix(".parquet") for name in manifests}
    shards = [name for name in store.find("shards") if name.endswith(SHARDS)]
    found = [name for name in shards if name.rsplit("/", 1)[1].rsplit(".", 1)[0] not in units]
    images = [name for name in store.find("images") if name not in temporary]
    if images:
        committed: set[str] = set()
        for name in set(manifests) - set(temporary):
            try:
                table = pq.read_table(pa.BufferReader(store.read(name)), columns=["file"])
            except pa.ArrowInvalid as error:
                if tolerant:
                    continue
                raise ValueError(f"{name} cannot be read: {error}") from None
            committed.update(table["file"].to_pylist())
        found += [name for name in images if name not in committed]
    return sorted({*found, *temporary})


def _temporary(store: Store) -> list[str]:
    """What a killed write left in the folders of jobs, and beside what else there may be in the output."""
    found = [name for folder in _OURS for name in store.find(folder) if name.rsplit("/", 1)[1].startswith(".")]
    return found + [name for name in store.find("", maxdepth=1) if name.startswith(_TEMPORARY)]


def sweep(store: Store, *, everything: bool = False) -> str:
    """Make the output ready for a job: delete what no manifest commits, the last job's rejects and its progress.

    Looks for leftovers only where the last job did not finish. With `everything`, deletes what jobs wrote and nothing
    else; manifests go first, so that a reader never meets one whose images are gone.

    Returns:
        What was deleted, in words; empty where nothing worth a word was.
    """
    if everything:
        names = [name for folder in _OURS for name in store.find(folder)]
        store.delete([name for name in names if name.startswith("manifest/")])
        store.delete([name for name in names if not name.startswith("manifest/")])
        store.delete([report.SUMMARY, contact_sheet.NAME, *_temporary(store)])
        return f"--overwrite deleted {len(names):,} files of earlier jobs" if names else ""
    last = store.read_json(report.SUMMARY)
    left = [] if last is not None and last.get("finished") else orphans(store)
    store.delete(left + store.find("rejected"))
    store.remove_folder(progress.FOLDER)
    return f"deleted {len(left):,} files that a killed run left without a manifest" if left else ""
