"""`python -m sdjax.sample PROMPT...`: images on this machine, with a progress bar, PNG metadata and a contact sheet."""

import argparse
import dataclasses
import gc
import itertools
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from sdjax import images
from sdjax.console import is_out_of_memory, say, says_why, show
from sdjax.files import folder_here, write_whole
from sdjax.model_options import add_model_options, model_options
from sdjax.request import Request, field_types
from sdjax.request_options import add_request_options, refuse_empty, request_fields
from sdjax.values import DTYPES, RequestError

if TYPE_CHECKING:
    from sdjax.generate import StableDiffusion

INTERRUPTED = 130  # the exit status, as shells have it
_SHEET = 400  # images on a contact sheet, which is held whole


def parser() -> argparse.ArgumentParser:
    """The command's options; each Request field is one, by its name with dashes."""
    result = argparse.ArgumentParser(prog="python -m sdjax.sample", description="Make images from prompts.")
    result.add_argument("prompts", nargs="*", metavar="PROMPT", help="the text of a picture")
    add_model_options(result)
    result.add_argument("--describe", action="store_true", help="say what the model is, and make nothing")
    result.add_argument("--output", default="out", metavar="DIR", help="default: %(default)s")
    result.add_argument("--num-images", type=int, default=1, help="images a prompt, on seeds that count up from --seed")
    result.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=VALUE,VALUE",
        help="an image for each value of a request's field, as strength=0.4,0.6,0.8; for all combinations of several",
    )
    result.add_argument("--format", choices=sorted(images.FORMATS), default="png", help="default: %(default)s")
    result.add_argument("--quality", type=int, default=images.QUALITY, help="of jpg and webp; default: %(default)s")
    result.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    result.add_argument(
        "--batch-size",
        type=_batch_size,
        metavar="N",
        help="images that a device makes at once; `auto` compiles for more and more until its memory is full; "
        "default: 1 on a CPU, 4 elsewhere",
    )
    result.add_argument("--verbose", action="store_true", help="say what runs where, and what it takes")
    add_request_options(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the process's exit status."""
    options = parser().parse_args(argv)
    given = request_fields(options)
    try:
        refuse_empty(options, leave_out=("prompts",))
        if options.describe:
            return _describe(options)
        options.output = folder_here(options.output)
        if not options.prompts:
            raise RequestError("no PROMPT is given; --help lists the options")
        if options.num_images < 1:
            raise RequestError(f"--num-images={options.num_images} makes nothing; allowed is 1 or more")
        if options.batch_size == 0:
            raise RequestError("--batch-size=0 makes nothing; allowed is 1 or more, and auto")
        if not 1 <= options.quality <= 100:
            raise RequestError(f"--quality={options.quality} is out of range; allowed is 1 to 100")
        pairs = list(map(_sweep, options.sweep))
        sweeps = options.sweep = dict(pairs)
        if len(sweeps) < len(pairs):
            raise RequestError("--sweep names a field twice; give all its values in one")
        requests = []
        for prompt, *values in itertools.product(options.prompts, *sweeps.values()):
            first = Request(**{"prompt": prompt, **given, **dict(zip(sweeps, values, strict=True))})
            dataclasses.replace(first, seed=first.seed + options.num_images - 1)  # refused before all are listed
            requests += [dataclasses.replace(first, seed=first.seed + i) for i in range(options.num_images)]
        return _make(requests, options)
    except KeyboardInterrupt:
        print("interrupted; the files that are there are whole", file=sys.stderr, flush=True)
        return INTERRUPTED
    except Exception as error:
        if is_out_of_memory(error):
            less = "a smaller --batch-size, --width or --height, or --vae-tiling, take less"
            say(parser().prog, f"the devices have too little memory; {less}")
            return 1
        if not says_why(error):
            raise
        say(parser().prog, error)
        return 2


def _batch_size(text: str) -> int | str:
    """The value of --batch-size."""
    if text == "auto" or text.isdecimal():
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto")


def _sweep(text: str) -> tuple[str, list[str]]:
    """The field and the values of a --sweep."""
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in field_types() or not values:
        raise RequestError(f"--sweep {text} is not understood; give a request's field and values: strength=0.4,0.6,0.8")
    return name, values.split(",")


def _describe(options: argparse.Namespace) -> int:
    from sdjax.describe import describe
    from sdjax.parts import BUNDLED
    from sdjax.spec import Spec

    show(describe(Spec(options.model or BUNDLED, dtype=options.dtype, **model_options(options))))
    return 0


def _make(requests: Sequence[Request], options: argparse.Namespace) -> int:
    started = time.perf_counter()
    with _without_collection():
        pipe, resolved = _load(requests, options)
    if options.verbose:
        print(_facts(pipe, time.perf_counter() - started), file=sys.stderr)
    thumbnails: dict[Request, Any] = dict.fromkeys(resolved[:_SHEET])
    with _Bars(len(resolved)) as bars:
        for result in pipe.stream(sorted(resolved, key=pipe.spec.rank), progress=bars.steps):
            text = images.parameters(result.request, pipe.spec.name)
            path = options.output / f"{result.id}.{options.format}"
            write_whole(path, images.encode(result.pixels, options.format, text=text, quality=options.quality))
            if result.request in thumbnails:
                thumbnails[result.request] = images.fitted(result.image)
            bars.image()
            if result.flags:
                bars.say(f"{path}: {', '.join(result.flags)}")
    captions = _captions(list(thumbnails), ("seed", *options.sweep))
    sheet = images.contact_sheet(list(thumbnails.values()), captions)
    write_whole(options.output / "sheet.png", images.encode(np.asarray(sheet)))
    seconds = time.perf_counter() - started
    sheet_of = f" of the first {_SHEET}" if len(resolved) > _SHEET else ""
    print(f"{len(resolved)} images in {options.output}, with sheet.png{sheet_of}, in {seconds:.1f} s", file=sys.stderr)
    if options.verbose:
        print(_memory(pipe.devices.devices), file=sys.stderr)
    return 0


def _captions(requests: Sequence[Request], fields: Sequence[str]) -> list[str]:
    """What each picture of a sheet is: those of the fields that differ between them, and the prompt."""
    differ = [name for name in dict.fromkeys(fields) if len({getattr(each, name) for each in requests}) > 1]
    said = [", ".join(f"{name} {getattr(each, name)}" for name in differ) for each in requests]
    return [f"{text}: {each.prompt}" if text else each.prompt for text, each in zip(said, requests, strict=True)]


def _load(requests: Sequence[Request], options: argparse.Namespace) -> tuple["StableDiffusion", list[Request]]:
    """The model, and the requests with every field filled in, each once; the folder to write to is there after it."""
    from sdjax import compile_cache
    from sdjax.generate import StableDiffusion
    from sdjax.parts import BUNDLED
    from sdjax.spec import Spec

    compile_cache.use()
    spec = Spec(options.model or BUNDLED, dtype=options.dtype, **model_options(options))
    # Every request is checked against the checkpoint before its weights are read.
    resolved = list(dict.fromkeys(spec.resolve(request) for request in requests))
    batch_size = options.batch_size
    if batch_size == "auto":
        from sdjax.planning.fit import largest_here

        batch_size = largest_here(spec, resolved, lambda text: print(text, file=sys.stderr))
    options.output.mkdir(parents=True, exist_ok=True)
    if not os.access(options.output, os.W_OK):
        raise PermissionError(f"--output={options.output} may not be written to")
    return StableDiffusion.from_pretrained(spec, batch_size=batch_size, first=min(resolved, key=spec.rank)), resolved


@contextmanager
def _without_collection() -> Iterator[None]:
    """Make objects that stay, such as modules, without a search for garbage among them, which takes a second."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class _Bars:
    """A bar of images and, above it, one of the sampler steps of the batch in hand."""

    def __init__(self, count: int) -> None:
        self._steps = tqdm(desc="steps", unit="step", leave=False, position=1)
        self._images = tqdm(total=count, desc="images", unit="image", position=0)

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.close()
        self._images.close()

    def steps(self, done: int, total: int) -> None:
        self._steps.total, self._steps.n = total, done
        self._steps.refresh()

    def image(self) -> None:
        self._images.update()

    def say(self, text: str) -> None:
        self._images.write(text, file=sys.stderr)


def _facts(pipe: "StableDiffusion", seconds: float) -> str:
    """What was loaded, and onto what."""
    devices = pipe.devices.devices
    return (
        f"{pipe.spec.name} ({pipe.spec.dtype}, {pipe.parameters:,} parameters), loaded in {seconds:.1f} s on "
        f"{len(devices)} x {devices[0].device_kind}, each making {pipe.batch_size} images at once"
    )


def _memory(devices: Sequence[Any]) -> str:
    """The most memory that each device, or this process, has held."""
    stats = [device.memory_stats() for device in devices]
    if not all(stats):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return f"peak memory of the process: {peak / 2**30:.2f} GiB"
    return "peak memory of the devices: " + ", ".join(f"{stat['peak_bytes_in_use'] / 2**30:.2f} GiB" for stat in stats)


if __name__ == "__main__":
    status = main()
    if status:
        # Python's orderly end waits for all that is being compiled, and takes away the arrays that devices are still at
        # work on, which can crash it.
        os._exit(status)
    sys.exit(status)
