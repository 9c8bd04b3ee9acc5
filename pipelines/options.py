"""The command lines of the jobs: their own options beside every Beam option, and the checks that need no model."""

import argparse
import math
from typing import Any, ClassVar, NoReturn, TypeVar

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from pipelines import sinks
from sdjax.images import FORMATS
from sdjax.model_options import add_model_options
from sdjax.request_options import add_request_options, refuse_empty, request_fields
from sdjax.values import DTYPES, is_web

# In this process, with nothing to fetch. Beam's own DirectRunner first tries to download the Prism runner.
IN_PROCESS = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"


class OptionError(ValueError):
    """Options that no job can run on; one line that names the option."""


class JobOptions(argparse.Namespace):
    """What the jobs' options share. A Request's field that is not given is no attribute.

    They are not Beam's, which writes the options that it knows into the description of the job, for all to read who may
    see it.

    Attributes:
        beam: the options that are Beam's.
    """

    command = ""
    description = ""
    needed: tuple[str, ...] = ("output",)
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"dtype": DTYPES}
    least: ClassVar[dict[str, int]] = {"unit_size": 1, "batch_size": 1, "price_per_hour": 0}

    beam: PipelineOptions
    output: str
    model: str | None
    dtype: str
    batch_size: int | None
    unit_size: int
    overwrite: bool
    price_per_hour: float
    compilation_cache: str | None

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Add the job's own options to a parser."""
        raise NotImplementedError

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The job's own options, with the values that they have where they are not given."""
        parser = argparse.ArgumentParser(add_help=False)
        cls.add_to(parser)
        return vars(parser.parse_args([]))

    def given(self) -> dict[str, Any]:
        """The job's own options that are not at their default."""
        defaults = self.defaults()
        return {name: value for name, value in vars(self).items() if name != "beam" and value != defaults.get(name)}

    def check(self) -> None:
        """Refuse what needs no look at files or a model to refuse.

        Raises:
            OptionError: naming the option and what is allowed.
        """
        for name in self.needed:
            if getattr(self, name) is None:
                raise OptionError(f"--{name} is missing")
        try:
            refuse_empty(self)
        except ValueError as error:
            raise OptionError(str(error)) from None
        if is_web(self.output):
            raise OptionError(f"--output={self.output} is on a web server; give a folder or a bucket")
        for name, values in self.choices.items():
            if getattr(self, name) not in values:
                option = name.replace("_", "-")
                raise OptionError(f"--{option}={getattr(self, name)!r} is unknown; allowed are {', '.join(values)}")
        for name, low in self.least.items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise OptionError(f"--{name.replace('_', '-')}={value} is out of range; allowed is {low} or more")


Options = TypeVar("Options", bound=JobOptions)


def _add_shared(parser: argparse.ArgumentParser) -> Any:
    """Add what every job takes; returns the group for its own options."""
    job = parser.add_argument_group("job")
    job.add_argument("--output", metavar="DIR", help="a folder or an fsspec URL")
    add_model_options(job)
    job.add_argument("--dtype", default="float32", help=f"{', '.join(DTYPES)}; default: %(default)s")
    job.add_argument("--batch-size", type=int, help="images that one device takes at once; default: the model's")
    job.add_argument("--unit-size", type=int, default=256, help="images a shard; default: %(default)s")
    job.add_argument("--overwrite", action="store_true", help="delete what the output holds of earlier jobs first")
    job.add_argument("--price-per-hour", type=float, default=0.0, help="of all workers together, for the summary")
    job.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="folder or bucket where workers share compiled programs; default: each one's cache folder",
    )
    return job


class GenerateOptions(JobOptions):
    """Options of generate_images, and each Request field as the value for rows that leave it open."""

    command, description = "generate_images", "Prompt files to an image dataset."
    needed = ("prompts", "output")
    choices: ClassVar = {**JobOptions.choices, "format": sinks.FORMATS, "image_format": tuple(FORMATS)}
    least: ClassVar = {**JobOptions.least, "contact_sheet": 0}

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        job = _add_shared(parser)
        job.add_argument(
            "--prompts",
            nargs="+",
            action="extend",
            metavar="FILES",
            help=".txt, .csv, .tsv, .jsonl, .parquet or .toml; globs and fsspec URLs",
        )
        job.add_argument("--prompt-column", help="the column that holds the prompts; default: prompt")
        job.add_argument("--format", default="tar", help=f"{' or '.join(sinks.FORMATS)}; default: %(default)s")
        job.add_argument("--image-format", default="png", help=f"{', '.join(FORMATS)}; default: %(default)s")
        job.add_argument(
            "--contact-sheet", type=int, default=2000, help="images in index.html, 0 for no page; default: %(default)s"
        )
        add_request_options(parser, "values for rows that leave them open")

    def request_defaults(self) -> dict[str, Any]:
        return request_fields(self)


class EncodeOptions(JobOptions):
    """Options of encode_latents."""

    command, description = "encode_latents", "An image dataset to VAE latents and text embeddings, to train on."
    needed = ("images", "output")
    least: ClassVar = {**JobOptions.least, "size": 8}
    refused: ClassVar = {
        ("lora", "textual_inversion"): "would change the text encoder that training then starts from; leave it out",
        ("vae",): "would give latents of another VAE than the one that training keeps; leave it out",
        ("variant",): "may read other weights than training does; name a folder of that variant alone",
        ("controlnet", "refiner"): "has no part in encoding; leave it out",
    }

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        job = _add_shared(parser)
        job.add_argument(
            "--images",
            nargs="+",
            action="extend",
            metavar="FILES",
            help="WebDataset .tar files, .parquet files that hold images' bytes, or folders; globs and fsspec URLs",
        )
        job.add_argument("--size", type=int, help="images are cut and scaled to size x size; default: the model's")

    def check(self) -> None:
        super().check()
        for names, why in self.refused.items():
            for name in names:
                if getattr(self, name):
                    raise OptionError(f"--{name.replace('_', '-')} {why}")
        if self.model:
            from sdjax.weights.single_file import is_single_file

            if is_single_file(self.model):
                raise OptionError(
                    f"--model={self.model} is a single file, and training starts from a folder: "
                    "StableDiffusion.from_single_file(FILE).save_pretrained(FOLDER) writes it as one"
                )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(message)


def parse(argv: list[str], kind: type[Options] = GenerateOptions) -> Options:
    """The command line as a job's options and Beam's, on the in-process runner where none is named.

    Raises:
        OptionError: a value that cannot be read, or an option that neither the job nor Beam knows, unless a template's
            launcher has the job described (`--template_location`).
    """
    parser = _Parser(
        prog=f"python -m pipelines.{kind.command}",
        description=kind.description,
        epilog="Every option of Apache Beam and its runners can be given too, in Beam's spelling.",
        allow_abbrev=False,
    )
    kind.add_to(parser)
    job, others = parser.parse_known_args(argv, namespace=kind())
    beam = _Parser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for options in PipelineOptions.__subclasses__():
        options._add_argparse_args(beam)  # type: ignore[attr-defined]
    known, unknown = beam.parse_known_args(others)
    # Of Dataflow's launcher of templates nobody says what it passes; Beam passes over what it does not know.
    if unknown and not known.template_location:
        raise OptionError(f"{unknown[0]} is no option of this job or of Beam; --help lists them")
    job.beam = PipelineOptions(others)
    standard = job.beam.view_as(StandardOptions)
    if standard.runner in (None, "DirectRunner"):
        standard.runner = IN_PROCESS
    job.check()
    return job
