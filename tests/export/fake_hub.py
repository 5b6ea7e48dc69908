"""The few routes of the Hugging Face Hub that an upload uses, on 127.0.0.1."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


class FakeHub(ThreadingHTTPServer):
    """Keeps what is uploaded: files by repository, branch and name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, str] = {}
        """Repository → visibility."""
        self.branches: set[tuple[str, str]] = set()
        self.commits: list[dict[str, Any]] = []
        """Repository, branch, message and files (name → content) of each."""
        self.objects: dict[str, bytes] = {}
        """Large files by sha256."""
        self.tokens: set[str | None] = set()
        self.refused: dict[str, int] = {}
        """Part of a path → the status that it is refused with."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.server.tokens.add((self.headers.get("Authorization") or "").removeprefix("Bearer ") or None)
        for part, status in self.server.refused.items():
            if part in path:
                return self._answer({"error": "no write access"}, status)
        if path.startswith("/stored/"):
            return self._store(path.removeprefix("/stored/"), body)
        parts = path.strip("/").split("/")
        match parts:
            case ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                return self._answer({"warnings": [], "errors": []})
            case ["api", "models", owner, name, "branch", branch]:
                self.server.branches.add((f"{owner}/{name}", branch))
                return self._answer({})
            case ["api", "models", _, _, "preupload", _]:
                return self._answer({"files": [_mode(file) for file in json.loads(body)["files"]]})
            case [owner, name, "info", "lfs", "objects", "batch"]:
                return self._batch(json.loads(body))
            case ["api", "models", owner, name, "commit", branch]:
                return self._commit(f"{owner}/{name}", branch, body)
        self._answer({"error": f"no route {path}"}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repositories:
            return self._answer({"error": "exists", "url": f"{self.server.url}/{name}"}, 409)
        self.server.repositories[name] = asked.get("visibility", "public")
        self._answer({"url": f"{self.server.url}/{name}"})

    def _batch(self, asked: dict[str, Any]) -> None:
        self._answer({
            "transfer": "basic",
            "objects": [
                entry | {"actions": {"upload": {"href": f"{self.server.url}/stored/{entry['oid']}"}}}
                for entry in asked["objects"]
            ],
        })  # fmt: skip

    def _store(self, oid: str, body: bytes) -> None:
        self.server.objects[oid] = body
        self._answer({}, 200 if hashlib.sha256(body).hexdigest() == oid else 400)

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        entries = [json.loads(line) for line in body.decode().splitlines()]
        files: dict[str, bytes] = {}
        for entry in entries[1:]:
            value = entry["value"]
            large = entry["key"] == "lfsFile"
            files[value["path"]] = self.server.objects[value["oid"]] if large else base64.b64decode(value["content"])
        message = entries[0]["value"]["summary"]
        self.server.commits.append({"repository": name, "branch": branch, "message": message, "files": files})
        self._answer({"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    large = file["path"].endswith(".safetensors")
    return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve until the `with` block ends."""
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
