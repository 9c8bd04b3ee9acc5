"""What commands print."""

import io
import os

from sdjax.console import show


def test_what_nobody_reads_is_dropped_unsaid(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with io.TextIOWrapper(os.fdopen(write, "wb")) as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        show("one")
        show("two")


def test_what_is_read_comes_at_once(monkeypatch):
    read, write = os.pipe()
    with io.TextIOWrapper(os.fdopen(write, "wb")) as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        show("one")
        assert os.read(read, 100) == b"one\n"
    os.close(read)
