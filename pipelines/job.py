"""What every job does around its pipeline: sweeps the output, starts the stages, follows them, tells how it ended."""

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import apache_beam as beam

from pipelines import layout, leftovers, progress, report, units
from pipelines.options import JobOptions
from pipelines.storage import Store

_MANIFESTS_A_READER = 64


def refuse(command: str, error: Exception) -> int:
    """Say in one line why a job does not start; returns its exit status."""
    print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def run(job: JobOptions, build: Callable[[beam.Pipeline], Any]) -> int:
    """Run a job whose options are checked and whose inputs are there; returns its exit status: 0, 2 or 130."""
    store = Store(job.output)
    with ExitStack() as stack:
        try:
            stack.enter_context(store.held())
            swept = leftovers.sweep(store, everything=job.overwrite)
        except (ValueError, OSError) as error:
            return refuse(job.command, error)
        return _run(job, build, store, swept)


def _run(job: JobOptions, build: Callable[[beam.Pipeline], Any], store: Store, swept: str) -> int:
    if swept:
        print(f"{job.command}: {swept}", file=sys.stderr)
    store.write_json(report.SUMMARY, {"finished": False, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    pipeline = beam.Pipeline(options=job.beam)
    build(pipeline)
    try:
        with progress.ProgressLine(store):
            pipeline.run().wait_until_finish()
    except KeyboardInterrupt:
        print(f"{job.command}: interrupted; the same command goes on from the last whole unit", file=sys.stderr)
        return 130
    summary = store.read_json(report.SUMMARY)
    if summary and summary["finished"]:
        print(report.text(summary))
    return 0


def join_done(pipeline: beam.Pipeline, rows: Any, shards: int, out: str) -> Any:
    """Rows by shard of the plan, beside the ids that the output's manifests commit."""
    manifests = layout.find(Store(out), "manifest")
    batches = [manifests[i : i + _MANIFESTS_A_READER] for i in range(0, len(manifests), _MANIFESTS_A_READER)]
    done = (
        pipeline
        | "Manifests" >> beam.Create(batches)
        | "Spread manifests" >> beam.Reshuffle()
        | "Read ids" >> beam.ParDo(units.ReadDone(shards, out))
    )
    return (rows, done) | "Join" >> beam.Flatten() | "Gather shards" >> beam.GroupByKey()


def write_report(job: JobOptions, model: Any, counts: Iterable[Any], *, contact_sheet: int | None) -> None:
    """Add the stages from each stage's share of the account to summary.json, and to index.html of so many images."""
    facts = report.Job(
        started=time.time(),
        model=model.name,
        fingerprint=model.fingerprint,
        options=job.given(),
        price_per_hour=job.price_per_hour,
        contact_sheet=contact_sheet,
    )
    _ = (
        tuple(counts)
        | "All counts" >> beam.Flatten()
        | "Sum" >> beam.CombineGlobally(report.SumAccounts())
        | "Report" >> beam.ParDo(report.WriteReport(facts, job.output))
    )
