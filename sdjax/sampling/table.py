"""A sampler as a table of coefficients: one row per network call."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from sdjax.sampling.errors import SamplingError
from sdjax.sampling.trace import HISTORY, NOISES, Row


@dataclass(frozen=True, eq=False)
class Table:
    """What a sampler does, as numbers: R rows in float64, checked when made.

    The latent x is always variance-preserving, x = alpha * image + sigma * noise with alpha^2 + sigma^2 = 1, since that
    is what the network is called on: no row scales its input, and values stay near one at every level (k-diffusion's x
    reaches 15, or 4096 after a zero-terminal-SNR rescale). The last row's x is what the VAE decodes. A row is

        F = network(x, t)
        m = a x + b F
        x = cx x + sum_j cm[j] m_{-j} + sum_j cn[j] z_{-j}

    with m_0 = m and z_0 the row's own fresh noise, m_{-j} and z_{-j} those of j rows before.

    t, a, b, cx: [R].  cm: [R, HISTORY].  cn: [R, NOISES].
    signal, noise: [R]; the level that the latent has reached after each row, (1, 0) after the last: a known image y
        with noise n is there signal * y + noise * n (inpainting blends it in).
    step: [R] int; the sampler step, from 0, that the row is part of (two-stage methods have two rows a step).
    steps: those of the whole run, in which a table may begin or end.
    run_calls: network calls of the run up to its end, of which the table's are the first.
    draws: [R] bool; whether diffusers draws noise at this row, used or not.
    start_signal, start_noise: the latent to start from is start_signal * image + start_noise * noise.
    walk: [R + 1] where the rows' noises are the steps of one Brownian motion over sigma / alpha: where that begins, at
        or (in image-to-image) above the first row, and where each row is, with those of a later part of the run; else
        empty.
    """

    t: Float64[np.ndarray, " R"]
    a: Float64[np.ndarray, " R"]
    b: Float64[np.ndarray, " R"]
    cx: Float64[np.ndarray, " R"]
    cm: Float64[np.ndarray, "R H"]
    cn: Float64[np.ndarray, "R K"]
    signal: Float64[np.ndarray, " R"]
    noise: Float64[np.ndarray, " R"]
    step: Int64[np.ndarray, " R"]
    draws: Bool[np.ndarray, " R"]
    steps: int
    run_calls: int
    start_signal: float
    start_noise: float
    walk: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        rows = len(self.t)
        walk = max(len(self.walk), rows + 1) if self.walk else 0
        shapes = {"cm": (rows, HISTORY), "cn": (rows, NOISES), "walk": (walk,)}
        for field in fields(self):
            value = np.asarray(getattr(self, field.name))
            expected = () if field.name.startswith(("start_", "steps", "run_")) else shapes.get(field.name, (rows,))
            if value.shape != expected or rows == 0:
                raise SamplingError(f"table column {field.name} has shape {value.shape}; expected {expected}")
            if not np.all(np.isfinite(value)):
                row = np.argwhere(~np.isfinite(value)).ravel()[:1]
                raise SamplingError(f"table column {field.name} is not finite at row {row}; these settings don't fit")
        before = np.arange(rows)[:, None] < np.arange(HISTORY)
        if np.any(self.cm[before]) or np.any(self.cn[before[:, :NOISES]]):
            raise SamplingError("a row refers to outputs or noises from before the first row")

    def part(self, first: int, stop: int) -> "Table":
        """The rows up to step `stop` of a longer run, of which the table's first step is step `first`."""
        if first == 0 and stop == self.steps:
            return self
        rows = int(np.searchsorted(self.step, stop - first))
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        kept = {name: column[:rows] for name, column in columns.items() if isinstance(column, np.ndarray)}
        kept["step"] = kept["step"] + first
        return replace(self, **kept, steps=self.steps + first)

    @property
    def calls(self) -> int:
        """Network calls that the table asks for (of each half of guidance)."""
        return len(self.t)

    @property
    def uses_noise(self) -> Bool[np.ndarray, " R"]:
        """Whether a row's fresh noise enters its own update or the next row's."""
        later = [np.append(self.cn[j:, j] != 0, np.zeros(min(j, len(self.cn)), bool)) for j in range(NOISES)]
        return np.any(later, axis=0)

    @classmethod
    def from_rows(
        cls, rows: Sequence[Row], *, start_signal: float, start_noise: float, walk_from: float | None = None
    ) -> "Table":
        """Packs traced rows. walk_from: where a Brownian motion that gives their noises begins."""
        cm, cn = np.zeros((len(rows), HISTORY)), np.zeros((len(rows), NOISES))
        cx = np.array([row.update.terms.get(("x", i), 0.0) for i, row in enumerate(rows)])
        for i, row in enumerate(rows):
            for (kind, j), value in row.update.terms.items():
                columns = {"m": cm, "z": cn}.get(kind)
                if columns is None:
                    continue
                if i - j >= columns.shape[1]:
                    raise SamplingError(f"row {i} looks {i - j} rows back; a table holds {columns.shape[1] - 1}")
                columns[i, i - j] = value
        after = [*(row.level for row in rows[1:]), None]
        return cls(
            t=np.array([row.level.t for row in rows]),
            a=np.array([row.a for row in rows], np.float64),
            b=np.array([row.b for row in rows], np.float64),
            cx=cx,
            cm=cm,
            cn=cn,
            signal=np.array([level.alpha if level else 1.0 for level in after]),
            noise=np.array([level.sigma if level else 0.0 for level in after]),
            step=np.array([row.step for row in rows], np.int64),
            draws=np.array([row.drawn for row in rows], bool),
            steps=rows[-1].step + 1 if rows else 0,
            run_calls=len(rows),
            start_signal=float(start_signal),
            start_noise=float(start_noise),
            walk=() if walk_from is None else (walk_from, *(row.level.ratio for row in rows)),
        )


