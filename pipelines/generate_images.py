"""`python -m pipelines.generate_images`: prompt files to an image dataset, on any Beam runner.

    files -> pieces -> rows, checked and named -> shards of the plan <- ids in the manifests
                                                       |
                                 units -> generate, encode, write, commit -> account -> summary.json, index.html

Only rows and counts move between workers. A run reads the manifests first and makes what they lack, so running the same
command again finishes what a killed run began; one job at a time may write to an output.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference
from apache_beam.pvalue import PCollection

from pipelines import leftovers, progress, report, sources, units
from pipelines.handler import UnitHandler, load_stable_diffusion
from pipelines.options import GenerateOptions, parse
from pipelines.sources import Source
from pipelines.storage import Store
from sdjax.model_options import model_options
from sdjax.request import Request

_MANIFESTS_A_READER = 64


def load_spec(model: str | None, **options: Any) -> Any:
    """`sdjax.spec.Spec` of a checkpoint, the bundled one where none is named."""
    from sdjax.spec import BUNDLED, Spec

    return Spec(model or BUNDLED, **options)


def main(
    argv: Sequence[str] | None = None,
    *,
    spec: Callable[..., Any] = load_spec,
    load: Callable[..., Any] = load_stable_diffusion,
) -> int:
    """Run the job; returns the process's exit status: 0 done, 2 refused before anything ran, 130 interrupted.

    `spec` and `load` make the model's promises and the model itself; tests put lighter ones in.
    """
    try:
        options = parse(list(sys.argv[1:] if argv is None else argv))
        job = options.view_as(GenerateOptions)
        files = sources.find(job.prompts, job.prompt_column)
        model = spec(job.model, dtype=job.dtype, **model_options(job))
        model.resolve(Request.from_row({"prompt": "any"}, **job.request_defaults())[0])
        store = Store(job.output)
        swept = leftovers.sweep(store, everything=job.overwrite)
    except (ValueError, OSError) as error:
        print(f"generate_images: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if swept:
        print(f"generate_images: {swept}", file=sys.stderr)
    store.write_json(report.SUMMARY, {"finished": False, "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    pipeline = beam.Pipeline(options=options)
    build(pipeline, job, files, model, load)
    try:
        with progress.ProgressLine(store):
            pipeline.run().wait_until_finish()
    except KeyboardInterrupt:
        print("generate_images: interrupted; the same command goes on from the last whole unit", file=sys.stderr)
        return 130
    summary = store.read_json(report.SUMMARY)
    if summary and summary["finished"]:
        print(report.text(summary))
    return 0


def build(
    pipeline: beam.Pipeline, job: GenerateOptions, files: list[Source], model: Any, load: Callable[..., Any]
) -> None:
    """Add the job's stages to a pipeline."""
    planned, counts = plan(pipeline, job, files, model)
    handler = UnitHandler(
        job.output,
        model,
        format=job.format,
        image_format=job.image_format,
        batch_size=job.batch_size,
        compilation_cache=job.compilation_cache,
        load=load,
    )
    made = planned | "Spread units" >> beam.Reshuffle() | "Generate" >> RunInference(handler)
    facts = report.Job(
        started=time.time(),
        model=model.name,
        fingerprint=model.fingerprint,
        options=job.get_all_options(drop_default=True, current_only=True),
        price_per_hour=job.price_per_hour,
        contact_sheet=job.contact_sheet,
    )
    _ = (
        (*counts, made)
        | "All counts" >> beam.Flatten()
        | "Sum" >> beam.CombineGlobally(report.SumAccounts())
        | "Report" >> beam.ParDo(report.WriteReport(facts, job.output))
    )


def plan(
    pipeline: beam.Pipeline, job: GenerateOptions, files: list[Source], model: Any
) -> tuple[PCollection, list[PCollection]]:
    """Add the stages from files to units; returns the units yet to make, and each stage's share of the account."""
    out = job.output
    shards = units.shard_count(sum(map(sources.count, files)))
    manifests = [name for name in Store(out).find("manifest") if name.endswith(".parquet")]
    batches = [manifests[i : i + _MANIFESTS_A_READER] for i in range(0, len(manifests), _MANIFESTS_A_READER)]
    read = (
        pipeline
        | "Files" >> beam.Create(files)
        | "Cut" >> beam.ParDo(units.CutFiles())
        | "Spread pieces" >> beam.Reshuffle()
        | "Read"
        >> beam.ParDo(units.PlanRows(model, job.request_defaults(), job.prompt_column, shards, out)).with_outputs(
            units.COUNTS, main="rows"
        )
    )
    done = (
        pipeline
        | "Manifests" >> beam.Create(batches)
        | "Spread manifests" >> beam.Reshuffle()
        | "Read ids" >> beam.ParDo(units.ReadDone(shards, out))
    )
    planned = (
        (read["rows"], done)
        | "Join" >> beam.Flatten()
        | "Gather shards" >> beam.GroupByKey()
        | "Plan" >> beam.ParDo(units.MakeUnits(job.unit_size, out)).with_outputs(units.COUNTS, main="units")
    )
    return planned["units"], [read[units.COUNTS], planned[units.COUNTS]]


if __name__ == "__main__":
    sys.exit(main())
