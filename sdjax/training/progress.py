"""What a run says while it trains: a line that moves, and its numbers on disk."""

import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from sdjax.training.metrics import Metrics


class Progress:
    """Keeps each step's numbers on the devices until they are written.

    Args:
        folder: the run's.
        start: steps taken before.
        steps: of the whole run.
        batch_size: images of a step.
    """

    def __init__(self, folder: Path, start: int, steps: int, batch_size: int) -> None:
        self._metrics, self._batch_size = Metrics(folder, start), batch_size
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)
        self._pending: list[tuple[int, Mapping[str, Float[Array, " device"]]]] = []
        self._written = start
        self.rest()

    def add(self, step: int, values: Mapping[str, Float[Array, " device"]]) -> None:
        """Keep a step's numbers, which are the same on each device and may still be in the making."""
        self._pending.append((step, values))

    def write(self) -> None:
        """Write what was added since the last time.

        Raises:
            FloatingPointError: the last loss is not finite; the numbers are written nevertheless.
        """
        if not self._pending:
            return
        numbers = jax.device_get(self._pending)  # all at once: each by itself would be waited for
        rows = [{"step": step, **{name: float(v[0]) for name, v in values.items()}} for step, values in numbers]
        step, loss = rows[-1]["step"], rows[-1]["loss"]
        speed = (step - self._written) * self._batch_size / (time.perf_counter() - self._since)
        self._metrics.write(rows, speed)
        self._bar.update(step - self._written)
        self._bar.set_postfix_str(f"loss {np.mean([row['loss'] for row in rows]):.4f}, {speed:.1f} images/s")
        self._pending, self._written = [], step
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}")

    def rest(self) -> None:
        """Count no time before now: a checkpoint's and a sheet's are no step's."""
        self._since = time.perf_counter()

    def close(self) -> None:
        self._bar.close()
        self._metrics.close()
