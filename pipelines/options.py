"""The command line of generate_images: its own options beside every Beam option, and the checks that need no model."""

import argparse
from typing import Any, NoReturn

from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

from pipelines import sinks
from sdjax.images import FORMATS
from sdjax.model_options import add_model_options
from sdjax.request import field_types

# In this process, with nothing to fetch. Beam's own DirectRunner first tries to download the Prism runner.
IN_PROCESS = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
_DTYPES = ("float32", "bfloat16", "float16")


class OptionError(ValueError):
    """Options that no job can run on; one line that names the option."""


class GenerateOptions(PipelineOptions):
    """Options of the job, and each Request field as the value for rows that leave it open."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        job = parser.add_argument_group("job")
        job.add_argument(
            "--prompts",
            nargs="+",
            action="extend",
            metavar="FILES",
            help=".txt, .csv, .tsv, .jsonl, .parquet or .toml; globs and fsspec URLs",
        )
        job.add_argument("--output", metavar="DIR", help="a folder or an fsspec URL")
        add_model_options(job)
        job.add_argument("--dtype", default="float32", help=f"{', '.join(_DTYPES)}; default: %(default)s")
        job.add_argument("--batch-size", type=int, help="images that one device makes at once; default: the model's")
        job.add_argument("--prompt-column", help="the column that holds the prompts; default: prompt")
        job.add_argument("--unit-size", type=int, default=256, help="images a shard; default: %(default)s")
        job.add_argument("--format", default="tar", help=f"{' or '.join(sinks.FORMATS)}; default: %(default)s")
        job.add_argument("--image-format", default="png", help=f"{', '.join(FORMATS)}; default: %(default)s")
        job.add_argument("--overwrite", action="store_true", help="delete what the output holds of earlier jobs first")
        job.add_argument("--price-per-hour", type=float, default=0.0, help="of all workers together, for the summary")
        job.add_argument("--contact-sheet", type=int, default=2000, help="images in index.html; default: %(default)s")
        job.add_argument("--compilation-cache", metavar="DIR", help="where workers share compiled programs")
        request = parser.add_argument_group("request", "values for rows that leave them open")
        for name in field_types():
            if name != "prompt":
                request.add_argument(f"--{name.replace('_', '-')}")

    def request_defaults(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in field_types() if name != "prompt"}
        return {name: value for name, value in values.items() if value is not None}

    def check(self) -> None:
        """Refuse what needs no look at files or a model to refuse.

        Raises:
            OptionError: naming the option and what is allowed.
        """
        for name in ("prompts", "output"):
            if not getattr(self, name):
                raise OptionError(f"--{name} is missing")
        allowed = {"dtype": _DTYPES, "format": sinks.FORMATS, "image_format": tuple(FORMATS)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                option = name.replace("_", "-")
                raise OptionError(f"--{option}={getattr(self, name)!r} is unknown; allowed are {', '.join(values)}")
        for name, low in {"unit_size": 1, "batch_size": 1, "contact_sheet": 0}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise OptionError(f"--{name.replace('_', '-')}={value} is out of range; allowed is {low} or more")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(message)


def parse(argv: list[str]) -> PipelineOptions:
    """The command line as Beam options, on the in-process runner where none is named.

    Raises:
        OptionError: a value that cannot be read, or an option that neither the job nor Beam knows.
    """
    parser = _Parser(
        prog="python -m pipelines.generate_images",
        description="Prompt files to an image dataset.",
        epilog="Every option of Apache Beam and its runners can be given too, in Beam's spelling.",
        allow_abbrev=False,
    )
    GenerateOptions._add_argparse_args(parser)
    _, others = parser.parse_known_args(argv)
    beam = _Parser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for kind in PipelineOptions.__subclasses__():
        kind._add_argparse_args(beam)  # type: ignore[attr-defined]
    _, unknown = beam.parse_known_args(others)
    if unknown:
        raise OptionError(f"{unknown[0]} is no option of this job or of Beam; --help lists them")
    options = PipelineOptions(argv)
    standard = options.view_as(StandardOptions)
    if standard.runner in (None, "DirectRunner"):
        standard.runner = IN_PROCESS
    options.view_as(GenerateOptions).check()
    return options
