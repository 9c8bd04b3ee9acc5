"""`python -m pipelines.generate_images`: prompt files to an image dataset, on any Beam runner.

    files -> pieces -> rows, checked and named -> shards of the plan <- ids in the manifests
                                                       |
                                 units -> generate, encode, write, commit -> account -> summary.json, index.html

Only rows and counts move between workers. A run reads the manifests first and makes what they lack, so running the same
command again finishes what a killed run began; one job at a time may write to an output.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference
from PIL import Image

from pipelines import job as jobs
from pipelines import layout, leftovers, sources, units
from pipelines.handler import load_spec, load_stable_diffusion
from pipelines.options import GenerateOptions
from pipelines.sinks import Images
from pipelines.sources import Source
from pipelines.storage import Store
from pipelines.unit_handler import UnitHandler
from sdjax.model_options import model_options
from sdjax.request import Request
from sdjax.values import RequestError


def main(
    argv: Sequence[str] | None = None,
    *,
    spec: Callable[..., Any] = load_spec,
    load: Callable[..., Any] = load_stable_diffusion,
) -> int:
    """Run the job; see `pipelines.job.main`.

    `spec` and `load` make the model's promises and the model itself; tests put lighter ones in.
    """

    def prepare(job: GenerateOptions) -> tuple[Any, Callable[[beam.Pipeline], None]]:
        files = sources.find(job.prompts, job.prompt_column, job.request_defaults().get("seed", 0))
        store = Store(job.output)
        leftovers.refuse_inputs(store, [source.file for source in files])
        if job.overwrite and layout.find(store, "images"):
            leftovers.refuse_inputs(store, sources.pictures_in(job.request_defaults()))
            leftovers.refuse_inputs(store, chain.from_iterable(map(sources.pictures, files)))
        model = spec(job.model, dtype=job.dtype, **model_options(job))
        _check_defaults(model, job.request_defaults())
        return model, partial(build, job=job, files=files, model=model, load=load)

    return jobs.main(argv, GenerateOptions, prepare)


def _check_defaults(model: Any, defaults: dict[str, str]) -> None:
    """Raise RequestError where no row could be made with what rows take that leave it open, or the model's own error.

    Rows may bring what the defaults or the checkpoint need: pictures, and a negative prompt.
    """
    white = Image.new("RGB", (64, 64), "white")
    brought: list[dict[str, Any]] = [{}, {"image": white, "negative_prompt": "any"}]
    brought.append({**brought[1], "mask_image": white})
    errors = []
    for row in brought:
        try:
            model.program(model.resolve(Request.from_row({"prompt": "any"}, **{**row, **defaults})[0]))
            return
        except RequestError as error:
            errors.append(error)
    raise errors[0]


def build(
    pipeline: beam.Pipeline, job: GenerateOptions, files: list[Source], model: Any, load: Callable[..., Any]
) -> None:
    """Add the job's stages to a pipeline."""
    planned, counts = plan(pipeline, job, files, model)
    handler = UnitHandler(
        job.output,
        Images(job.format, job.image_format),
        model,
        batch_size=job.batch_size,
        compilation_cache=job.compilation_cache,
        load=load,
    )
    made = planned | "Spread units" >> beam.Reshuffle() | "Generate" >> RunInference(handler)
    jobs.write_report(job, model, [*counts, made], contact_sheet=job.contact_sheet)


def plan(pipeline: beam.Pipeline, job: GenerateOptions, files: list[Source], model: Any) -> tuple[Any, list[Any]]:
    """Add the stages from files to units; returns the units yet to make, and each stage's share of the account."""
    shards = units.shard_count(sum(map(sources.count, files)))
    request = units.PlanRequest(model, job.request_defaults(), job.prompt_column)
    read: Any = (
        pipeline
        | "Files" >> beam.Create(files)
        | "Cut" >> beam.FlatMap(sources.cut)
        | "Spread pieces" >> beam.Reshuffle()
        | "Read"
        >> beam.ParDo(units.PlanRows(sources.read, request, shards, job.output, request.fetches)).with_outputs(
            units.COUNTS, main="rows"
        )
    )
    planned = jobs.join_done(pipeline, read["rows"], shards, job) | "Plan" >> beam.ParDo(
        units.Join(job.output, partial(units.packed_units, size=job.unit_size))
    ).with_outputs(units.COUNTS, main="units")
    return planned["units"], [read[units.COUNTS], planned[units.COUNTS]]


if __name__ == "__main__":
    sys.exit(main())
