"""Fixtures of the jobs' tests."""

import fsspec
import pytest

from pipelines import storage
from tests.pipelines.faulty import FaultyFileSystem


@pytest.fixture
def faulty(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.0)
    fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
    FaultyFileSystem.store.clear()
    FaultyFileSystem.faults = []
    return FaultyFileSystem
