"""As much of W&B's server as its library needs to hand over a run: what `wandb sync` reads from offline files arrives
here, and a run that goes on is told what is here already."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"
KEY = "a" * 40
"""Of the form that the library demands."""


class WandbServer:
    """Keeps runs as the real one does: history lines by their offset."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, dict[int, str]] = {}
        """Run id -> number of the line -> line, of its history."""
        self.summaries: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.uploads: list[str] = []
        self.unknown: list[str] = []

    def history(self, run: str) -> list[dict[str, Any]]:
        lines = self.files.get(run, {})
        assert sorted(lines) == list(range(len(lines)))
        return [json.loads(lines[number]) for number in range(len(lines))]

    def graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = str(variables.get("name"))
        if operation == "UpsertBucket":
            self.runs.setdefault(name, {}).update({key: one for key, one in variables.items() if one is not None})
            return {"upsertBucket": {"bucket": self._bucket(name), "inserted": True}}
        if operation == "RunResumeStatus":
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
            return {"model": {**project, "bucket": self._bucket(name) if name in self.runs else None}}
        if operation == "Viewer":
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if operation == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        self.unknown.append(operation)
        return {}

    def _bucket(self, name: str) -> dict[str, Any]:
        lines = self.files.get(name, {})
        project = {"id": "p", "name": self.runs[name].get("project"), "entity": {"id": "e", "name": "me"}}
        return {
            "id": "b",
            "name": name,
            "displayName": "d",
            "description": "",
            "config": self.runs[name].get("config", "{}"),
            "sweepName": None,
            "project": project,
            "historyLineCount": len(lines),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyTail": json.dumps([lines[max(lines)]] if lines else []),
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(self.summaries.get(name, {})),
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }

    def stream(self, run: str, message: dict[str, Any]) -> None:
        for name, part in message.get("files", {}).items():
            if name == HISTORY:
                lines = self.files.setdefault(run, {})
                lines.update({part["offset"] + number: line for number, line in enumerate(part["content"])})
            elif name == SUMMARY:
                self.summaries[run] = json.loads(part["content"][-1])


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """On a free port of this machine, in a thread."""
    http = _Server(("127.0.0.1", 0), _Handler)
    http.server = WandbServer(f"http://127.0.0.1:{http.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield http.server  # type: ignore[attr-defined]
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        """A client that was killed is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None: ...

    @property
    def _kept(self) -> WandbServer:
        return self.server.server  # type: ignore[attr-defined, no-any-return]

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self._body()
        self._kept.uploads.append(self.path.removeprefix("/upload/"))
        self._reply({})

    def do_POST(self) -> None:
        raw = self._body()
        message = json.loads(raw) if raw.startswith(b"{") else {}
        if self.path == "/graphql":
            self._reply({"data": self._kept.graphql(message["operationName"], message.get("variables") or {})})
            return
        if self.path.endswith("/file_stream"):
            self._kept.stream(self.path.split("/")[-2], message)
        self._reply({})

    def _body(self) -> bytes:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw

    def _reply(self, value: Any) -> None:
        raw = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
