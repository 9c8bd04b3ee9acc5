"""`python -m sdjax.plan --model sdxl --target v5e`: what would fit on a TPU that isn't here, how fast, at what cost.

The programs that `generate` would run are compiled by libtpu's compiler, which needs no TPU. What fits is what that
compiler says; times are made of its own estimates, and marked so: nothing has run.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from sdjax import architectures
from sdjax.planning.chips import CHIPS
from sdjax.planning.estimate import Plan, plan
from sdjax.planning.fit import Fit
from sdjax.planning.tpu import Compiler, PlanError
from sdjax.request import Request
from sdjax.sample import add_request_options
from sdjax.spec import BUNDLED, DTYPES, Spec

_GIB = 2**30


def parser() -> argparse.ArgumentParser:
    """The command's options; each Request field is one."""
    result = argparse.ArgumentParser(
        prog="python -m sdjax.plan", description="What would fit on a TPU that isn't here, and how fast."
    )
    names = ", ".join(architectures.ARCHITECTURES)
    result.add_argument(
        "--model",
        default="bundled",
        help=f"{names}, bundled (the default) or a checkpoint, of which no weights are read",
    )
    result.add_argument(
        "--controlnet", action="append", default=[], metavar="PATH", help="a ControlNet; may be given several times"
    )
    result.add_argument("--target", choices=sorted(CHIPS), default="v5e", help="TPU chip (default: %(default)s)")
    result.add_argument("--topology", default="2x2", help="chips of a host, such as 2x4 (default: %(default)s)")
    result.add_argument("--batch-size", type=int, help="images that a chip makes at once (default: what fits)")
    result.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    result.add_argument("--price", type=float, help="US dollars a chip-hour (default: the list price on demand)")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    add_request_options(result)
    return result


def chips_of(topology: str) -> int:
    """Chips of a topology such as 2x4. Raises PlanError."""
    sides = topology.split("x")
    if not all(side.isdecimal() and int(side) for side in sides):
        raise PlanError(f"topology {topology!r} is not chips by chips; an example is 2x4")
    return math.prod(map(int, sides))


def make(options: argparse.Namespace) -> tuple[Plan | None, Request]:
    """The plan that the options ask for, None if not one image fits, and the request that it is for.

    Raises:
        ValueError: something asked for cannot be; the message names it.
    """
    given = {name: value for name, value in vars(options).items() if name in Request.__dataclass_fields__}
    request, _ = Request.from_row({"prompt": "a photo", **given})
    with ExitStack() as stack:
        source = BUNDLED if options.model == "bundled" else options.model
        if source in architectures.ARCHITECTURES:
            source = Path(stack.enter_context(tempfile.TemporaryDirectory())) / options.model
            architectures.write(options.model, source)
        spec = Spec(source, dtype=options.dtype, controlnets=options.controlnet)
        resolved = spec.resolve(request)
        compiler = Compiler(CHIPS[options.target])
        fit = Fit(spec, resolved, compiler, lambda text: print(text, file=sys.stderr))
        return plan(fit, compiler, options.batch_size), resolved


def figures(made: Plan, *, chips: int, price: float) -> dict[str, Any]:
    """A plan as numbers. Seconds, cycles and what follows from them are the compiler's estimates."""
    rate = chips * made.images_per_second
    return {
        "batch_size": made.batch_size,
        "memory_bytes": made.memory,
        "usable_bytes": made.chip.memory,
        "estimated_seconds_per_batch": made.seconds,
        "estimated_images_per_second": rate,
        "estimated_dollars_per_1000_images": chips * price / 3600 * 1000 / rate,
        "estimated_share_of_peak": made.share_of_peak,
        "programs": {
            program.recorded.name: {
                "calls": program.recorded.calls,
                "flops": round(program.flops),
                "estimated_cycles": round(program.cost.cycles.total()),
                "estimated_cycles_capped": round(program.cost.capped.total()),
                "estimated_kernel_cycles": round(program.kernel_cycles),
                "estimated_seconds": program.seconds,
                "memory": vars(program.compiled.memory),
            }
            for program in made.programs
        },
    }


def table(found: dict[str, Any]) -> str:
    """The programs as Markdown; cycles are of one call, seconds of all calls of a batch."""
    head = "| program | calls | M cycles | capped | kernels | s | arguments GiB | results | temporaries | code |"
    lines = [head, "| --- " * 10 + "|"]
    for name, program in found["programs"].items():
        cycles = [program[f"estimated_{kind}"] / 1e6 for kind in ("cycles", "cycles_capped", "kernel_cycles")]
        memory = [program["memory"][kind] / _GIB for kind in ("arguments", "results", "temporaries", "code")]
        cells = [name, program["calls"], *(f"{value:.1f}" for value in cycles), f"{program['estimated_seconds']:.3f}"]
        lines.append("| " + " | ".join(map(str, [*cells, *(f"{value:.2f}" for value in memory)])) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the process's exit status: 1 where nothing fits, 2 where nothing can be planned."""
    options = parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # a TPU that is here is not touched
    chip = CHIPS[options.target]
    try:
        chips = chips_of(options.topology)
        planned, request = make(options)
    except (ValueError, OSError) as error:
        print(f"{parser().prog}: {error}", file=sys.stderr)
        return 2
    what = f"{options.model}, {request.width}x{request.height}, {request.num_inference_steps} steps, {options.dtype}"
    if planned is None:
        size = "one image" if options.batch_size is None else f"a batch of {options.batch_size}"
        print(f"{what}: {size} does not fit the {chip.memory / _GIB:.2f} GiB of a {chip.name}", file=sys.stderr)
        return 1
    price = chip.price if options.price is None else options.price
    found = figures(planned, chips=chips, price=price)
    print(f"{what}, on {chips} x {chip.name}; jax {jax.__version__}, libtpu {version('libtpu')}")
    print(
        f"batch a chip: {found['batch_size']}, in {found['memory_bytes'] / _GIB:.2f} of {chip.memory / _GIB:.2f} GiB\n"
    )
    print(table(found))
    print(
        f"\nEstimated, not measured: {found['estimated_images_per_second']:.3g} images/s on {chips} chips, "
        f"{planned.share_of_peak:.0%} of the bfloat16 peak, "
        f"${found['estimated_dollars_per_1000_images']:.2f} per 1,000 images at ${price:.2f} a chip-hour.\n"
        "Made of the TPU compiler's estimated cycles, capped at what bytes take where nothing is multiplied, and of\n"
        "the attention kernel's products. The host's part is not in it."
    )
    if options.json:
        asked = {"model": options.model, "target": chip.name, "chips": chips, "price": price, "dtype": options.dtype}
        size = {"width": request.width, "height": request.height, "steps": request.num_inference_steps}
        options.json.write_text(json.dumps({**asked, **size, **found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
