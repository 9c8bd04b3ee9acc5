"""A run's numbers: a CSV row a step, and the same as TensorBoard events."""

import csv
import io
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from sdjax.files import write_whole


class Metrics:
    """Writes metrics under `folder`; after a resumption at `step`, rows of later steps are taken back.

    The CSV holds what is a function of the step alone, so that a resumed run's file equals an uninterrupted one's.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / "metrics.csv"
        self._events = EventFileWriter(str(folder / "tensorboard"))
        self._event(step + 1, session_log=SessionLog(status=SessionLog.START))  # takes back the events of later steps
        # A run killed before its first row may have left an empty file.
        if self._path.exists() and self._path.stat().st_size:
            with self._path.open(newline="", encoding="utf-8") as file:
                header, *rows = list(csv.reader(file))
            # A row that a kill cut short is later than the last checkpoint.
            whole = [row for row in rows if len(row) == len(header) and int(row[0]) <= step]
            kept = io.StringIO(newline="")
            csv.writer(kept).writerows([header, *whole] if whole else [])
            write_whole(self._path, kept.getvalue().encode())

    def write(self, rows: list[dict[str, float]], images_per_second: float) -> None:
        """Append a row for each step, each with the same keys beginning with `step`."""
        with self._path.open("a", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            if file.tell() == 0:
                table.writeheader()
            table.writerows(rows)
        step = int(rows[-1]["step"])
        scalars = rows[-1] | {"images_per_second": images_per_second}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items() if name != "step"]
        self._event(step, summary=Summary(value=values))
        self._events.flush()

    def _event(self, step: int, **content: Any) -> None:
        self._events.add_event(Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        """Write what the events' thread still holds."""
        self._events.close()
