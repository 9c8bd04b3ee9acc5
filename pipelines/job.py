"""What every job does around its pipeline: sweeps the output, starts the stages, follows them, tells how it ended."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import GoogleCloudOptions, StandardOptions
from apache_beam.runners.runner import PipelineState

from pipelines import layout, leftovers, progress, report, units
from pipelines.options import IN_PROCESS, JobOptions, Options, parse
from pipelines.storage import Store
from sdjax.console import say, says_why, show
from sdjax.values import one_line


def main(
    argv: Sequence[str] | None,
    kind: type[Options],
    prepare: Callable[[Options], tuple[Any, Callable[[beam.Pipeline], Any]]],
) -> int:
    """Run the job of a command line; returns the process's exit status.

    0 done, 1 failed or every row rejected, 2 refused before anything ran, 130 interrupted.

    `prepare` checks a job's inputs, and gives its model's promises and what adds its stages to a pipeline.
    """
    with ExitStack() as stack:
        try:
            job = parse(list(sys.argv[1:] if argv is None else argv), kind)
            store = Store(job.output)
            model, build = prepare(job)
            pipeline = beam.Pipeline(options=job.beam)
            stack.enter_context(store.held())
            _refuse_second(store)
            there = [] if job.overwrite else _there(job, model, store)
            build(pipeline)  # before anything is deleted, which what is refused here would cost for nothing
            swept = leftovers.sweep(store, everything=job.overwrite)
            begun = {"finished": False, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
            store.write_json(report.SUMMARY, begun)
        except Exception as error:
            if not says_why(error):
                raise
            say(kind.command, error)
            return 2
        except KeyboardInterrupt:
            say(kind.command, "interrupted before anything was made")
            return 130
        for said in (swept, *there):
            if said:
                say(job.command, said)
        return _run(job, pipeline, store)


def _run(job: JobOptions, pipeline: beam.Pipeline, store: Store) -> int:
    result = None
    try:
        with progress.ProgressLine(store), _interruptible(), _unlogged():
            result = pipeline.run()
            result.wait_until_finish()
    except KeyboardInterrupt:
        say(job.command, _interrupted(job, result))
        return 130
    except Exception as error:
        origin = error.__context__ if getattr(error, "_tagged_with_step", False) else None  # Beam's is of its own kind
        # Of a plain ValueError, which may be a fault of ours, one line would say too little.
        if isinstance(origin, Exception) and says_why(origin) and type(origin) is not ValueError:
            say(job.command, origin)
            return 1
        if result is None or _has_ended(result):
            raise
        say(job.command, f"{one_line(error)}; {_interrupted(job, result)}")
        return 1
    finally:
        if job.beam.view_as(StandardOptions).runner == IN_PROCESS:  # it has ended, and may begin again at once
            with suppress(Exception):
                progress.clear(store)
    summary = store.read_json(report.SUMMARY)
    if summary and summary["finished"]:
        show(report.text(summary))
        return int(summary["rejected"] > 0 == summary["images"] + summary["already_done"])
    return 0


def _has_ended(result: Any) -> bool:
    """Whether a job has; one that cannot be asked is not known to have."""
    try:
        return PipelineState.is_terminal(result.state)
    except Exception:
        return False


def _refuse_second(store: Store) -> None:
    """Raise ValueError where another job seems to write to a bucket, which nobody can hold as a folder on a disk is."""
    last = {} if store.is_local else store.read_json(report.SUMMARY) or {}
    if last.get("finished") is False and progress.is_alive(store):
        raise ValueError(f"another job wrote to {store.url} within the last minute; wait for its end, or a minute")


def _there(job: JobOptions, model: Any, store: Store) -> list[str]:
    """In what form and size what is there was written, and by which model, where this job's are others; it stays so.

    Raises:
        ValueError: it is another job's, or cannot be read.
    """
    manifests = layout.find(store, "manifest")
    if not manifests:
        return []
    there = store.read_table(manifests[0], ["file", "shard", "model", "model_fingerprint", "dtype", "size"])
    images = "format" in job.defaults()
    if images != ("file" in there.column_names):
        kinds = ("latents", "images") if images else ("images", "latents")
        raise ValueError(f"{store.url} holds {kinds[0]}, and this job makes {kinds[1]}; choose another --output")
    if not there.num_rows:
        return []
    row = there.slice(0, 1).to_pylist()[0]
    said = []
    # The dtype is a part of a model's fingerprint where images are made, and a column beside it where latents are.
    if row.get("model_fingerprint", model.fingerprint) != model.fingerprint or row.get("dtype", job.dtype) != job.dtype:
        made = f"made by another model or dtype ({row.get('model')}), and stays"
        said.append(f"what is there was {made}; its rows are made anew beside it; --overwrite deletes it")
    if not images and row.get("size", model.size) != model.size:
        stays = "stays, and training takes one size alone; --overwrite deletes it"
        said.append(f"what is there was made with --size {row['size']}; it {stays}")
    if images:
        was = {"format": "tar" if row["shard"] else "files", "image_format": row["file"].rpartition(".")[2]}
        other = [f"--{name.replace('_', '-')} {form}" for name, form in was.items() if form != getattr(job, name)]
        said += [f"what is there stays as it is, {' '.join(other)}; --overwrite makes it anew"] if other else []
    return said


class _Interrupt(KeyboardInterrupt):
    """Ctrl-C, marked so that Beam passes it on from a DoFn; another it logs at length, and wraps."""

    _tagged_with_step = True


@contextmanager
def _interruptible() -> Iterator[None]:
    """Makes Ctrl-C a KeyboardInterrupt wherever in the pipeline it is heard."""
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    heard = False

    def interrupt(*_: object) -> None:
        nonlocal heard
        heard = True
        raise _Interrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception:
        if heard:  # what was interrupted may have made another error of it
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, usual)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Has Beam log no error of a stage that runs here, with a traceback: it also raises it."""
    beams = logging.getLogger("apache_beam.runners.common")
    level = beams.level
    beams.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        beams.setLevel(level)


