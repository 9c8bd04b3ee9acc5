"""What a job leaves to read: the account of its rows in summary.json, and index.html to look at its images."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import apache_beam as beam

from pipelines import contact_sheet, layout, progress
from pipelines.storage import Store

SUMMARY = "summary.json"

_EARLIEST, _LATEST = "first", "last"


class AccountError(AssertionError):
    """Rows were lost or counted twice: a fault in this program, never in its input."""


class SumAccounts(beam.CombineFn):
    """Shares of the account to their sum: numbers added, mappings joined, `first` the earliest, `last` the latest."""

    def create_accumulator(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}

    def add_input(self, mutable_accumulator: dict[str, Any], element: dict[str, Any], *args: Any, **kwargs: Any):
        for name, value in element.items():
            old = mutable_accumulator.get(name)
            if isinstance(value, dict):
                mutable_accumulator[name] = self.add_input(old or {}, value)
            elif old is None:
                mutable_accumulator[name] = value
            else:
                join = {_EARLIEST: min, _LATEST: max}.get(name, lambda a, b: a + b)
                mutable_accumulator[name] = join(old, value)
        return mutable_accumulator

    def merge_accumulators(self, accumulators: Iterable[dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for accumulator in accumulators:
            merged = self.add_input(merged, accumulator)
        return merged

    def extract_output(self, accumulator: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return accumulator


class Job(NamedTuple):
    """What the summary says of a job besides its account."""

    started: float
    model: str
    fingerprint: str
    options: dict[str, Any]
    price_per_hour: float
    contact_sheet: int  # images on it; 0 for none
    stale: bool = False  # whether the page that is there may lack what a killed job made, or was made of another number


def summarize(job: Job, account: dict[str, Any], now: float) -> dict[str, Any]:
    """The summary of a finished job.

    Raises:
        AccountError: rows != images + rejected + duplicates + already done.
    """
    rows, images = account.get("rows", 0), account.get("images", 0)
    rejected, duplicates = account.get("rejected", 0), account.get("duplicates", 0)
    done = account.get("already_done", 0)
    if rows != images + rejected + duplicates + done:
        raise AccountError(
            f"{rows} rows are not {images} images + {rejected} rejected + {duplicates} duplicates + {done} already done"
        )
    making = account.get(_LATEST, 0.0) - account.get(_EARLIEST, 0.0)
    wall = now - job.started
    padded = account.get("padded_calls", 0)
    return {
        "finished": True,
        "rows": rows,
        "images": images,
        "rejected": rejected,
        "duplicates": duplicates,
        "already_done": done,
        "flagged": account.get("flagged", 0),
        "units": account.get("units", 0),
        "bytes": account.get("bytes", 0),
        "images_per_second": round(images / making, 4) if making else None,
        # Of the network rows that were run, those that stood in for no image or for a shorter one.
        "padding": round(1 - account["calls"] / padded, 6) if padded else 0.0,
        "seconds": {"wall": round(wall, 3), **{k: round(v, 3) for k, v in account.get("seconds", {}).items()}},
        "cost_per_1000_images": round(job.price_per_hour * wall / 3600 / images * 1000, 4) if images else None,
        "price_per_hour": job.price_per_hour,
        "contact_sheet": job.contact_sheet,
        "model": job.model,
        "model_fingerprint": job.fingerprint,
        "options": job.options,
        "started": _stamp(job.started),
        "ended": _stamp(now),
    }


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class WriteReport(beam.DoFn):
    """The account of the whole job -> the summary, which is also in summary.json, beside index.html."""

    def __init__(self, job: Job, out: str):
        self._job, self._store = job, Store(out)

    def process(self, element: dict[str, Any]) -> Iterator[dict[str, Any]]:
        summary = summarize(self._job, element, time.time())
        limit = self._job.contact_sheet
        if limit and (summary["images"] or self._job.stale or not self._store.exists(contact_sheet.NAME)):
            contact_sheet.write(self._store, limit)
        progress.clear(self._store)
        summary["manifests"] = len(layout.find(self._store, "manifest"))  # fewer than these say that some are gone
        self._store.write_json(SUMMARY, summary)
        yield summary


def text(summary: dict[str, Any]) -> str:
    """The summary as the line that ends a job."""
    line = (
        f"{summary['rows']:,} rows = {summary['images']:,} images + {summary['rejected']:,} rejected"
        f" + {summary['duplicates']:,} duplicates + {summary['already_done']:,} already done"
    )
    if summary["images_per_second"]:
        line += f"; {summary['images_per_second']:.2f} images/s, {100 * summary['padding']:.1f}% padding"
    if summary["rejected"]:
        line += "; the reasons are in rejected/"
    return line if summary["images"] else line + "; nothing to make"
