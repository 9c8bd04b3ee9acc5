"""A file is there whole or not at all; links on a disk are what they name."""

import os
import pwd
from pathlib import Path
from unittest.mock import Mock

import fsspec
import pytest

from sdjax.files import below, folder_here, user_cache, write_whole


def test_write_whole_leaves_the_old_file_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_user_without_a_home_has_caches_that_cannot_be_made(monkeypatch):
    """And no folder of the name ~ where the process runs."""
    for variable in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", Mock(side_effect=KeyError))
    assert str(user_cache("compiled")) == "/~/.cache/sdjax/compiled"


def test_a_folder_may_begin_with_the_users(monkeypatch):
    """As an option of a shell that leaves --output=~/out as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    assert folder_here("~/out") == Path("/home/me/out")
    with pytest.raises(ValueError, match="gs://bucket/~ is a URL"):
        folder_here("gs://bucket/~")


def test_links_are_what_they_name_and_lead_nowhere_twice(tmp_path):
    top, other = tmp_path / "top", tmp_path / "other"
    for folder in (top / "a" / "b", other / "c"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"four")
    links = {"a/b/up": top, "a/b/beside": top / "a", "linked": other, "a/name": other / "c" / "file", "broken": "gone"}
    for name, target in links.items():
        (top / name).symlink_to(target)
    (other / "back").symlink_to(top / "a")  # by way of `linked`, from where a further one would lead to `a` again
    (top / "a" / "over").symlink_to(other)
    os.utime(other / "c" / "file", (5, 5))

    found = below(fsspec.filesystem("file"), str(top))
    names = [os.path.relpath(path, top) for path in found]
    assert names == sorted(names)
    assert {"a/b/file", "a/name", "a/over/c/file", "linked/c/file", "linked/back/b/file"} <= {*names}
    assert not [name for name in names if name.endswith(("up", "beside", "broken")) or name.count("over") > 1]
    assert len(names) < 10
    assert found[str(top / "a" / "name")]["size"] == 4
    assert found[str(top / "a" / "name")]["mtime"] == 5

    memory = fsspec.filesystem("memory")
    memory.put(str(other / "c"), "/links/c", recursive=True)
    assert [*below(memory, "/links")] == ["/links/c/file"]
