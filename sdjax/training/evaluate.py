"""Measure how well a model follows the captions of held-out scenes: python -m sdjax.training.evaluate [--model FOLDER]

Prints a table in Markdown. The pictures are read by `sdjax.training.checker`, which looks at pixels only.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from sdjax import images
from sdjax.console import ended, show
from sdjax.files import check_file, write_whole
from sdjax.generate import StableDiffusion
from sdjax.parts import BUNDLED
from sdjax.request import Request
from sdjax.training import checker, scenes

_SHOWN = 8


def held_out(count: int, seed: int = 0) -> list[tuple[scenes.Scene, str]]:
    """Return `count` held-out scenes, each with a caption that names its background and position."""
    found = [scenes.scene(index, seed, "heldout") for index in range(count)]
    return [
        (scene, scenes.caption(scene, np.random.default_rng([seed, i]), full=True)) for i, scene in enumerate(found)
    ]


def measure(
    pipe: StableDiffusion, asked: list[tuple[scenes.Scene, str]], **options: Any
) -> tuple[dict[str, tuple[int, int]], list[UInt8[np.ndarray, "size size 3"]]]:
    """Return, for each fact of `checker.check`, how many pictures show it and how many should; and the pictures.

    Args:
        pipe: the model.
        asked: scenes and their captions; the caption's place is its seed.
        options: further fields of the requests.
    """
    requests = [Request(prompt=caption, seed=seed, **options) for seed, (_, caption) in enumerate(asked)]
    right, total, pictures = Counter(), Counter(), []
    results = tqdm(pipe.stream(requests), total=len(requests), unit="image", dynamic_ncols=True)
    for (scene, _), result in zip(asked, results, strict=True):
        pictures.append(result.pixels)
        for fact, holds in checker.check(scene, checker.read(result.pixels)).items():
            right[fact] += holds
            total[fact] += 1
    return {fact: (right[fact], total[fact]) for fact in total}, pictures


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError
    return count


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m sdjax.training.evaluate", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--model", default=BUNDLED, help="a checkpoint in the diffusers layout; default: the bundled one"
    )
    parser.add_argument("--captions", type=_count, default=500, help="how many held-out captions; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and their phrasing; default %(default)s")
    parser.add_argument("--sampler", help="default: the model's")
    parser.add_argument("--steps", type=int, default=30, help="default %(default)s")
    parser.add_argument("--guidance", type=float, nargs="+", default=[7.5], help="a column each; default %(default)s")
    parser.add_argument("--batch-size", type=int, default=25, help="images that a device makes at once")
    parser.add_argument("--picture", help=f"also write the first {_SHOWN} pictures, a row for each guidance, as a PNG")
    arguments = parser.parse_args(argv)
    if arguments.picture is not None:
        try:
            check_file("--picture", Path(arguments.picture))
        except ValueError as error:
            parser.error(str(error))
    return ended(parser.prog, lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    pipe = StableDiffusion.from_pretrained(arguments.model, batch_size=arguments.batch_size)
    asked = held_out(arguments.captions, arguments.seed)
    options = {"sampler": arguments.sampler, "num_inference_steps": arguments.steps}
    measured = [measure(pipe, asked, guidance_scale=scale, **options) for scale in arguments.guidance]
    columns = [column for column, _ in measured]
    show("| held-out captions | of | " + " | ".join(f"guidance {scale:g}" for scale in arguments.guidance) + " |")
    show("| --- | --- |" + " --- |" * len(columns))
    for fact, (_, total) in columns[0].items():
        cells = [f"{100 * column[fact][0] / total:.1f}%" for column in columns]
        show(f"| {fact} | {total} | " + " | ".join(cells) + " |")
    if arguments.picture is not None:
        shown = [Image.fromarray(pixels) for _, pictures in measured for pixels in pictures[:_SHOWN]]
        captions = [f"{scale:g}: {caption}" for scale in arguments.guidance for _, caption in asked[:_SHOWN]]
        sheet = images.contact_sheet(shown, captions, columns=min(_SHOWN, len(asked)), cell=128)
        write_whole(Path(arguments.picture), images.encode(np.asarray(sheet)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
