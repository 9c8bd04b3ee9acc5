"""Pictures on web servers: read in parts, tried again, and given up where nothing comes."""

import contextlib
import io
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from sdjax import inputs, retrying
from sdjax.values import RequestError


class _Server(BaseHTTPRequestHandler):
    """Sends a file without its length, in chunks, after as many failures as are waiting."""

    protocol_version = "HTTP/1.1"
    failures: ClassVar[list[int]] = []
    data = b""

    def do_GET(self):
        if self.failures:
            failure = self.failures.pop()
            if failure:
                return self.send_error(failure)
            self.close_connection = True
            half = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ncut"
            return self.wfile.write(half if self.path.endswith("?half") else b"")
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(self.data), 2**16):
            chunk = self.data[start : start + 2**16]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_):
        pass


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(retrying, "FIRST_WAIT", 0.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/image.png"
    server.shutdown()
    server.server_close()
    _Server.failures.clear()


def test_a_server_may_give_a_file_in_parts_and_fail_at_times(served, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    monkeypatch.setattr(_Server, "data", buffer.getvalue())
    _Server.failures[:] = [503, 500]
    assert np.array_equal(inputs.load(served, "image").image, noise)
    monkeypatch.setattr(inputs, "MAX_BYTES", 2**19)
    with pytest.raises(RequestError, match="larger than 0 MiB"):
        inputs.load(served, "image")
    _Server.failures[:] = [503] * 99
    with pytest.raises(RequestError, match="cannot be read: 503"):
        inputs.load(served, "image")


@pytest.mark.parametrize("half", ["", "?half"])
def test_a_connection_that_is_cut_is_tried_again(served, monkeypatch, half):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(buffer, "PNG")
    monkeypatch.setattr(_Server, "data", buffer.getvalue())
    _Server.failures[:] = [0] * 2
    assert inputs.load(served + half, "image").image.size == (8, 8)
    _Server.failures[:] = [0] * 99
    with pytest.raises(RequestError, match="cannot be read: "):
        inputs.load(served + half, "image")


@pytest.fixture
def nobody_asked(monkeypatch):
    """No server has answered yet, or said nothing."""
    monkeypatch.setattr(inputs, "_silent", {})
    monkeypatch.setattr(inputs, "_answered", set())
    monkeypatch.setattr(inputs, "_SILENCE", 0.2)


def test_a_server_that_says_nothing_is_not_asked_for_each_picture(nobody_asked):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begun = time.monotonic()
        for i in range(3):
            with pytest.raises(RequestError, match=r"cannot be read: 127\.0\.0\.1:\d+ says nothing"):
                inputs.load(f"{url}/{i}.png", "image")
        assert time.monotonic() - begun < 2
        silent.settimeout(0)
        asked = [silent.accept() for _ in range(2)]  # how long the file is, and then for the file
        with pytest.raises(BlockingIOError):
            silent.accept()
    assert len(asked) == 2


@pytest.mark.parametrize("code", [200, 403, 404])
def test_a_server_that_has_answered_is_asked_again(served, monkeypatch, nobody_asked, code):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    monkeypatch.setattr(_Server, "data", buffer.getvalue())
    if code == 200:
        inputs.load(served, "image")
    else:
        _Server.failures[:] = [code] * 9
        with pytest.raises(RequestError, match=r"is not there|cannot be read: 403"):
            inputs.load(served, "image")
        _Server.failures.clear()
    with monkeypatch.context() as patch:
        patch.setattr(_Server, "do_GET", lambda self: time.sleep(1))
        with pytest.raises(RequestError, match="says nothing"):
            inputs.load(served, "image")
    assert inputs.load(served, "image").image.size == (8, 8)


def test_a_slow_server_is_not_a_silent_one(served, monkeypatch, nobody_asked):
    """It goes on sending, and another picture may be small. The limit may be a number, as in a file of settings."""

    def slowly(self):
        self.send_response(200)
        self.send_header("Content-Length", "99")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            for _ in range(20):
                self.wfile.write(b"x")
                time.sleep(0.1)

    monkeypatch.setitem(inputs.conf, "http", {"client_kwargs": {"timeout": 0.5}})
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    monkeypatch.setattr(_Server, "data", buffer.getvalue())
    with monkeypatch.context() as patch:
        patch.setattr(_Server, "do_GET", slowly)
        with pytest.raises(RequestError, match="takes too long"):
            inputs.load(served, "image")
    assert inputs.load(served, "image").image.size == (8, 8)


def test_only_what_is_not_found_is_not_there(served):
    for code, message in ((403, "cannot be read: 403"), (404, "is not there"), (410, "is not there")):
        _Server.failures[:] = [code] * 99
        with pytest.raises(RequestError, match=message):
            inputs.load(served, "image")
