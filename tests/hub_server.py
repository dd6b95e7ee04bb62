"""The part of the Hub's protocol that a push, a list and a download need, on the loopback interface."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download

# The second name is that of versions before 1.
close_session = getattr(huggingface_hub.utils, "close_session", None) or huggingface_hub.utils.reset_sessions


class HubServer:
    """Repositories of files by commit or tag; the last commit of a repository is `main`."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, name: str, files: dict[str, bytes]) -> str:
        """Commit files to a repository, which is made if missing; returns the commit."""
        commits = self.repos.setdefault(name, {})
        tree = {**commits.get("main", {}), **files}
        sha = hashlib.sha1(repr((len(commits), sorted(tree.items()))).encode()).hexdigest()
        commits["main"] = commits[sha] = tree
        return sha


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        match parts:
            case ["api", "repos", "create"]:
                wanted = json.loads(body)
                name = f"{wanted.get('organization') or 'org'}/{wanted['name']}"
                if name not in self.hub.repos:
                    self.hub.put(name, {".gitattributes": b""})
                    if wanted.get("private") or wanted.get("visibility") == "private":
                        self.hub.private.add(name)
                self.answer({"url": f"{self.hub.endpoint}/{name}", "name": name})
            case ["api", "validate-yaml"]:
                self.answer({"errors": [], "warnings": []})
            case ["api", "models"]:
                self.answer([self.facts(name, "main") for name in self.hub.repos])
            case ["api", "models", org, name, *rest]:
                self.api(f"{org}/{name}", body, *rest)
            case [org, name, "resolve", revision, *path]:
                self.resolve(f"{org}/{name}", revision, "/".join(path))
            case _:
                self.fail("no route", "")

    do_GET = do_POST = do_HEAD

    def api(self, name: str, body: bytes, what: str = "", revision: str = "main", *_: str) -> None:
        if revision not in self.hub.repos.get(name, ()):
            return self.fail("Repository not found", "RepoNotFound")
        if what == "preupload":
            files = [{"uploadMode": "regular", "shouldIgnore": False, **f} for f in json.loads(body)["files"]]
            return self.answer({"files": files})
        if what == "commit":
            items = [json.loads(line) for line in body.splitlines()]
            files = {i["value"]["path"]: base64.b64decode(i["value"]["content"]) for i in items if i["key"] == "file"}
            sha = self.hub.put(name, files)
            page = f"{self.hub.endpoint}/{name}/commit/{sha}"
            return self.answer({"commitUrl": page, "commitOid": sha, "success": True})
        facts = self.facts(name, revision)
        return self.answer([{"type": "file", **f} for f in facts["siblings"]] if what == "tree" else facts)

    def facts(self, name: str, revision: str) -> dict:
        tree = self.hub.repos[name][revision]
        siblings = [{"rfilename": p, "path": p, "size": len(d), "oid": self.git(d)} for p, d in tree.items()]
        private = name in self.hub.private
        return {"id": name, "sha": self.commit(name, revision), "private": private, "siblings": siblings}

    def commit(self, name: str, revision: str) -> str:
        commits = self.hub.repos[name]
        return next(sha for sha, tree in commits.items() if len(sha) == 40 and tree is commits[revision])

    @staticmethod
    def git(data: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def resolve(self, name: str, revision: str, path: str) -> None:
        if revision not in self.hub.repos.get(name, ()):
            return self.fail("Repository not found", "RepoNotFound")
        if path not in self.hub.repos[name][revision]:
            return self.fail("Entry not found", "EntryNotFound")
        data = self.hub.repos[name][revision][path]
        self.send(200, data, {"X-Repo-Commit": self.commit(name, revision), "ETag": f'"{self.git(data)}"'})

    def answer(self, obj: object) -> None:
        self.send(200, json.dumps(obj).encode(), {"Content-Type": "application/json"})

    def fail(self, message: str, code: str) -> None:
        self.send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A new Hub for each test; the client's settings are as if read from the environment at its import."""
    hub = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # which has a copy of it before version 1
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    huggingface_hub.utils.disable_progress_bars()
    close_session()
    yield hub
    hub.close()
    close_session()
