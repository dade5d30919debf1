"""A Hugging Face Hub of one process on 127.0.0.1: as much of its interface as adapters need. For tests."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories: name -> path -> bytes; `requests` lists what was asked, `private` what a made one was."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.private: dict[str, bool] = {}
        self.url = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content for one request."""
        self.requests.append(f"{method} {path}")
        if (method, path) == ("POST", "/api/repos/create"):
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in self.repositories:
                return 409, {}, json.dumps({"error": "exists", "url": f"{self.url}/{name}"}).encode()
            self.repositories[name] = {".gitattributes": b""}
            self.private[name] = asked.get("private") or asked.get("visibility") == "private"
            return 200, {}, json.dumps({"url": f"{self.url}/{name}", "name": name}).encode()
        api, parts = path.startswith("/api/models/"), path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        files = self.repositories.get(name)
        if files is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if rest and rest[0] == "resolve" and not api:
            content = files.get("/".join(rest[2:]))
            if content is None:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            etag = hashlib.sha1(content).hexdigest()
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, content
        if rest[:1] == ["preupload"]:
            asked = [file["path"] for file in json.loads(body)["files"]]
            return (
                200,
                {},
                json.dumps(
                    {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]}
                ).encode(),
            )
        if rest[:1] == ["commit"]:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            return (
                200,
                {},
                json.dumps({"commitOid": COMMIT, "commitUrl": f"{self.url}/{name}/commit/{COMMIT}"}).encode(),
            )
        listed = [{"rfilename": p} for p in files]
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        return 200, {}, json.dumps({"id": name, "sha": COMMIT, "siblings": listed}).encode()


@contextmanager
def small_hub() -> Iterator[Hub]:
    """A running hub; `HF_ENDPOINT=hub.url` makes `huggingface_hub` use it."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, content = hub.answer(self.command, urlsplit(self.path).path, body)
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = respond

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