class Tables(NamedTuple):
    """A batch of tables in float32, [B, R] (cm: [B, R, HISTORY], cn: [B, R, NOISES]); what the scan runs.

    Rows after a table's own are inactive: they call nothing and leave the latent as it is.
    """

    t: Float32[np.ndarray, "B R"]
    a: Float32[np.ndarray, "B R"]
    b: Float32[np.ndarray, "B R"]
    cx: Float32[np.ndarray, "B R"]
    cm: Float32[np.ndarray, "B R H"]
    cn: Float32[np.ndarray, "B R K"]
    signal: Float32[np.ndarray, "B R"]
    noise: Float32[np.ndarray, "B R"]
    uses_noise: Bool[np.ndarray, "B R"]
    active: Bool[np.ndarray, "B R"]


def stack(tables: Sequence[Table], rows: int | None = None) -> Tables:
    """Pads tables to `rows` (default: the longest) and stacks them. Raises SamplingError where one is longer."""
    longest = max(table.calls for table in tables)
    rows = longest if rows is None else rows
    if longest > rows:
        raise SamplingError(f"a table of {longest} rows does not fit into {rows}")

    def padded(name: str, fill: float = 0.0, dtype: type = np.float32) -> np.ndarray:
        columns = [np.asarray(getattr(table, name), dtype) for table in tables]
        out = np.full((len(columns), rows, *columns[0].shape[1:]), fill, dtype)
        for row, column in zip(out, columns, strict=True):
            row[: len(column)] = column
        return out

    return Tables(
        t=padded("t"),
        a=padded("a"),
        b=padded("b"),
        cx=padded("cx", 1.0),
        cm=padded("cm"),
        cn=padded("cn"),
        signal=padded("signal", 1.0),
        noise=padded("noise"),
        uses_noise=padded("uses_noise", dtype=np.bool_),
        active=np.arange(rows) < np.array([[table.calls] for table in tables]),
    )
