"""A loopback Dataflow and token service, for the real client libraries to call."""

import http.server
import json
import threading
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

JOB_ID = "2026-11-23_00_00_00-1234567890"


class Cloud:
    """Answers launches, submissions and polls; `requests` holds (method, path, JSON body) of each call.

    `states` are given one a poll, and the last of them ever after; a number among them is an HTTP error.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        self.states: list[str | int] = ["JOB_STATE_DONE"]
        self.errors: list[str] = []
        self.launch_status = 200
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """By this name Beam and the launcher know that it is a test's."""
        return f"http://localhost:{self._server.server_port}"

    def sent(self, ending: str) -> Any:
        """The body of the one POST to a path with that ending."""
        (body,) = [body for method, path, body in self.requests if method == "POST" and path.endswith(ending)]
        return body

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def service_account(self, folder: Path) -> Path:
        """A made-up service account's file, whose tokens this server hands out."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        account = {
            "type": "service_account",
            "project_id": "test-project",
            "private_key_id": "none",
            "private_key": key.decode(),
            "client_email": "nobody@test-project.iam.gserviceaccount.com",
            "token_uri": f"{self.url}/token",
        }
        file = folder / "nobody.json"
        file.write_text(json.dumps(account))
        return file

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if path == "/token":
            return 200, {"access_token": "none", "expires_in": 3600, "token_type": "Bearer"}
        if path.endswith("flexTemplates:launch"):
            job = {"id": JOB_ID, "name": body["launchParameter"]["jobName"]}
            return self.launch_status, {"job": job} if self.launch_status == 200 else {"error": {"message": "no quota"}}
        if method == "POST" and path.endswith("/jobs"):
            return 200, {**body, "id": JOB_ID}
        if path.endswith("/messages"):
            return 200, {
                "jobMessages": [{"messageText": text, "messageImportance": "JOB_MESSAGE_ERROR"} for text in self.errors]
            }
        if path.endswith(f"/jobs/{JOB_ID}"):
            state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            if isinstance(state, int):
                return state, {"error": {"message": "away"}}
            return 200, {"id": JOB_ID, "currentState": state}
        return 404, {"error": {"message": f"no {method} {path}"}}

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        cloud = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0]
                body = json.loads(text) if text[:1] == b"{" else None
                cloud.requests.append((self.command, path, body))
                status, answer = cloud.answer(self.command, path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_GET

            def log_message(self, *arguments: Any) -> None:
                pass

        return Handler
