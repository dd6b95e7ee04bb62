"""A small Hugging Face Hub on the loopback interface, for the real, unpatched client.

It speaks the part of the Hub's HTTP protocol that pushing and pulling needs: repositories, branches and tags,
`preupload`, the LFS batch API, commits as ndjson, listings of files, and `resolve` with the headers that the client's
cache relies on. Faults are injected by rules.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LFS_ENDINGS = (".safetensors", ".bin", ".tar")
LICENCES = (None, "mit", "apache-2.0", "cc-by-4.0", "other")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """Commits (hash -> path -> content), and the branches and tags that point to them."""

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[tuple[str, str]] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        files = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.commit(files, "main", "initial commit")

    def commit(self, tree: dict[str, bytes], ref: str, message: str) -> str:
        what = [len(self.messages), self.refs.get(ref), message, sorted((path, git_sha(d)) for path, d in tree.items())]
        sha = hashlib.sha1(repr(what).encode()).hexdigest()
        self.commits[sha], self.refs[ref] = tree, sha
        self.messages.append((sha, message))
        return sha

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision) or self.tags.get(revision)


@dataclass
class Fault:
    """What to do with requests ("GET /path?query") that match `pattern`: answer with `status`, or change the file.

    `change` is "corrupt" (one bit off) or "short" (half of the file, with a Content-Length that says so).
    """

    pattern: str
    status: int = 0
    change: str = ""


class HubServer:
    """The Hub.

    Attributes:
        endpoint: the value for `HF_ENDPOINT`.
        tokens: token -> user; a user may write everywhere and reads private repositories.
        readers: tokens that may read private repositories, and write nothing.
        requests: (method, path with query) of every request.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.tokens: dict[str, str] = {"hf_writer": "org"}
        self.readers: set[str] = {"hf_reader"}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def repo(self, name: str, kind: str = "model", **options: bool) -> Repo:
        """The repository, made if it does not exist."""
        return self.repos.setdefault((kind, name), Repo(kind, name, **options))

    def put(self, name: str, files: dict[str, bytes], kind: str = "model", ref: str = "main") -> str:
        """Commit files to a repository; returns the commit's hash."""
        repo = self.repo(name, kind)
        return repo.commit({**repo.commits[repo.refs[ref]], **files}, ref, "put")

    @contextmanager
    def faulty(self, pattern: str, status: int = 0, change: str = "") -> Iterator[None]:
        fault = Fault(pattern, status, change)
        self.faults.append(fault)
        try:
            yield
        finally:
            self.faults.remove(fault)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self.body = self.read_body()
        self.hub.requests.append((self.command, self.path))
        self.fault = next((f for f in self.hub.faults if re.search(f.pattern, f"{self.command} {self.path}")), None)
        if self.fault is not None and self.fault.status:
            return self.answer(self.fault.status, {"error": "injected"})
        self.route()

    do_GET = do_POST = do_PUT = do_HEAD

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status: int, obj: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(obj).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        change = self.fault.change if self.fault is not None and status == 200 else ""
        if change == "corrupt":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if change == "short":
            data = data[: len(data) // 2]
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def error(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    # ---- routes and rights -------------------------------------------------------------------------------------

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    @property
    def user(self) -> str | None:
        return self.hub.tokens.get(self.token)

    def route(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        match parts:
            case ["api", "repos", "create"]:
                self.create()
            case ["api", "validate-yaml"]:
                self.validate()
            case ["api", "models" | "datasets" as kind, org, name, *rest]:
                self.api(kind[:-1], f"{org}/{name}", *rest)
            case [*kind, org, name, "info", "lfs", "objects", "batch"]:
                self.batch("dataset" if kind else "model", f"{org}/{name.removesuffix('.git')}")
            case ["lfs", oid]:
                self.hub.lfs[oid] = self.body
                self.send(200, b"", {})
            case ["datasets" as kind, org, name, "resolve", revision, *path]:
                self.resolve(kind[:-1], f"{org}/{name}", revision, "/".join(path))
            case [org, name, "resolve", revision, *path]:
                self.resolve("model", f"{org}/{name}", revision, "/".join(path))
            case _:
                self.answer(404, {"error": f"no route {self.path}"})

    def open(self, kind: str, name: str, write: bool = False) -> Repo | None:
        """The repository, or None after an error has been sent."""
        repo = self.hub.repos.get((kind, name))
        known = self.user is not None or self.token in self.hub.readers
        if self.token and not known:
            self.error(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and not known):
            # The Hub does not tell a private repository from one that is missing.
            self.error(404 if known else 401, "RepoNotFound", "Repository not found")
        elif write and self.user is None:
            self.error(403 if known else 401, "", "You need a token with write access")
        else:
            return repo
        return None

    def api(self, kind: str, name: str, what: str = "", *rest: str) -> None:
        repo = self.open(kind, name, what in ("commit", "preupload", "branch"))
        if repo is None:
            return None
        if what == "branch":
            repo.refs[rest[0]] = repo.refs["main"]
            return self.answer(201, {})
        revision = rest[0] if rest else "main"
        sha = repo.find(revision)
        if sha is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        tree = repo.commits[sha]
        entries = [self.entry(path, data) for path, data in sorted(tree.items())]
        if what in ("", "revision"):
            siblings = [{"rfilename": e["path"], "blobId": e["oid"], **e} for e in entries]
            facts = {"id": repo.name, "sha": sha, "private": repo.private, "siblings": siblings}
            return self.answer(200, {**facts, "gated": "manual" if repo.gated else False})
        if what == "tree":
            return self.answer(200, entries)
        if what == "preupload":
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            modes = {path: "lfs" if path.endswith(LFS_ENDINGS) else "regular" for path in paths}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            return self.answer(200, {"files": files})
        return self.commit(repo, revision)

    @staticmethod
    def entry(path: str, data: bytes) -> dict[str, Any]:
        facts = {"type": "file", "path": path, "size": len(data), "oid": git_sha(data)}
        if path.endswith(LFS_ENDINGS):
            facts["lfs"] = {"oid": sha256(data), "sha256": sha256(data), "size": len(data), "pointerSize": 134}
        return facts

    # ---- writing -----------------------------------------------------------------------------------------------

    def create(self) -> None:
        wanted = json.loads(self.body)
        kind, owner = wanted.get("type") or "model", wanted.get("organization") or self.user
        if self.user is None:
            known = self.token in self.hub.readers
            return self.error(403 if known else 401, "", "You don't have the rights to create a repository")
        name = f"{owner}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.hub.repos:
            return self.answer(409, {"error": "You already created this repo", "url": url})
        self.hub.repo(name, kind, private=bool(wanted.get("private") or wanted.get("visibility") == "private"))
        self.answer(200, {"url": url, "name": name})

    def validate(self) -> None:
        match = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        good = match is not None and yaml.safe_load(match[1]).get("license") in LICENCES
        errors = [] if good else [{"message": '"license" must be one of [mit, apache-2.0, ...]'}]
        self.answer(200 if good else 400, {"errors": errors, "warnings": []})

    def batch(self, kind: str, name: str) -> None:
        if self.open(kind, name, write=True) is not None:
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}", "header": {}}}}
                for wanted in json.loads(self.body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo: Repo, revision: str) -> None:
        tree, summary = dict(repo.commits[repo.refs[revision]]), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    summary = value["summary"]
                case "file":
                    tree[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    tree[value["path"]] = self.hub.lfs[value["oid"]]
                case "deletedFile":
                    del tree[value["path"]]
        sha = repo.commit(tree, revision, summary)
        page = f"{self.hub.endpoint}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.name}"
        self.answer(200, {"commitUrl": f"{page}/commit/{sha}", "commitOid": sha, "success": True})

    # ---- reading -----------------------------------------------------------------------------------------------

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self.open(kind, name)
        if repo is None:
            return None
        if repo.gated and self.user is None:
            return self.error(403 if self.token else 401, "GatedRepo", f"Access to model {name} is restricted")
        sha = repo.find(revision)
        if sha is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in repo.commits[sha]:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha}
            return self.answer(404, {"error": "Entry not found"}, headers)
        data = repo.commits[sha][path]
        etag = sha256(data) if path.endswith(LFS_ENDINGS) else git_sha(data)
        begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))  # a download goes on
        part = data[int(begin[1]) :] if begin else data
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if begin:
            headers["Content-Range"] = f"bytes {begin[1]}-{len(data) - 1}/{len(data)}"
        self.send(206 if begin else 200, part, headers)
