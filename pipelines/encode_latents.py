"""`python -m pipelines.encode_latents`: an image dataset to VAE latents and text states, on any Beam runner.

    sets -> pieces -> pictures, checked and named -> shards of the plan <- ids in the manifests
                                                          |
       files <- pictures yet to encode, sent back to the file that holds them, so that it is read from end to end
         |
       units -> encode, write, commit -> account -> summary.json

`[data] latents = "OUTPUT"` in a configuration of sdjax.train reads the result. As with generate_images, running the
same command again finishes what a killed run began, and encodes what was added.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam.ml.inference.base import RunInference

from pipelines import image_sets, latents, leftovers, units
from pipelines import job as jobs
from pipelines.handler import load_spec
from pipelines.options import EncodeOptions
from pipelines.storage import Store
from pipelines.unit_handler import UnitHandler
from sdjax.model_options import model_options


def main(
    argv: Sequence[str] | None = None,
    *,
    spec: Callable[..., Any] = load_spec,
    load: Callable[..., Any] = latents.load_encoder,
) -> int:
    """Run the job; see `pipelines.job.main`.

    `spec` and `load` make the model's promises and the encoder itself; tests put lighter ones in.
    """

    def prepare(job: EncodeOptions) -> tuple[Any, Callable[[beam.Pipeline], None]]:
        model = latents.LatentSpec(spec(job.model, dtype=job.dtype, **model_options(job)), job.size)
        sets = image_sets.find(job.images)
        leftovers.refuse_inputs(Store(job.output), map(image_sets.folder_of, sets))
        shards = units.shard_count(sum(map(image_sets.count, sets)))
        return model, partial(build, job=job, sets=sets, shards=shards, model=model, load=load)

    return jobs.main(argv, EncodeOptions, prepare)


def build(
    pipeline: beam.Pipeline, job: EncodeOptions, sets: list[str], shards: int, model: Any, load: Callable[..., Any]
) -> None:
    """Add the job's stages to a pipeline."""
    out = job.output
    read: Any = (
        pipeline
        | "Sets" >> beam.Create(sets)
        | "Cut" >> beam.FlatMap(image_sets.cut)
        | "Spread pieces" >> beam.Reshuffle()
        | "Read"
        >> beam.ParDo(units.PlanRows(image_sets.read, latents.PlanPicture(model), shards, out)).with_outputs(
            units.COUNTS, main="rows"
        )
    )
    left = jobs.join_done(pipeline, read["rows"], shards, job) | "Send back" >> beam.ParDo(
        units.Join(out, units.by_file)
    ).with_outputs(units.COUNTS, main="rows")
    planned = (
        left["rows"] | "Gather files" >> beam.GroupByKey() | "Plan" >> beam.FlatMap(units.units_of_file, job.unit_size)
    )
    handler = UnitHandler(
        out,
        latents.Latents(model.size, model.dtype),
        model,
        dtype=job.dtype,
        batch_size=job.batch_size,
        compilation_cache=job.compilation_cache,
        load=load,
    )
    made = planned | "Spread units" >> beam.Reshuffle() | "Encode" >> RunInference(handler)
    jobs.write_report(job, model, [read[units.COUNTS], left[units.COUNTS], made], contact_sheet=0)


if __name__ == "__main__":
    sys.exit(main())
