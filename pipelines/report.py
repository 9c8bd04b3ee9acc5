"""What a job leaves to read: the account of its rows in summary.json, and index.html to look at its images."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from pipelines import contact_sheet, layout, progress
from pipelines.storage import Store

SUMMARY = "summary.json"

_EARLIEST, _LATEST = "first", "last"


class AccountError(AssertionError):
    """Rows were lost or counted twice: a fault in this program, never in its input."""


def add_up(shares: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Shares of the account to their sum: numbers added, mappings joined, `first` the earliest, `last` the latest."""
    total: dict[str, Any] = {}
    for share in shares:
        for name, value in share.items():
            old = total.get(name)
            if isinstance(value, dict):
                total[name] = add_up([old or {}, value])
            elif old is None:
                total[name] = value
            else:
                join = {_EARLIEST: min, _LATEST: max}.get(name, lambda a, b: a + b)
                total[name] = join(old, value)
    return total


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


def write(account: dict[str, Any], job: Job, out: str) -> dict[str, Any]:
    """The account of the whole job -> the summary, which is also in summary.json, beside index.html."""
    store, limit = Store(out), job.contact_sheet
    summary = summarize(job, account, time.time())
    if limit and (summary["images"] or job.stale or not store.exists(contact_sheet.NAME)):
        contact_sheet.write(store, limit)
    progress.clear(store)
    summary["manifests"] = len(layout.find(store, "manifest"))  # fewer than these say that some are gone
    store.write_json(SUMMARY, summary)
    return summary


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