def _interrupted(job: JobOptions, result: Any) -> str:
    """How the job stands after Ctrl-C: at its end where it ran here, else on its way."""
    cloud = job.beam.view_as(GoogleCloudOptions)
    if "Dataflow" in str(job.beam.view_as(StandardOptions).runner):
        if result is None:
            return f"interrupted while the job was sent; whether it runs says: {listing(cloud.project, cloud.region)}"
        job_id = result.job_id()
        return f"no longer followed; {job_id} runs on; to stop it: {cancelling(job_id, cloud.project, cloud.region)}"
    if result is not None:
        return "no longer followed; the job may run on where it was sent"
    return "interrupted; the same command goes on from the last whole unit"


def cancelling(job_id: str, project: str | None, region: str | None) -> str:
    """The command that stops a Dataflow job."""
    return f"gcloud dataflow jobs cancel {job_id} --project={project} --region={region}"


def listing(project: str | None, region: str | None) -> str:
    """The command that lists the Dataflow jobs that run."""
    return f"gcloud dataflow jobs list --status=active --project={project} --region={region}"


def join_done(pipeline: beam.Pipeline, rows: Any, shards: int, job: JobOptions) -> Any:
    """Rows by shard of the plan, beside the ids that the output's manifests commit; --overwrite leaves none.

    A worker lists them: the names of many would not fit into the description of a job.
    """
    done = (
        pipeline
        | "Output" >> beam.Create([job.output])
        | "Manifests" >> beam.FlatMap(units.manifest_batches)
        | "Spread manifests" >> beam.Reshuffle()
        | "Read ids" >> beam.FlatMap(units.read_done, shards, job.output)
    )
    return (rows, done) | "Join" >> beam.Flatten() | "Gather shards" >> beam.GroupByKey()


def write_report(job: JobOptions, model: Any, counts: Iterable[Any], *, contact_sheet: int) -> None:
    """Add the stages from each stage's share of the account to summary.json, and to index.html of so many images."""
    last = Store(job.output).read_json(report.SUMMARY) or {}
    facts = report.Job(
        started=time.time(),
        model=model.name,
        fingerprint=model.fingerprint,
        options=job.given(),
        price_per_hour=job.price_per_hour,
        contact_sheet=contact_sheet,
        stale=not last.get("finished") or last.get("contact_sheet") != contact_sheet,
    )
    _ = (
        tuple(counts)
        | "All counts" >> beam.Flatten()
        | "Sum" >> beam.CombineGlobally(report.add_up)
        | "Report" >> beam.Map(report.write, facts, job.output)
    )
