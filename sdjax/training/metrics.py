"""A run's numbers: a CSV row a step, and the same as TensorBoard events."""

import csv
from pathlib import Path

from tensorboardX import SummaryWriter


class Metrics:
    """Writes metrics under `folder`; after a resumption at `step`, rows of later steps are taken back.

    The CSV holds what is a function of the step alone, so that a resumed run's file equals an uninterrupted one's.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / "metrics.csv"
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        # A run killed before its first row may have left an empty file.
        if self._path.exists() and self._path.stat().st_size:
            with self._path.open(newline="", encoding="utf-8") as file:
                header, *rows = list(csv.reader(file))
            # A row that a kill cut short is later than the last checkpoint.
            whole = [row for row in rows if len(row) == len(header) and int(row[0]) <= step]
            with self._path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([header, *whole] if whole else [])

    def write(self, rows: list[dict[str, float]], images_per_second: float) -> None:
        """Append a row for each step, each with the same keys beginning with `step`."""
        with self._path.open("a", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            if file.tell() == 0:
                table.writeheader()
            table.writerows(rows)
        step = int(rows[-1]["step"])
        for name, value in (rows[-1] | {"images_per_second": images_per_second}).items():
            if name != "step":
                self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        """Write what the events' thread still holds."""
        self._events.close()
