"""A Hugging Face hub of folders on this machine, for huggingface_hub itself to ask."""

import contextlib
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


def commit(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


@contextlib.contextmanager
def serve(repositories: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders by their ids, `org/name` or `org/name@revision`.

    Yields the address, and a list that gets each file that is fetched.
    """
    fetched: list[str] = []
    asked = {name.partition("@")[0] for name in repositories}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format, *arguments):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = unquote(self.path.partition("?")[0])
            name = next((name for name in asked if f"/{name}/" in f"{path}/"), None)
            if name is None:
                return self.answer(b"", 404, {"X-Error-Code": "RepoNotFound"})
            rest = path.partition(name)[2]
            for other in repositories:  # a revision is asked for by its name, or by its commit
                if other.startswith(f"{name}@") and {other.partition("@")[2], commit(other)} & set(rest.split("/")):
                    name = other
            if name not in repositories:
                return self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
            folder = repositories[name]
            if path.startswith("/api/"):
                files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
                tree = [{"type": "file", "path": str(f.relative_to(folder)), **about(f)} for f in files]
                siblings = [{"rfilename": entry["path"]} for entry in tree]
                info = {"id": name, "sha": commit(name), "siblings": siblings}
                return self.answer(json.dumps(tree if "/tree/" in rest else info).encode())
            file = folder / rest.removeprefix("/resolve/").partition("/")[2]
            if self.command == "GET":
                fetched.append(f"{name}/{file.relative_to(folder)}")
            headers = {"ETag": f'"{about(file)["oid"]}"', "X-Repo-Commit": commit(name)}
            return self.answer(file.read_bytes(), 200, headers)

        def answer(self, body: bytes, status: int = 200, headers: Mapping[str, str] = {}) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()


def run(code: str, cache: Path, address: str | None, *arguments: str) -> str:
    """What a Python of its own prints that asks the hub at an address, or offline with the cache alone.

    huggingface_hub reads both when it is imported.
    """
    environment = {"HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1", "PATH": "", "JAX_PLATFORMS": "cpu"}
    environment |= {"HF_HUB_OFFLINE": "1"} if address is None else {"HF_ENDPOINT": address}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def about(file: Path) -> dict[str, object]:
    # By its path too, because the cache has no need of bytes that it has by another name.
    return {"size": file.stat().st_size, "oid": hashlib.sha1(bytes(file) + file.read_bytes()).hexdigest()}
