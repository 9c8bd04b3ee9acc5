"""What commands print, and end with."""

import io
import os

import pytest

from pipelines import verify
from sdjax import bench, plan
from sdjax.console import ended, show


def test_what_nobody_reads_is_dropped_unsaid(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with io.TextIOWrapper(os.fdopen(write, "wb")) as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        show("one")
        show("two")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has one")
def test_what_finds_no_place_is_said_once(monkeypatch, capsys):
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        show("one")
        show("two")
    assert capsys.readouterr().err == "what was to be printed is lost: [Errno 28] No space left on device\n"


def test_what_is_read_comes_at_once(monkeypatch):
    read, write = os.pipe()
    with io.TextIOWrapper(os.fdopen(write, "wb")) as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        show("one")
        assert os.read(read, 100) == b"one\n"
    os.close(read)


@pytest.mark.parametrize(("error", "line"), [(ValueError("one\n  two"), "one two"), (TimeoutError(), "TimeoutError")])
def test_an_error_is_one_line_and_never_an_empty_one(error, line, capsys):
    def fail():
        raise error

    assert ended("plan", fail) == 2
    assert capsys.readouterr().err == f"plan: {line}\n"


@pytest.mark.parametrize(
    ("module", "part", "arguments"), [(plan, "make", []), (bench, "measure", []), (verify, "verify", ["out"])]
)
def test_an_interrupt_is_a_line(module, part, arguments, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, part, interrupt)
    monkeypatch.setattr(bench, "_alone", lambda measuring, *_, **__: measuring())
    assert module.main(arguments) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(": interrupted")
