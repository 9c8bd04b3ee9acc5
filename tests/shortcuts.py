"""What the shortcuts save, and how far their pictures are from the exact ones: python -m tests.shortcuts

On the bundled model and held-out captions. Prints a table in Markdown: seconds for all pictures, the median over them
of the peak signal-to-noise ratio to the exact picture, and the checker's facts as `sdjax.training.evaluate` counts.
"""

import argparse
import math
import time

import numpy as np

from sdjax import Request, StableDiffusion
from sdjax.training.evaluate import held_out, measure

SHORTCUTS = {
    "exact": {},
    "cache_interval 2": {"cache_interval": 2},
    "cache_interval 3": {"cache_interval": 3},
    "cache_interval 5": {"cache_interval": 5},
    "token_merging_ratio 0.3": {"token_merging_ratio": 0.3},
    "token_merging_ratio 0.5": {"token_merging_ratio": 0.5},
    "guidance_end 0.5": {"guidance_end": 0.5},
    "guidance 0.2 to 0.8": {"guidance_start": 0.2, "guidance_end": 0.8},
}
FACTS = ("background", "colour", "shape", "side", "pair")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """In decibels."""
    error = np.square(a.astype(float) - b.astype(float)).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.shortcuts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=25)
    options = parser.parse_args()
    pipe, asked = StableDiffusion.from_pretrained(batch_size=options.batch_size), held_out(options.captions)
    exact: list[np.ndarray] = []
    print(f"| | s | dB | {' | '.join(FACTS)} |\n|{' --- |' * (3 + len(FACTS))}")
    for name, fields in SHORTCUTS.items():
        fields = {"guidance_scale": options.guidance, **fields}
        pipe.generate([Request(prompt="a red circle", **fields)])  # compiled outside of the time
        began = time.perf_counter()
        facts, pictures = measure(pipe, asked, **fields)
        seconds = time.perf_counter() - began
        exact = exact or pictures
        decibels = float(np.median([psnr(*pair) for pair in zip(pictures, exact, strict=True)]))
        shares = [f"{right / total:.1%}" for right, total in (facts[fact] for fact in FACTS)]
        print(f"| {name} | {seconds:.1f} | {decibels:.1f} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
