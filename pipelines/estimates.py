"""How long a launch would take and what it would cost, by `sdjax.plan`'s figures where there are some.

Compiling for a TPU takes minutes, so nothing is compiled here: `python -m sdjax.plan --json FILE` keeps what it found.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.dataflow import LaunchError, Preset
from pipelines.options import parse
from sdjax.planning.asked import asked
from sdjax.planning.chips import CHIPS
from sdjax.request import Request
from sdjax.values import BATCH_SIZE


class Figure(NamedTuple):
    """A number, and where it comes from."""

    value: float
    source: str


def speed(preset: Preset) -> Figure | None:
    """Images a second of one chip: the preset's plan's, or else what it states; None where it has neither.

    Raises:
        LaunchError: the plan cannot be read, or is for something else than the preset.
    """
    estimate = preset.estimate
    if "plan" in estimate:
        plan = read_plan(Path(estimate["plan"]), preset)
        what = f"{plan['model']}, {plan['width']}x{plan['height']}, {plan['steps']} steps, {plan['batch_size']} at once"
        return Figure(
            plan["estimated_images_per_second"] / plan["chips"],
            f"compiler estimate: sdjax.plan of {what}; nothing was run",
        )
    if "images_per_second" in estimate:
        return Figure(estimate["images_per_second"], estimate.get("images_per_second_source", "source not stated"))
    return None


def price(preset: Preset) -> Figure | None:
    """US dollars an hour of one chip: what the preset or the command line states, or a TPU's list price."""
    if "price_per_chip_hour" in preset.estimate:
        return Figure(preset.estimate["price_per_chip_hour"], preset.estimate.get("price_source", "source not stated"))
    if preset.machine.chip in CHIPS:
        return Figure(CHIPS[preset.machine.chip].price, "list price of Cloud TPU on demand in the US, 2026")
    return None


def read_plan(path: Path, preset: Preset) -> dict[str, Any]:
    """What `sdjax.plan` wrote for what the preset asks of its chip, the job's own defaults included.

    Raises:
        LaunchError: it cannot be read, or is for others.
    """
    its = {"target": preset.machine.chip, **_asked(preset)}
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        # A plan says its size also where that is the model's own, of which a job knows nothing.
        sizes = {name: plan[name] for name in ("width", "height") if name in its}
        found = {name: plan[name] for name in ("target", "dtype", "steps", "batch_size")} | plan["asked"] | sizes
        if not (plan["model"] and plan["estimated_images_per_second"] / plan["chips"] > 0):
            raise ValueError
    except OSError as error:
        raise LaunchError(f"{path}: {error.strerror}; `python -m sdjax.plan --json FILE` writes a plan") from None
    except (ValueError, TypeError, KeyError, ZeroDivisionError):
        raise LaunchError(f"{path}: is not what `python -m sdjax.plan --json` writes for a TPU") from None
    for name in {**found, **its}:
        planned, asks = (f"{name} {of[name]}" if name in of else f"no {name}" for of in (found, its))
        if planned != asks:
            raise LaunchError(f"{path}: is a plan for {planned}, and the job has {asks.removeprefix(f'{name} ')}")
    return plan


def _asked(preset: Preset) -> dict[str, Any]:
    """A preset's [pipeline] in the words of a plan."""
    given = {"prompts": "any", "output": "any", **preset.pipeline}
    try:
        options = parse([f"--{name.replace('_', '-')}={value}" for name, value in given.items()])
        request, _ = Request.from_row({"prompt": "any", **options.request_defaults()})
    except ValueError as error:
        raise LaunchError(f"no plan is for this job: {error}") from None
    batch = {
        "dtype": options.dtype,
        "steps": request.num_inference_steps,
        "batch_size": options.batch_size or BATCH_SIZE,
    }
    return batch | asked(request, options)


def told(preset: Preset, num_images: int | None) -> dict[str, str]:
    """Speed, time and cost as text with their sources; "unknown" where no figure has one."""
    per_chip, dollars = speed(preset), price(preset)
    if per_chip is None:
        unknown = "unknown: neither measured nor estimated for this preset; try a thousand images first"
        return {"speed": unknown, "time": "unknown", "cost": "unknown"}
    chips = preset.machine.chips * preset.max_workers
    images = num_images or 1_000_000
    chip_hours = images / per_chip.value / 3600
    length = f"{chip_hours / chips:,.2f} h, {chip_hours:,.1f} chip-hours for {images:,} images; start-up not in it"
    if num_images is None:
        length += "; --num-images says how many there are"
    cost = "unknown: give --price-per-chip-hour, from the current price list"
    if dollars is not None:
        per_hour = f"{dollars.value:g} a chip-hour ({dollars.source}; check the current price)"
        cost = f"{chip_hours * dollars.value:,.2f} USD at {per_hour}"
    whole = f"{per_chip.value * chips:,.2f} with all workers up"
    return {"speed": f"{per_chip.value:.3g} images/s a chip, {whole} ({per_chip.source})", "time": length, "cost": cost}
