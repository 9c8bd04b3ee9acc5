"""`python -m sdjax.bench`: how fast images are made here, stage by stage and by batch size.

Weights are random unless a checkpoint is named: no time depends on them.
"""

import argparse
import json
import multiprocessing
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from sdjax import architectures
from sdjax.benchmark.ours import Measured, measure
from sdjax.benchmark.weights import add_random
from sdjax.console import ended, is_out_of_memory, markdown, show
from sdjax.files import check_file
from sdjax.request import Request
from sdjax.request_options import add_request_options, refuse_empty, request_fields
from sdjax.spec import Spec
from sdjax.values import DTYPES, one_line

_PROMPTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
_COMPARED = {"width", "height", "num_inference_steps", "guidance_scale"}
"""Fields that diffusers is given too."""


def parser() -> argparse.ArgumentParser:
    """The command's options; each Request field is one."""
    result = argparse.ArgumentParser(prog="python -m sdjax.bench", description="How fast images are made here.")
    names = ", ".join(architectures.ARCHITECTURES)
    result.add_argument("--model", default="bundled", help=f"{names}, bundled (the default) or a checkpoint folder")
    result.add_argument("--batch-size", default="1", help="images a device makes at once, such as 4 or 1,2,4,8")
    result.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    result.add_argument("--repeats", type=int, default=3, help="timed batches (default: %(default)s)")
    result.add_argument(
        "--compare",
        choices=("diffusers",),
        help="the same in torch, eager and compiled: images from text by the model's own sampler, on one device",
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")
    result.add_argument("--plot", type=Path, metavar="FILE", help="draw images/s by batch size there; needs matplotlib")
    add_request_options(result, leave_out=_PROMPTS)
    return result


def table(found: Sequence[Measured]) -> str:
    """The measurements as Markdown, a column a batch size; seconds of a batch, but of one call for the UNet's."""
    rows: list[tuple[str, list[str]]] = [
        ("load s, first / again", [f"{m.load[0]:.1f} / {m.load[1]:.1f}" for m in found]),
        (
            "compile s, cold / warm",
            [f"{sum(m.compile_cold.values()):.1f} / {sum(m.compile_warm.values()):.1f}" for m in found],
        ),
        *((f"{stage} s", [f"{m.stages[stage]:.4f}" for m in found]) for stage in found[0].stages),
        ("one UNet call s", [f"{m.unet_call:.4f}" for m in found]),
        ("images/s", [f"{m.images_per_second:.4g}" for m in found]),
        ("TFLOP an image", [f"{m.flops_per_image / 1e12:.4g}" for m in found]),
        ("TFLOP/s", [f"{m.flops_per_image * m.images_per_second / 1e12:.4g}" for m in found]),
        (f"share of {found[0].peak_is}", [f"{m.share_of_peak:.0%}" for m in found]),
        (f"{found[0].bytes_are} GiB", [f"{m.peak_bytes / 2**30:.2f}" for m in found]),
    ]
    return markdown(["", *(f"batch {m.batch_size}" for m in found)], [[name, *cells] for name, cells in rows])


def _say(what: str) -> None:
    """What is measured now, which may take minutes."""
    print(f"measuring {what}", file=sys.stderr)


def _alone(measuring: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What it finds in a process of its own: after other work the memory of a process, or its peak, tells little."""
    # Ctrl-C, which a terminal sends to both, ends it at once and without a word: the command has one.
    quietly = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), **quietly) as process:
        return process.submit(measuring, *args, **options).result()


def compare(source: str, request: Request, sizes: Sequence[int], **options: Any) -> dict[str, list[dict]]:
    """diffusers' figures by batch size and way of running it; where a way fails, that is said, and it ends there."""
    from sdjax.benchmark import torch_side

    theirs: dict[str, list[dict]] = {}
    for way in ("eager", "compiled"):
        for size in sizes:
            _say(f"diffusers, {way}, batch {size}")
            given = {"batch_size": size, "compiled": way == "compiled", **options}
            try:
                measured = _alone(torch_side.measure, source, request, **given)
            except Exception as error:  # torch.compile fails in many ways, for want of a C++ compiler among others
                print(f"diffusers, {way}, batch {size}: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
                break
            theirs.setdefault(way, []).append({**measured, "batch_size": size})
    return theirs


def ratios(found: Sequence[Measured], theirs: dict[str, list[dict]]) -> str:
    """Our time and memory over diffusers', as Markdown; under 1 is faster, and smaller."""
    names = ("batch s", "UNet call s", "decode s", "UNet GiB", "decode GiB")
    head = ["diffusers", "batch", *(cell for name in names for cell in (name, "ratio"))]
    ours = {m.batch_size: m for m in found}
    pairs = [(way, ours.get(their["batch_size"]), their) for way, measured in theirs.items() for their in measured]
    return markdown(head, [[way, str(m.batch_size), *_beside(m, their)] for way, m, their in pairs if m])


def _beside(m: Measured, their: dict[str, Any]) -> Iterator[str]:
    """diffusers' figures of a batch size, each before what ours is of it."""
    # diffusers runs on one device, and calls the network once for both halves of guidance.
    seconds = {
        "batch": m.batch_size * m.devices / m.images_per_second,
        "UNet": m.stages["advance"] / their["calls"],
        "decode": m.stages["decode"],
    }
    for name, ours in seconds.items():
        yield from (f"{their[name]:.4f}", f"{ours / their[name]:.2f}")
    for ours, name in ((m.program_bytes["advance"], "UNet"), (m.program_bytes["decode"], "decode")):
        held = their.get(f"{name} bytes")
        yield from (f"{held / 2**30:.2f}", f"{ours / held:.2f}") if held else ("", "")


def plot(found: Sequence[Measured], file: Path, title: str) -> None:
    """Images/s by batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([m.batch_size for m in found], [m.images_per_second for m in found], marker="o")
    axes.set(xlabel="images a device makes at once", ylabel="images/s", title=title, ylim=(0, None))
    figure.savefig(file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the process's exit status."""
    options = parser().parse_args(argv)
    return ended(parser().prog, lambda: _run(options))


def _sizes(text: str) -> list[int]:
    """The batch sizes of --batch-size."""
    sizes = [int(size) if size.strip().isdecimal() else 0 for size in text.split(",")]
    if min(sizes) < 1:
        raise ValueError(f"--batch-size={text} is not understood; give numbers such as 4 or 1,2,4,8")
    return sizes


def _check(options: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Raise ValueError for what would be found wrong after minutes of measuring."""
    refuse_empty(options)
    if options.repeats < 1:
        raise ValueError(f"--repeats={options.repeats} measures nothing; allowed is 1 or more")
    for option in ("json", "plot"):
        if file := getattr(options, option):
            check_file(f"--{option}", file)
    if other := options.compare and sorted(given.keys() - _COMPARED):
        raise ValueError(f"--compare diffusers does not go with {', '.join(other)}, which diffusers would not be given")
    needed = (["torch", "diffusers"] if options.compare else []) + (["matplotlib"] if options.plot else [])
    for module in needed:
        if find_spec(module) is None:
            raise ValueError(f"{'--plot' if module == 'matplotlib' else '--compare'} needs {module}; pip install it")
    if options.plot:
        from matplotlib.figure import Figure

        known = Figure().canvas.get_supported_filetypes()
        if options.plot.suffix and options.plot.suffix[1:].lower() not in known:
            raise ValueError(f"--plot: {options.plot} ends as no picture; known are {', '.join(sorted(known))}")


def _run(options: argparse.Namespace) -> int:
    sizes = _sizes(options.batch_size)
    given = request_fields(options)
    _check(options, given)
    request, _ = Request.from_row({"prompt": "a photo of a red circle", **given})
    with architectures.checkpoint(options.model) as source, tempfile.TemporaryDirectory() as temporary:
        if options.model in architectures.ARCHITECTURES:
            add_random(Path(source), options.dtype)
        spec = Spec(source, dtype=options.dtype)
        request = spec.resolve(request)
        same = {"dtype": options.dtype, "repeats": options.repeats}
        theirs = compare(source, request, sizes, **same) if options.compare else {}
        found = []
        for size in sizes:
            _say(f"sdjax, batch {size}")
            try:
                cache = Path(temporary) / str(size)
                found.append(_alone(measure, source, request, batch_size=size, cache=cache, **same))
            except Exception as error:
                # The system ends a process, where a device would raise.
                if not (is_out_of_memory(error) or isinstance(error, BrokenProcessPool)):
                    raise
                print(f"sdjax, batch {size}: too little memory, or the process was ended", file=sys.stderr)
    if not found:
        return 1
    devices = jax.local_devices()
    what = f"{spec.name}, {request.width}x{request.height}, {request.num_inference_steps} steps, {options.dtype}"
    show(f"{what}, on {len(devices)} x {devices[0].device_kind}; jax {jax.__version__}\n\n{table(found)}")
    if theirs:
        show(f"\n{ratios(found, theirs)}")
    if options.json:
        measured = [asdict(m) | {"share_of_peak": m.share_of_peak} for m in found]
        facts = {
            "model": spec.name,
            "dtype": options.dtype,
            "device": devices[0].device_kind,
            "devices": len(devices),
        }
        size = {"width": request.width, "height": request.height, "steps": request.num_inference_steps}
        options.json.write_text(json.dumps({**facts, **size, "sdjax": measured, "diffusers": theirs}, indent=2))
    if options.plot:
        plot(found, options.plot, what)
    return 0


if __name__ == "__main__":
    sys.exit(main())
