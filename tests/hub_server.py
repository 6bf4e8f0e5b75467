"""A stand-in for the Hugging Face Hub: the HTTP interface that huggingface_hub calls to upload and to download.

It keeps models in memory, in a thread of this process. What is implemented was read in huggingface_hub 2.4:
`hf_api.py` (whoami, create_repo, model_info, tree, validate-yaml), `_commit_api.py` (preupload, commit), `lfs.py`
(batch, PUT, verify) and `file_download.py` (HEAD and GET of a file). Xet storage is not: set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standInTokenThatMustNotLeak"
USER = "alice"
_LARGE = (".safetensors", ".gguf")
"""Endings that go to large-file storage, as the hub's own `.gitattributes` says."""


@dataclass
class Stored:
    """A file of a repository."""

    content: bytes
    is_lfs: bool

    @property
    def git_hash(self) -> str:
        content = self.content
        if self.is_lfs:  # a repository holds a pointer, https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
            content = (
                b"version https://git-lfs.github.com/spec/v1\n"
                + f"oid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
            )
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_hash


@dataclass
class Repo:
    """A model repository; `commits` holds all files at each commit, oldest first."""

    private: bool
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)

    def commit(self, files: dict[str, Stored]) -> str:
        state = json.dumps([len(self.commits), {name: file.etag for name, file in files.items()}])
        oid = hashlib.sha1(state.encode()).hexdigest()
        self.commits[oid] = files
        return oid

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    @property
    def files(self) -> dict[str, Stored]:
        return self.commits[self.head]


@dataclass
class Failure:
    """An answer in place of the real one, to requests whose method and path match."""

    request: str
    """Regular expression for `POST /api/…`."""
    status: int
    body: dict[str, Any] = field(default_factory=dict)


class HubServer:
    """What the stand-in holds, and what it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        """Large-file storage: SHA-256 -> content."""
        self.requests: list[str] = []
        """Method and path of every request."""
        self.bodies: list[bytes] = []
        self.failures: list[Failure] = []
        self.before: dict[str, Callable[[], None]] = {}
        """Regular expression for a request -> what happens just before it is answered."""
        self.lost: str | None = None
        """Regular expression for requests that are done, and whose answer never arrives."""
        self.role = "write"
        self.url = ""

    def add(self, name: str, files: dict[str, bytes], *, private: bool = True) -> Repo:
        """A repository with one commit."""
        repo = self.repos[name] = Repo(private)
        repo.commit({path: Stored(content, path.endswith(_LARGE)) for path, content in files.items()})
        return repo

    def asked(self, pattern: str) -> list[str]:
        """Requests that match."""
        return [request for request in self.requests if re.search(pattern, request)]

    @property
    def uploads(self) -> list[str]:
        """Requests that change something."""
        return self.asked(r"repos/create|/commit/|^PUT")


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Runs the stand-in on a free port of this machine."""
    hub = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Error(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the screen of the tests."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(request)
        self.hub.bodies.append(self.body)
        for pattern, act in self.hub.before.items():
            if re.search(pattern, request):
                act()
        failure = next((one for one in self.hub.failures if re.search(one.request, request)), None)
        try:
            if failure is not None:
                self._json(failure.body or {"error": "made up by the test"}, status=failure.status)
                return
            for pattern, answer in _ROUTES:
                if match := re.fullmatch(pattern, request):
                    if self.hub.lost is not None and re.search(self.hub.lost, request):
                        self.wfile, self.close_connection = io.BytesIO(), True
                    answer(self, *match.groups())
                    return
            raise _Error(404, f"no such page: {request}")
        except _Error as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            self._json({"error": error.message}, status=error.status, headers=headers)

    # --- account and repository ---------------------------------------------------------------------------------------

    def whoami(self) -> None:
        self._need_token()
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": self.hub.role}}})

    def create(self) -> None:
        self._need_token()
        asked = json.loads(self.body)
        name = f"{asked['organization'] or USER}/{asked['name']}"
        if name in self.hub.repos:
            raise _Error(409, "You already created this model repo")
        if not name.startswith(f"{USER}/"):
            raise _Error(403, "You don't have the rights to create a model under this namespace")
        repo = self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=True)
        repo.private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": "1"})

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self._repo(name)
        oid = repo.head if revision in (None, "main") else revision
        siblings = [{"rfilename": path} for path in repo.commits[str(oid)]]
        self._json({"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        entries = []
        for path, file in repo.commits[repo.head if revision == "main" else revision].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.git_hash}
            if file.is_lfs:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    # --- upload -------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        import yaml

        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(match[1]) if match else None
        errors = [] if isinstance(data, dict) else [{"message": "no metadata"}]
        if isinstance(data, dict) and data.get("license", "mit") not in ("mit", "apache-2.0", "other"):
            errors.append({"message": '"license" must be one of [mit, apache-2.0, other]'})
        self._json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def preupload(self, name: str, revision: str) -> None:
        self._need_token()
        repo = self._repo(name)
        answers = []
        for file in json.loads(self.body)["files"]:
            known = repo.files.get(file["path"])
            mode = "lfs" if file["path"].endswith(_LARGE) else "regular"
            oid = None if known is None else known.etag
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def batch(self, name: str) -> None:
        self._need_token()
        self._repo(name)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            answer = dict(entry)
            if entry["oid"] not in self.hub.blobs:
                # as the hub's, the address is a key: it must be in no message
                href = f"{self.hub.url}/storage/{entry['oid']}?signature=secretSignature"
                verify = f"{self.hub.url}/api/{name}/verify"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Error(400, "the content has another checksum")
        self.hub.blobs[oid] = self.body
        self._json({})

    def verify(self, name: str) -> None:
        self._need_token()
        asked = json.loads(self.body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise _Error(422, "not uploaded")
        self._json({"success": True})

    def commit(self, name: str, revision: str) -> None:
        self._need_token()
        repo = self._repo(name)
        lines = [json.loads(line) for line in self.body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != repo.head:
            raise _Error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), is_lfs=False)
            elif line["key"] == "lfsFile":
                files[value["path"]] = Stored(self.hub.blobs[value["oid"]], is_lfs=True)
            else:
                raise _Error(400, f"not expected of a push: {line['key']}")
        oid = repo.commit(files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    # --- download -----------------------------------------------------------------------------------------------------

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        oid = repo.head if revision == "main" else revision
        file = repo.commits[oid].get(path)
        if file is None:
            raise _Error(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        self._send(file.content, headers=headers, kind="application/octet-stream")

    # --- answers ------------------------------------------------------------------------------------------------------

    @property
    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _need_token(self) -> None:
        if not self._has_token:
            raise _Error(401, "Invalid credentials in Authorization header")

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._has_token):
            raise _Error(404 if self._has_token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _json(self, value: object, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status=status, headers=headers, kind="application/json")

    def _send(self, content: bytes, *, kind: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{_NAME}", _Handler.info),
    (rf"GET /api/models/{_NAME}/revision/(.+)", _Handler.info),
    (rf"GET /api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /storage/([0-9a-f]{64})", _Handler.put),
    (rf"POST /api/{_NAME}/verify", _Handler.verify),
    (rf"POST /api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
