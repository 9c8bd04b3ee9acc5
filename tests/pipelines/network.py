"""A network that fails as networks do: a proxy on this machine, before a server on it."""

import http.client
import http.server
import threading
import time
from collections import Counter
from typing import Any

STALL = 2.0  # seconds


class Network:
    """Passes requests on to a server, but for the faults, of which each request takes the last.

    A fault is a status to answer in the server's place, or `silence` (no answer for `STALL` seconds), `cut` (the
    connection ends before the server hears of it), `lost` (after it has answered), or `half` of the answer; None
    is none. `met` counts them.
    """

    def __init__(self, host: str, port: int) -> None:
        self.faults: list[int | str | None] = []
        self.met: Counter[int | str | None] = Counter()
        self._target = host, port
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        network = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = network.faults.pop() if network.faults else None
                network.met[fault] += 1
                self.close_connection = fault is not None
                if isinstance(fault, int):
                    self._send(fault, {}, b'{"error": {"message": "away"}}')
                elif fault == "silence":
                    time.sleep(STALL)
                elif fault != "cut":
                    answer = network._ask(self.command, self.path, body, dict(self.headers))
                    if fault != "lost":
                        self._send(*answer, share=0.5 if fault == "half" else 1.0)

            do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_GET

            def _send(self, status: int, headers: dict[str, str], data: bytes, share: float = 1.0) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: int(len(data) * share)])

            def log_message(self, *arguments: Any) -> None:
                pass

        return Handler

    def _ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self._target, timeout=30)
        try:
            connection.request(method, path, body, {**headers, "Accept-Encoding": "identity"})
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        passed = {name: value for name, value in answer.getheaders() if name.lower() not in _OF_A_HOP}
        return answer.status, passed, data


_OF_A_HOP = {"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding"}
