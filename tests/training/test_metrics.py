"""A run's numbers, after kills and resumptions."""

import csv
import itertools
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from sdjax.training.metrics import Metrics


@pytest.fixture(autouse=True)
def _own_numbers(monkeypatch):
    """A process's files of one second are read by their number as text, in which the tenth comes before the ninth."""
    monkeypatch.setattr(event_file_writer, "_global_uid", SimpleNamespace(get=itertools.count().__next__))


def _write(metrics, *steps):
    for step in steps:
        metrics.write([{"step": step, "loss": 1 / step}], 1.0)
    metrics.close()


def _steps(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def _shown(folder):
    """The steps that TensorBoard shows."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [scalar.step for scalar in events.Scalars("loss")]


def test_a_run_killed_before_its_first_checkpoint_begins_again_any_number_of_times(tmp_path):
    _write(Metrics(tmp_path, 0), 1, 2)
    for _ in range(2):
        Metrics(tmp_path, 0)
    _write(Metrics(tmp_path, 0), 1)
    assert _steps(tmp_path) == _shown(tmp_path) == [1]


def test_a_header_that_a_kill_cut_short_is_written_again(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,lo")
    _write(Metrics(tmp_path, 0), 1)
    assert _steps(tmp_path) == [1]


def test_a_resumed_run_shows_its_checkpoints_own_step(tmp_path):
    _write(Metrics(tmp_path, 0), 1, 2, 3, 4)
    _write(Metrics(tmp_path, 3), 4, 5)
    assert _steps(tmp_path) == [1, 2, 3, 4, 5]
    assert _shown(tmp_path) == [1, 2, 3, 4, 5]
