"""Storage: whole or absent, created once, tried again where trying again can help."""

import asyncio
import errno
import os
import random
import socket
import threading
import time
import tracemalloc
from types import SimpleNamespace

import aiohttp
import fsspec
import pytest

from pipelines import storage
from pipelines.storage import Store, limit_silence, parallel_map
from sdjax import retrying
from sdjax.retrying import is_of_a_network, is_transient, retry
from tests.pipelines.faulty import HttpError


@pytest.fixture(params=["disk", "memory"])
def store(request, tmp_path):
    if request.param == "disk":
        return Store(str(tmp_path / "out"))
    fsspec.filesystem("memory").store.clear()
    return Store("memory://out")


def test_files_are_written_listed_read_and_deleted(store):
    assert store.find("a") == []
    store.write("a/x.txt", b"0123456789")
    store.write("a/b/y.txt", b"y")
    assert store.find("a") == ["a/b/y.txt", "a/x.txt"]
    assert store.read("a/x.txt", 2, 5) == b"234"
    store.write("a/x.txt", b"new")
    assert store.read("a/x.txt") == b"new"
    store.delete(["a/x.txt", "a/absent.txt"])
    assert not store.exists("a/x.txt")
    store.delete(["a/b/y.txt"])
    assert store.find("a") == []
    with pytest.raises(FileNotFoundError):
        store.read("a/x.txt")


def test_values_come_in_order_and_few_of_them_wait():
    taken = 0

    def items():
        for item in range(100):
            assert item - taken <= 9  # twice the threads, and the one that is about to wait
            yield item

    for value in parallel_map(lambda item: item * item, items(), threads=4):
        assert value == taken * taken
        taken += 1
    assert taken == 100


def test_values_come_in_order_where_only_some_calls_wait():
    def call(item):
        time.sleep(random.random() / 500 if item % 3 else 0)
        return item

    assert list(parallel_map(call, range(100), threads=4, waits=lambda item: item % 3 > 0)) == list(range(100))
    here = threading.get_ident()
    assert set(parallel_map(lambda _: threading.get_ident(), range(100), waits=lambda _: False)) == {here}


def test_of_a_million_files_few_wait_to_be_deleted(monkeypatch):
    store = Store("memory://out")
    monkeypatch.setattr(type(store.fs), "rm_file", lambda self, path: None)
    names = [f"images/{i}.png" for i in range(20_000)]
    tracemalloc.start()
    try:
        store.delete(names)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_a_bucket_that_says_nothing_is_given_up(monkeypatch):
    gcsfs = pytest.importorskip("gcsfs")
    assert fsspec.filesystem("gs", token="anon", skip_instance_cache=True).requests_timeout.sock_read == 300
    for own in ({"gs": {"requests_timeout": 7}}, {"gcs": {"requests_timeout": 7}}):
        config = {name: dict(values) for name, values in own.items()}
        limit_silence(config)
        assert config == own
    config = {"gcs": {"token": "anon"}}
    monkeypatch.setattr(storage, "_SILENCE", 0.1)
    limit_silence(config)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        fs = gcsfs.GCSFileSystem(token="anon", endpoint_url=url, skip_instance_cache=True, **config["gs"])
        monkeypatch.setattr(gcsfs.retry, "asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0)))
        with pytest.raises(TimeoutError) as error:
            fs.cat_file("bucket/object")
        assert is_transient(error.value)


def test_create_writes_once(store):
    store.write("x", b"first", create=True)
    with pytest.raises(FileExistsError):
        store.write("x", b"second", create=True)
    assert store.read("x") == b"first"


def test_a_json_file_that_is_absent_cut_short_or_no_object_is_none(store):
    assert store.read_json("x") is None
    for data in (b'{"a": ', b"", b"[]", b"2", b'{"a": "\xfc"}', b"[" * 100_000):
        store.write("x", data)
        assert store.read_json("x") is None
    store.write_json("x", {"a": "ü"})
    assert store.read_json("x") == {"a": "ü"}


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(retrying, "FIRST_WAIT", 0.0)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Store(str(tmp_path)).write("a/x", b"data")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_transient_faults_are_waited_out(faulty):
    faulty.faults = [HttpError(503), HttpError("429"), TimeoutError(), OSError(errno.ENOSPC, "full"), "answer lost"]
    store = Store("faulty://out")
    store.write("x", b"data")
    assert store.read("x") == b"data"
    assert faulty.faults == []


def test_other_faults_are_raised_at_once(faulty):
    faulty.faults = [HttpError(503), HttpError(400)]
    with pytest.raises(HttpError, match="400"):
        Store("faulty://out").write("x", b"data")
    assert len(faulty.faults) == 1


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (HttpError(500), True),
        (HttpError(404), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (OSError("Forbidden: bucket"), False),
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.EIO, "cut"), True),
        (OSError(errno.EROFS, "read-only"), False),
        (OSError(errno.ENAMETOOLONG, "too long"), False),
        (OSError(errno.ELOOP, "links in a circle"), False),
        (OSError(errno.EINVAL, "no such name"), False),
        (ValueError(), False),
    ],
)
def test_which_faults_pass(error, transient):
    assert is_transient(error) is transient


@pytest.mark.parametrize(("code", "transient"), [(503, True), (404, False)])
def test_what_a_web_server_answered_says_whether_a_file_that_is_not_found_may_be(code, transient):
    error = FileNotFoundError("https://host/a.png")
    error.__cause__ = HttpError(code)
    assert is_transient(error) is transient


@pytest.mark.parametrize(("status", "transient"), [(503, True), (429, True), (404, False), (403, False)])
def test_a_web_servers_answer_is_the_same_beside_buckets(status, transient):
    """gcsfs, once it is imported, takes every one of them for what may pass."""
    import gcsfs  # noqa: F401

    asked = SimpleNamespace(real_url="https://host/a.png")
    assert is_transient(aiohttp.ClientResponseError(asked, (), status=status)) is transient


@pytest.mark.parametrize("client", ["httpx", "httpx2"])
def test_errors_of_the_hubs_client_are_of_a_network(client):
    """Which one hf:// URLs are read by is the hub's version's choice."""
    assert is_of_a_network(pytest.importorskip(client).ConnectError("refused"))


def test_retrying_ends(monkeypatch):
    monkeypatch.setattr(retrying, "FIRST_WAIT", 0.0)
    calls = []

    def fail():
        calls.append(1)
        raise TimeoutError

    with pytest.raises(TimeoutError):
        retry(fail)
    assert len(calls) == retrying.ATTEMPTS
