"""How fast samplers converge: their error at the last call against the number of calls, where the answer is known.

`python -m tests.sampling.convergence docs/convergence.png` draws it (needs matplotlib).
"""

import dataclasses
import io
import sys

import numpy as np
from PIL import Image

from sdjax.sampling import Schedule, make_table
from tests.sampling.toy import Toy, config, run_table

SCHEDULE = Schedule.from_config(config())
MEAN, SPREAD = 0.8, 0.6
ORDERS = {
    ("euler", None): 1,
    ("heun", None): 2,
    ("dpm_2", None): 2,
    ("dpmpp_2s", 2): 2,
    ("dpmpp_2s", 3): 3,
    ("dpmpp_2m", 2): 2,
    ("dpmpp_2m", 3): 2,  # published with half of the second derivative, which costs it the third order
    ("lms", 2): 2,
    ("lms", 4): 3,  # and 2 in the end, by its start on order 1
    ("ipndm", 4): 2,  # its weights are those of even steps
    ("deis", 2): 2,
    ("deis", 3): 2,  # 3 at first, then its start on order 1 shows
    ("uni_pc", 1): 2,  # the corrector adds one
    ("uni_pc", 2): 3,
    ("uni_pc_bh1", 2): 3,
}
"""The order that each sampler (and order option) shows between 73 and 145 steps."""


class Gaussian(Toy):
    """The exact denoiser of Gaussian images, whose probability flow has a closed form."""

    def image(self, x, alpha, sigma):
        return (alpha * SPREAD**2 * x + sigma**2 * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)


def error(sampler: str, order: int | None, n: int) -> tuple[int, float]:
    """Calls, and the greatest error of the latent that the last one sees, over n sigmas from 10 to 0.05 even in log."""
    ratios = np.geomspace(10, 0.05, n)
    table = make_table(SCHEDULE, sampler=sampler, sigmas=list(ratios), order=order)
    calls = table.calls - 1
    columns = {name: getattr(table, name)[:calls] for name in ("t", "a", "b", "cx", "cm", "cn", "signal", "noise")}
    cut = dataclasses.replace(table, **columns, step=table.step[:calls], draws=table.draws[:calls])
    alpha = 1 / np.sqrt(1 + ratios**2)
    start = np.linspace(-2, 2, 7)
    spread = np.sqrt(SPREAD**2 + ratios**2)
    exact = alpha[-1] * (MEAN + (start / alpha[0] - MEAN) * spread[-1] / spread[0])
    return calls, float(np.max(np.abs(run_table(cut, Gaussian(SCHEDULE), start) - exact)))


def draw(path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.6), dpi=80)
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    markers = "osd^v<>Ph*XDp8+"
    for ((sampler, order), slope), marker in zip(ORDERS.items(), markers, strict=True):
        calls, errors = zip(*(error(sampler, order, n) for n in (7, 13, 19, 37, 73, 145)), strict=True)
        label = sampler if order is None else f"{sampler}, order {order}"
        axes.loglog(calls, errors, marker=marker, markersize=4, linewidth=1, label=f"{label} ({slope})")
    axes.set(xlabel="network calls", ylabel="greatest error", title="Error on Gaussian images (order it shows)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    drawn = io.BytesIO()
    figure.savefig(drawn, bbox_inches="tight")
    Image.open(drawn).convert("RGB").quantize(48).save(path, optimize=True)


if __name__ == "__main__":
    draw(sys.argv[1])
