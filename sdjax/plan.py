"""`python -m sdjax.plan --model sdxl --target v5e`: what would fit on a device that isn't here, how fast, at what cost.

The programs that `generate` would run are compiled by the device's compiler, which needs no device. What fits is what
that compiler says; times are made of its own estimates, and marked so: nothing has run. For GPUs it has none.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from sdjax import architectures
from sdjax.console import ended, markdown, show
from sdjax.files import check_file
from sdjax.model_options import add_model_options, model_options
from sdjax.planning import gpu, tpu
from sdjax.planning.asked import asked
from sdjax.planning.chips import CHIPS, Chip
from sdjax.planning.compiled import PlanError
from sdjax.planning.estimate import Plan
from sdjax.planning.fit import Fit, Fitted
from sdjax.planning.gpu import GPUS, Gpu
from sdjax.request import Request
from sdjax.request_options import add_request_options, refuse_empty, request_fields
from sdjax.spec import Spec
from sdjax.values import DTYPES

_GIB = 2**30
_ABOUT_TPUS = """\
Made of the TPU compiler's estimated cycles, capped at what bytes take where nothing is multiplied, and of
the attention kernel's products. The host's part is not in it."""
_ABOUT_GPUS = """\
Memory as XLA's compiler for GPUs allots it, without what cuDNN's convolutions ask for when they are tuned on a GPU,
of the three quarters that JAX takes. That compiler does not say how long a program takes."""


def parser() -> argparse.ArgumentParser:
    """The command's options; each Request field is one."""
    result = argparse.ArgumentParser(
        prog="python -m sdjax.plan",
        description="What would fit on a TPU or GPU that isn't here, and how fast. No weights are read; "
        f"--model may also be {', '.join(architectures.ARCHITECTURES)} or bundled.",
    )
    add_model_options(result)
    targets = *sorted(CHIPS), *GPUS
    about = "TPU chip or GPU, of which a100 is the one of 40 GB (default: %(default)s)"
    result.add_argument("--target", choices=targets, default="v5e", help=about)
    result.add_argument("--topology", help="chips of a TPU host, such as 2x4 (default: 2x2)")
    result.add_argument("--batch-size", type=int, help="images that a device makes at once (default: what fits)")
    result.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    result.add_argument("--price", type=float, help="US dollars a TPU chip-hour (default: the list price on demand)")
    result.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    add_request_options(result)
    return result


def chips_of(topology: str) -> int:
    """Chips of a topology such as 2x4. Raises PlanError."""
    sides = topology.split("x")
    if not all(side.isdecimal() and int(side) for side in sides):
        raise PlanError(f"topology {topology!r} is not chips by chips; an example is 2x4")
    return math.prod(map(int, sides))


def make(options: argparse.Namespace, request: Request) -> tuple[Fitted | None, Request, str]:
    """The batch that the options ask for, None if not one image fits, the whole request, and the model's name.

    Raises:
        ValueError: something asked for cannot be; the message names it.
    """
    with architectures.checkpoint(options.model or "bundled") as source:
        spec = Spec(source, dtype=options.dtype, **model_options(options))
        resolved = spec.resolve(request)
        chip = CHIPS.get(options.target)
        target = tpu.target(chip) if chip else gpu.target(GPUS[options.target])
        fit = Fit(spec, resolved, target, lambda text: print(text, file=sys.stderr))
        return fit.fitted(options.batch_size), resolved, spec.name


def facts(fitted: Fitted, device: Chip | Gpu) -> dict[str, Any]:
    """What fits, as numbers."""
    return {
        "batch_size": fitted.batch_size,
        "memory_bytes": fitted.memory,
        "usable_bytes": device.memory,
        "programs": {
            placed.recorded.name: {
                "calls": placed.recorded.calls,
                "flops": round(placed.recorded.flops),
                "memory": vars(placed.compiled.memory),
            }
            for placed in fitted.programs
        },
    }


