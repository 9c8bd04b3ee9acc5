"""Recording a sampler's loop as coefficients.

A sampler is written as the loop its paper prints, over latents that are `Form`s: linear combinations of what a
row of the table can hold. Each call of the network starts a row. A latent saved from before earlier calls is
eliminated: every row's update is a linear equation between two neighbouring latents, so an old one can be written in
terms of the newest and of the outputs and noises in between. No sampler needs a second latent at run time.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from sdjax.sampling.errors import SamplingError

HISTORY = 5
"""Network outputs a row may combine, its own included: the Adams methods need four, and PLMS passes over one."""
NOISES = 2
"""Noises a row may combine: its own and the one before (two-stage SDE methods and SA-Solver's corrector)."""

_NEGLIGIBLE = 1e-11  # relative; what is left of terms that cancel in exact arithmetic


class Level(NamedTuple):
    """A place on the noise schedule: a latent there is alpha * image + sigma * noise, alpha^2 + sigma^2 = 1.

    `t` is the timestep that the network is told (it may be fractional, and coarser than alpha and sigma).
    """

    t: float
    alpha: float
    sigma: float

    @classmethod
    def at(cls, t: float, ratio: float) -> "Level":
        """The level whose sigma / alpha (what k-diffusion calls sigma) is `ratio`."""
        alpha = 1 / math.sqrt(1 + ratio * ratio)
        return cls(float(t), alpha, float(ratio) * alpha)

    @property
    def ratio(self) -> float:
        """sigma / alpha: the noise level where the image keeps scale one, as in k-diffusion."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def lam(self) -> float:
        """log(alpha / sigma), half the log signal-to-noise ratio: the time of DPM-Solver."""
        return math.log(self.alpha) - math.log(self.sigma) if self.sigma else math.inf


class Form:
    """A linear combination of row latents ("x", row), network outputs ("m", row) and noises ("z", row)."""

    __slots__ = ("terms",)
    __array_ufunc__ = None  # NumPy scalars must leave the product to __rmul__

    def __init__(self, terms: Mapping[tuple[str, int], float]):
        self.terms = dict(terms)

    def __add__(self, other: "Form") -> "Form":
        terms = dict(self.terms)
        for key, value in other.terms.items():
            terms[key] = terms.get(key, 0.0) + value
        return Form(terms)

    def __mul__(self, scale: float) -> "Form":
        return Form({key: value * float(scale) for key, value in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> "Form":
        return self * (1 / float(scale))

    def __neg__(self) -> "Form":
        return self * -1.0

    def __sub__(self, other: "Form") -> "Form":
        return self + -other


class Row(NamedTuple):
    """One call of the network and the update that follows it; see `sdjax.sampling.table.Table`."""

    level: Level
    a: float
    b: float
    update: Form
    step: int
    drawn: bool


class Trace:
    """Records rows. `start` is the latent that the first call sees.

    `x0`, `eps` and `raw` call the network on a latent and give the row's output as the image, the noise, or whatever
    the network itself predicts. A sampler that combines outputs of several rows should keep to one of them.
    """

    def __init__(self, prediction_type: str):
        self.prediction_type = prediction_type
        self.rows: list[Row] = []
        self.start = Form({("x", 0): 1.0})
        self.step = 0
        self._over_alpha = False
        self._call: tuple[Level, float, float, int] | None = None
        self._drawn = False

    def over_alpha(self, first: Level) -> Form:
        """The start in k-diffusion's scale, x / alpha; from here on the sampler's latents are all in that scale."""
        self._over_alpha = True
        return self.start / first.alpha

    def x0(self, x: Form, level: Level) -> Form:
        """The image that the network sees in `x` at `level`."""
        alpha, sigma = level.alpha, level.sigma
        if self.prediction_type == "epsilon":
            if alpha == 0:
                raise SamplingError("epsilon prediction says nothing at zero signal-to-noise ratio; use v_prediction")
            return self._row(x, level, 1 / alpha, -sigma / alpha)
        if self.prediction_type == "v_prediction":
            return self._row(x, level, alpha, -sigma)
        return self._row(x, level, 0.0, 1.0)

    def eps(self, x: Form, level: Level) -> Form:
        """The noise that the network sees in `x` at `level`."""
        alpha, sigma = level.alpha, level.sigma
        if self.prediction_type == "epsilon":
            return self._row(x, level, 0.0, 1.0)
        if self.prediction_type == "v_prediction":
            return self._row(x, level, sigma, alpha)
        return self._row(x, level, 1 / sigma, -alpha / sigma)

    def raw(self, x: Form, level: Level) -> Form:
        """The network's own output at `x` and `level`."""
        return self._row(x, level, 0.0, 1.0)

    def noise(self) -> Form:
        """The fresh noise of the row that is being made (the same one however often it is asked for)."""
        self._drawn = True
        return Form({("z", len(self.rows)): 1.0})

    def settle(self, x: Form) -> Form:
        """`x` with every latent but this row's eliminated; a latent that is kept for long stays short that way."""
        here, terms = len(self.rows), dict(x.terms)
        for row in range(min((row for kind, row in terms if kind == "x"), default=here), here):
            weight = terms.pop(("x", row), 0.0)
            if weight == 0.0:
                continue
            update = self.rows[row].update.terms
            scale = weight / update[("x", row)]
            for key, value in update.items():
                if key != ("x", row):
                    terms[key] = terms.get(key, 0.0) - scale * value
            terms[("x", row + 1)] = terms.get(("x", row + 1), 0.0) + scale
        floor = _NEGLIGIBLE * max(map(abs, terms.values()))
        return Form({key: value for key, value in terms.items() if abs(value) > floor})

    def finish(self, x: Form) -> None:
        """End the table with `x` as the result."""
        self._close(x)

    def _row(self, x: Form, level: Level, a: float, b: float) -> Form:
        scale = level.alpha if self._over_alpha else 1.0
        if self._call is not None:
            self._close(x * scale)
        # x is this row's latent: to say so keeps later terms few, and exact where the last row left little of its own.
        x.terms = {("x", len(self.rows)): 1 / scale}
        self._call, self._drawn = (level, a, b, self.step), False
        return Form({("m", len(self.rows)): 1.0})

    def _close(self, x: Form) -> None:
        assert self._call is not None, "a sampler calls the network before it finishes"
        level, a, b, step = self._call
        self.rows.append(Row(level, a, b, self.settle(x), step, self._drawn))
