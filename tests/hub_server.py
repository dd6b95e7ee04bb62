"""A small Hugging Face Hub on the loopback interface, for the real, unpatched client.

It speaks the part of the Hub's HTTP protocol that pushing and pulling takes: repositories, branches, tags and pull
requests, ``preupload``, the LFS batch API with upload and verification, commits as ndjson, trees, path infos, and
``resolve`` with the headers that the client's cache lives on. Large files are served by a second server, as the Hub
hands them to a CDN: the client must not send its token there.

Faults are injected by rule: a status with headers, or a body that is cut off or altered.
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
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KINDS = {"models": "model", "datasets": "dataset"}
LFS_ENDINGS = (".safetensors", ".bin", ".tar", ".parquet", ".zip")


@dataclass
class Blob:
    """A file's content; ``lfs`` says how the Hub stores it."""

    data: bytes
    lfs: bool

    @property
    def git_sha(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_sha

    def info(self, path: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_sha}
        if self.lfs:
            facts["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return facts


def listing(tree: dict[str, Blob]) -> list[dict[str, Any]]:
    """Every folder and file of a commit, as the Hub lists them."""
    folders = {str(parent) for path in tree for parent in PurePosixPath(path).parents} - {"."}
    entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
    return sorted([*entries, *(blob.info(path) for path, blob in tree.items())], key=lambda entry: entry["path"])


def below(path: str, folder: str, deep: bool) -> bool:
    inside = path.startswith(f"{folder}/") if folder else True
    return inside and (deep or "/" not in path[len(folder) :].strip("/"))


@dataclass
class Repo:
    """Commits (each with its whole tree), and names that point to them."""

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[tuple[str, str]] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "main", "initial commit")

    def commit(self, tree: dict[str, Blob], ref: str, message: str) -> str:
        what = f"{len(self.messages)} {self.refs.get(ref)} {message} {sorted((p, b.etag) for p, b in tree.items())}"
        sha = hashlib.sha1(what.encode()).hexdigest()
        self.commits[sha] = tree
        self.messages.append((sha, message))
        self.refs[ref] = sha
        return sha

    def find(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.refs.get(revision) or self.tags.get(revision)


@dataclass
class Fault:
    """What to do with requests ("GET /path?query") that match ``pattern``, ``times`` times (None: always)."""

    pattern: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    # "status"; or of a body: "truncate" (half of it, then closed), "cut" (nothing of it), "short" (half of it, and a
    # Content-Length that says so), "corrupt" (one bit off).
    mode: str = "status"
    times: int | None = None


class HubServer:
    """The Hub and its CDN, each on a port of its own.

    Attributes:
        endpoint: for ``HF_ENDPOINT``.
        tokens: token -> user; a user may write everywhere and reads what is private.
        readers: tokens that may read what is private, and write nothing.
        faults: rules, the first that matches counts.
        requests: (method, path with query, whether an authorization was sent) of every request.
        bare: answer as small servers do that speak just enough of the protocol: no list of files, no judge of cards,
            404 without a reason, ETags that are hashes of something else.
    """

    bare = False

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.tokens: dict[str, str] = {"hf_writer": "org"}
        self.readers: set[str] = {"hf_reader"}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, bool]] = []
        self.lock = threading.Lock()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler(place)) for place in (_Hub, _Cdn)]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def _handler(self, place: type[_Handler]) -> type[_Handler]:
        return type(place.__name__, (place,), {"hub": self})

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def repo(self, name: str, kind: str = "model", **options: bool) -> Repo:
        """The repository, made where there is none."""
        return self.repos.setdefault((kind, name), Repo(kind, name, **options))

    def put(self, name: str, files: dict[str, bytes], kind: str = "model", ref: str = "main") -> str:
        """A commit that adds files; returns its hash."""
        repo = self.repo(name, kind)
        tree = dict(repo.commits[repo.refs[ref]])
        tree.update({path: Blob(data, path.endswith(LFS_ENDINGS)) for path, data in files.items()})
        return repo.commit(tree, ref, "put")

    @contextmanager
    def faulty(self, *faults: Fault) -> Iterator[None]:
        self.faults[:0] = faults
        try:
            yield
        finally:
            self.faults = [fault for fault in self.faults if fault not in faults]

    def fault_of(self, method: str, target: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if re.search(fault.pattern, f"{method} {target}") and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self.serve()

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD

    def serve(self) -> None:
        self.body = self.read_body()
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        self.segments = [unquote(part) for part in parts.path.strip("/").split("/")]
        self.fault = self.hub.fault_of(self.command, self.path)
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path, "authorization" in self.headers))
        if self.fault is not None and self.fault.mode == "status":
            return self.answer(self.fault.status, {"error": "injected"}, self.fault.headers)
        self.handle_request()

    def handle_request(self) -> None:
        raise NotImplementedError

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, obj: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(obj).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        mode = self.fault.mode if self.fault is not None and status in (200, 206) else ""
        if mode == "corrupt" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if mode == "short":
            data = data[: len(data) // 2]
        length = len(data)
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(key, value)
        if mode in ("truncate", "cut"):
            data = data[: length // 2 if mode == "truncate" else 0]
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_file(self, data: bytes, headers: dict[str, str]) -> None:
        """With ranges, as the client resumes what was cut off."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and 0 < int(match[1]) < len(data):
            start = int(match[1])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            return self.send(206, data[start:], headers)
        self.send(200, data, headers)


class _Cdn(_Handler):
    """Where large files lie; its addresses are signed, so that they need no token."""

    def handle_request(self) -> None:
        oid = self.segments[-1]
        if self.segments[0] == "upload" and self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                return self.answer(400, {"error": "wrong hash"})
            self.hub.lfs[oid] = self.body
            return self.send(200, b"", {"ETag": f'"{oid}"'})
        if self.query.get("Signature") != ["secret"] or oid not in self.hub.lfs:
            return self.answer(403, {"error": "not signed"})
        self.send_file(self.hub.lfs[oid], {"ETag": f'"{oid}"'})


class _Hub(_Handler):
    """The Hub itself."""

    # ---- who, and what may they --------------------------------------------------------------------------------

    @property
    def user(self) -> str | None:
        return self.hub.tokens.get(self.token)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def error(self, status: int, code: str, message: str) -> None:
        if self.hub.bare:
            return self.send(status, b"", {})
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def open(self, kind: str, name: str, write: bool = False) -> Repo | None:
        """The repository, or None after the error has been sent."""
        repo = self.hub.repos.get((kind, name))
        known = self.user is not None or self.token in self.hub.readers
        if self.token and not known:
            self.answer(
                401,
                {"error": "Invalid credentials"},
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            )
        elif repo is None or (repo.private and not known):
            # The Hub does not tell a private repository from one that is missing.
            self.error(404 if known else 401, "RepoNotFound", "Repository not found")
        elif write and self.user is None:
            self.answer(403 if known else 401, {"error": "You need a token with write access"})
        else:
            return repo
        return None

    # ---- routes ------------------------------------------------------------------------------------------------

    def handle_request(self) -> None:
        route, method = self.route, self.command
        if (method, route) == ("POST", "/api/repos/create"):
            return self.create()
        if (method, route) == ("POST", "/api/validate-yaml"):
            return self.send(404, b"", {}) if self.hub.bare else self.validate()
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", route):
            return self.batch("dataset" if match[1] else "model", match[2])
        if route == "/lfs/verify":
            wanted = json.loads(self.body)
            good = len(self.hub.lfs.get(wanted["oid"], b"")) == wanted["size"]
            return self.answer(200 if good else 404, {})
        parts = self.segments
        if parts[0] == "api" and len(parts) >= 4 and parts[1] in KINDS:
            return self.api(KINDS[parts[1]], f"{parts[2]}/{parts[3]}", parts[4] if len(parts) > 4 else "", parts[5:])
        kind = "dataset" if parts[0] == "datasets" else "model"
        parts = parts[1:] if kind == "dataset" else parts
        if len(parts) >= 5 and parts[2] == "resolve":
            return self.resolve(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        self.answer(404, {"error": f"no route {route}"})

    def api(self, kind: str, name: str, what: str, rest: list[str]) -> None:
        write = what in ("commit", "preupload", "branch", "tag") and "create_pr" not in self.query
        repo = self.open(kind, name, write)
        if repo is None:
            return None
        if what == "branch":
            return self.new_ref(repo, rest[0], json.loads(self.body or b"{}").get("startingPoint", "main"), repo.refs)
        if what == "tag":
            return self.new_ref(repo, json.loads(self.body)["tag"], rest[0], repo.tags)
        if what == "refs":
            return self.answer(
                200,
                {
                    key: [{"name": n, "ref": f"refs/{key}/{n}", "targetCommit": sha} for n, sha in table.items()]
                    for key, table in (("branches", repo.refs), ("tags", repo.tags), ("converts", {}))
                },
            )
        revision = rest[0] if rest else "main"
        sha = repo.find(revision)
        if sha is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        tree = repo.commits[sha]
        if what in ("", "revision"):
            return self.answer(200, self.info(repo, sha, "blobs" in self.query))
        if what == "tree":
            folder = "/".join(rest[1:])
            if folder and not any(entry["path"] == folder for entry in listing(tree)):
                return self.error(404, "EntryNotFound", f"{folder} does not exist")
            deep = self.query.get("recursive", ["false"])[0].lower() == "true"
            return self.answer(200, [entry for entry in listing(tree) if below(entry["path"], folder, deep)])
        if what == "paths-info":
            wanted = parse_qs(self.body.decode()).get("paths", [])
            return self.answer(200, [entry for entry in listing(tree) if entry["path"] in wanted])
        if what == "preupload":
            return self.preupload(tree)
        if what == "commit":
            return self.commit(repo, revision)
        self.answer(404, {"error": f"no route {self.route}"})

    def info(self, repo: Repo, sha: str, with_blobs: bool) -> dict[str, Any]:
        siblings = []
        for path, blob in () if self.hub.bare else sorted(repo.commits[sha].items()):
            entry: dict[str, Any] = {"rfilename": path}
            if with_blobs:
                entry.update(size=len(blob.data), blobId=blob.git_sha)
                if blob.lfs:
                    entry["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": 134}
            siblings.append(entry)
        card = repo.commits[sha].get("README.md")
        library = re.search(rb"^library_name: (\S+)$", card.data, re.MULTILINE) if card else None
        facts = {"id": repo.name, "sha": sha, "private": repo.private, "gated": "manual" if repo.gated else False}
        facts |= {"siblings": siblings, "tags": [], "downloads": 0, "disabled": False}
        return {**facts, "library_name": library[1].decode()} if library else facts

    def new_ref(self, repo: Repo, name: str, start: str, table: dict[str, str]) -> None:
        sha = repo.find(start)
        if sha is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {start}")
        if name in table:
            return self.answer(409, {"error": "Reference already exists"})
        table[name] = sha
        self.answer(201, {})

    # ---- writing -----------------------------------------------------------------------------------------------

    def create(self) -> None:
        wanted = json.loads(self.body)
        kind, owner = wanted.get("type") or "model", wanted.get("organization") or self.user
        if self.user is None:
            known = self.token in self.hub.readers
            return self.answer(403 if known else 401, {"error": "You don't have the rights to create a repository"})
        name = f"{owner}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.hub.repos:
            return self.answer(409, {"error": "You already created this repo", "url": url})
        self.hub.repo(name, kind, private=bool(wanted.get("private") or wanted.get("visibility") == "private"))
        self.answer(200, {"url": url, "name": name})

    def validate(self) -> None:
        """As the Hub: metadata has to be there, and the licence one that it knows."""
        import yaml

        match = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        data = yaml.safe_load(match[1]) if match else None
        errors, warnings = [], []
        if not data:
            warnings.append({"message": "empty or missing yaml metadata in repo card"})
        elif data.get("license") not in (None, "mit", "apache-2.0", "cc-by-4.0", "other"):
            errors.append({"message": '"license" must be one of [mit, apache-2.0, ...]'})
        elif data.get("license") == "other" and not data.get("license_name"):
            errors.append({"message": '"license_name" is required'})
        self.answer(400 if errors else 200, {"errors": errors, "warnings": warnings})

    def preupload(self, tree: dict[str, Blob]) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_ENDINGS) else "regular",
                "shouldIgnore": False,
                **({"oid": tree[file["path"]].etag} if file["path"] in tree else {}),
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, kind: str, name: str) -> None:
        if self.open(kind, name, write=True) is None:
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.cdn}/upload/{wanted['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.endpoint}/lfs/verify"},
                }
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo: Repo, revision: str) -> None:
        if revision not in repo.refs:
            return self.error(404, "RevisionNotFound", f"{revision} is no branch")
        tree, summary = dict(repo.commits[repo.refs[revision]]), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                summary = value["summary"]
            elif item["key"] == "file":
                assert value["encoding"] == "base64"
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return self.answer(400, {"error": f"LFS object {value['oid']} was not uploaded"})
                tree[value["path"]] = Blob(self.hub.lfs[value["oid"]], True)
            elif item["key"] == "deletedFile":
                del tree[value["path"]]
            else:
                return self.answer(400, {"error": f"unknown key {item['key']}"})
        pull = "create_pr" in self.query
        number = sum(name.startswith("refs/pr/") for name in repo.refs) + 1
        sha = repo.commit(tree, f"refs/pr/{number}" if pull else revision, summary)
        page = f"{self.hub.endpoint}/{'datasets/' if repo.kind == 'dataset' else ''}{repo.name}"
        answer = {"commitUrl": f"{page}/commit/{sha}", "commitOid": sha, "success": True}
        self.answer(200, {**answer, "pullRequestUrl": f"{page}/discussions/{number}"} if pull else answer)

    # ---- reading -----------------------------------------------------------------------------------------------

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self.open(kind, name)
        if repo is None:
            return None
        if repo.gated and self.user is None:
            status = 403 if self.token else 401
            return self.error(status, "GatedRepo", f"Access to model {name} is restricted; ask for access")
        sha = repo.find(revision)
        if sha is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in repo.commits[sha]:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": sha}
            return self.send(404, b"", {}) if self.hub.bare else self.answer(404, {"error": "Entry not found"}, headers)
        blob = repo.commits[sha][path]
        etag = hashlib.sha256(b"of something else" + blob.data).hexdigest() if self.hub.bare else blob.etag
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if not blob.lfs:
            return self.send_file(blob.data, headers)
        self.hub.lfs.setdefault(blob.sha256, blob.data)
        headers |= {
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(blob.data)),
            "Location": f"{self.hub.cdn}/objects/{blob.sha256}?Signature=secret",
        }
        self.send(302, b"", headers)