def estimated(plan: Plan, *, chips: int, price: float) -> dict[str, Any]:
    """`facts`, and seconds, cycles and what follows from them, which are the compiler's estimates."""
    found = facts(plan.fitted, plan.chip)
    for name, estimate in plan.estimates.items():
        found["programs"][name] |= {
            "estimated_cycles": round(estimate.cost.cycles.total()),
            "estimated_cycles_capped": round(estimate.cost.capped.total()),
            "estimated_kernel_cycles": round(estimate.kernel_cycles),
            "estimated_seconds": estimate.seconds,
        }
    rate = chips * plan.images_per_second
    return found | {
        "chips": chips,
        "price": price,
        "estimated_seconds_per_batch": plan.seconds,
        "estimated_images_per_second": rate,
        "estimated_dollars_per_1000_images": chips * price / 3600 * 1000 / rate,
        "estimated_share_of_peak": plan.share_of_peak,
    }


def table(programs: dict[str, dict[str, Any]]) -> str:
    """Programs as Markdown."""
    rows = {name: _cells(program) for name, program in programs.items()}
    return markdown(["program", *next(iter(rows.values()))], [[name, *cells.values()] for name, cells in rows.items()])


def _cells(program: dict[str, Any]) -> dict[str, str]:
    cells = {"calls a batch": str(program["calls"]), "TFLOP a batch": _digits(program["flops"] / 1e12)}
    if "estimated_seconds" in program:
        cells["s a batch"] = _digits(program["estimated_seconds"])
        for head, kind in {"": "cycles", ", capped": "cycles_capped", ", kernels": "kernel_cycles"}.items():
            cells[f"M cycles a call{head}"] = _digits(program[f"estimated_{kind}"] / 1e6)
    kinds = {"arguments GiB": "arguments", "results": "results", "temporaries": "temporaries", "code": "code"}
    return cells | {head: _digits(program["memory"][kind] / _GIB) for head, kind in kinds.items()}


def _digits(value: float) -> str:
    """Three that count, or all before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the process's exit status: 1 where nothing fits, 2 where nothing can be planned."""
    options = parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # a device that is here is not touched
    return ended(parser().prog, lambda: _run(options))


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for what would be found wrong after minutes of compiling."""
    refuse_empty(options)
    if options.target in GPUS and (options.topology, options.price) != (None, None):
        raise PlanError(f"--topology and --price are for TPUs; {options.target} is a GPU, whose time is not estimated")
    if options.batch_size is not None and options.batch_size < 1:
        raise PlanError(f"--batch-size={options.batch_size} makes nothing; allowed is 1 or more")
    if options.json:
        check_file("--json", options.json)
    if options.price is not None and not 0 <= options.price < math.inf:
        raise PlanError(f"--price={options.price} is no price; allowed is 0 or more")


def _run(options: argparse.Namespace) -> int:
    _check(options)
    chips = chips_of(options.topology or "2x2")
    request, _ = Request.from_row({"prompt": "a photo", **request_fields(options)})
    fitted, whole, model = make(options, request)
    chip = CHIPS.get(options.target)
    device = chip or GPUS[options.target]
    what = f"{model}, {whole.width}x{whole.height}, {whole.num_inference_steps} steps, {options.dtype}"
    gib = f"{device.memory / _GIB:.2f} GiB"
    if fitted is None:
        size = "one image" if options.batch_size is None else f"a batch of {options.batch_size}"
        print(f"{what}: {size} does not fit the {gib} of one {device.name}", file=sys.stderr)
        return 1
    if chip is None:
        found, on = facts(fitted, device), f"one {device.name}; jax {jax.__version__}"
        said = _ABOUT_GPUS
    else:
        price = chip.price if options.price is None else options.price
        found = estimated(Plan(chip, fitted), chips=chips, price=price)
        on = f"{chips} x {chip.name}; jax {jax.__version__}, libtpu {version('libtpu')}"
        said = (
            f"Estimated, not measured: {found['estimated_images_per_second']:.3g} images/s on {chips} chips, "
            f"{found['estimated_share_of_peak']:.0%} of the bfloat16 peak, "
            f"${found['estimated_dollars_per_1000_images']:.2f} per 1,000 images at ${price:.2f} a chip-hour.\n"
            f"{_ABOUT_TPUS}"
        )
    show(f"{what}, on {on}")
    show(f"batch a device: {fitted.batch_size}, in {fitted.memory / _GIB:.2f} of {gib}\n")
    show(f"{table(found['programs'])}\n\n{said}")
    if options.json:
        of = {"model": model, "target": device.name, "dtype": options.dtype}
        size = {"width": whole.width, "height": whole.height, "steps": whole.num_inference_steps}
        of |= {**size, "asked": asked(request, options)}
        options.json.write_text(json.dumps({**of, **found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
