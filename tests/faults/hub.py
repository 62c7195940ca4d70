"""A hub on this machine, with its own faults: real sockets, which huggingface_hub asks through HF_ENDPOINT."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlparse

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """One repository, ``org/tiny``, at one commit. ``answers`` come first: (status, headers, body), each once."""

    folder: Path
    answers: ClassVar[list[tuple[int, dict[str, str], bytes]]]
    forever: tuple[int, dict[str, str], bytes] | None = None
    stall_after: int | None = None  # bytes of a safetensors file, after which nothing more comes
    stalled: threading.Event

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        if "/org/tiny" not in path:
            self.answer(404, {}, b"")
        elif self.answers:
            self.answer(*self.answers.pop(0))
        elif self.forever:
            self.answer(*self.forever)
        elif "/tree/" in path:
            self.answer(200, {}, json.dumps([row(file) for file in sorted(self.folder.iterdir())]).encode())
        elif path.startswith("/api/models/"):
            self.answer(200, {}, json.dumps({"id": "org/tiny", "sha": COMMIT}).encode())
        else:
            file = self.folder / path.rpartition("/")[2]
            headers = {"ETag": f'"{hashed(file)}"', "X-Repo-Commit": COMMIT}
            self.answer(200, headers, file.read_bytes(), stall=file.suffix == ".safetensors")

    def answer(self, status, headers, body, stall=False):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if stall and self.stall_after is not None:
            self.wfile.write(body[: self.stall_after])
            self.wfile.flush()
            self.stalled.set()
            threading.Event().wait(30)
            return
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def hashed(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def row(file: Path) -> dict[str, object]:
    size = file.stat().st_size
    lfs = {"oid": hashed(file), "size": size, "pointerSize": 134}
    return {"type": "file", "path": file.name, "size": size, "oid": "0" * 40, "lfs": lfs}


@contextmanager
def serving(folder: Path) -> Iterator[tuple[type[Hub], str]]:
    """The hub's handler, whose attributes may be set, and its address."""
    handler = type("Serving", (Hub,), {"folder": folder, "answers": [], "stalled": threading.Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield handler, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
