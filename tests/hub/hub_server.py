"""A Hub on loopback that keeps what is pushed to it: enough of the protocol for huggingface_hub and transformers.

Usage: with HubServer() as hub: run a client with `hub.environment(folder)`. Clients run in processes of their own, since
huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_me": "me", "hf_other": "other"}


@dataclass
class Repository:
    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])  # each with all of its files
    messages: list[str] = field(default_factory=lambda: ["initial commit"])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def commit(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class HubServer:
    """A server in threads of this process.

    Args:
        large: whether a file, of a repository and a name, goes to the large-file storage.

    Attributes:
        repositories: by full name.
        objects: of the large-file storage, by sha256.
        fail: called with method and path before each request; if it returns True, the connection is cut in its middle.
        log: every request that was answered, as "METHOD path".
    """

    def __init__(self, large: Any = lambda repo, name: name.endswith((".safetensors", ".png"))) -> None:
        self.large = large
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.fail: Any = lambda method, path: False
        self.log: list[str] = []
        hub = self

        class Handler(_Handler):
            server_state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: str | None = "hf_me") -> dict[str, str]:
        """For a client process with a cache of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return kept | settings | ({"HF_TOKEN": token} if token else {})


class _RefusalError(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.server_state, unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        if hub.fail(self.command, path):
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        try:
            self._route([part for part in path.split("/") if part], body)
            hub.log.append(f"{self.command} {path}")
        except _RefusalError as refused:
            self._send(refused.status, {"error": refused.code}, {"X-Error-Code": refused.code})

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, parts: list[str], body: bytes) -> None:
        match self.command, parts:
            case "GET", ["api", "whoami-v2"]:
                self._send(200, {"type": "user", "name": self._user(), "orgs": [], "auth": {"type": "access_token"}})
            case "POST", ["api", "validate-yaml"]:
                self._send(200, {"errors": [], "warnings": []})
            case "POST", ["api", "repos", "create"]:
                self._create(json.loads(body))
            case "POST", ["api", "models", owner, name, "preupload", _]:
                self._repository(owner, name, write=True)
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if self.server_state.large(f"{owner}/{name}", file["path"]) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                self._send(200, {"files": files})
            case "POST", [owner, name, "info", "lfs", "objects", "batch"]:
                self._repository(owner, name.removesuffix(".git"), write=True)
                self._send(
                    200, {"transfer": "basic", "objects": [self._upload(o) for o in json.loads(body)["objects"]]}
                )
            case "PUT", ["storage", oid]:
                if hashlib.sha256(body).hexdigest() != oid:
                    raise _RefusalError(400)
                self.server_state.objects[oid] = body
                self._send(200, {})
            case "POST", ["verify"]:
                self._send(200 if json.loads(body)["oid"] in self.server_state.objects else 404, {})
            case "POST", ["api", "models", owner, name, "commit", _]:
                self._commit(f"{owner}/{name}", self._repository(owner, name, write=True), body)
            case "GET", ["api", "models", owner, name, "tree", *_]:
                self._send(
                    200,
                    [self._entry(f"{owner}/{name}", *item) for item in self._repository(owner, name).files.items()],
                )
            case "GET", ["api", "models", owner, name, *_]:
                repository = self._repository(owner, name)
                siblings = [{"rfilename": file} for file in repository.files]
                self._send(
                    200,
                    {
                        "id": f"{owner}/{name}",
                        "sha": repository.commit,
                        "private": repository.private,
                        "siblings": siblings,
                        "tags": [],
                    },
                )
            case "GET" | "HEAD", [owner, name, "resolve", _, *file]:
                self._resolve(self._repository(owner, name), "/".join(file))
            case _:
                raise _RefusalError(404, "EntryNotFound")

    def _user(self) -> str:
        user = TOKENS.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if user is None:
            raise _RefusalError(401)
        return user

    def _repository(self, owner: str, name: str, write: bool = False) -> Repository:
        repository = self.server_state.repositories.get(f"{owner}/{name}")
        if write and self._user() != owner:
            raise _RefusalError(403)
        if repository is None or (repository.private and self._user() != owner):
            raise _RefusalError(404, "RepoNotFound")
        return repository

    def _create(self, wanted: dict[str, Any]) -> None:
        owner = wanted.get("organization") or self._user()
        if owner != self._user():
            raise _RefusalError(403)
        name = f"{owner}/{wanted['name']}"
        status = 409 if name in self.server_state.repositories else 200
        self.server_state.repositories.setdefault(name, Repository(private=wanted.get("visibility") == "private"))
        self._send(status, {"url": f"{self.server_state.url}/{name}", "name": name})

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server_state.objects:
            return wanted
        url = self.server_state.url
        return wanted | {
            "actions": {"upload": {"href": f"{url}/storage/{wanted['oid']}"}, "verify": {"href": f"{url}/verify"}}
        }

    def _commit(self, name: str, repository: Repository, body: bytes) -> None:
        files, message = dict(repository.files), ""
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server_state.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        repository.commits.append(files)
        repository.messages.append(message)
        url = f"{self.server_state.url}/{name}/commit/{repository.commit}"
        self._send(200, {"success": True, "commitOid": repository.commit, "commitUrl": url, "hookOutput": ""})

    def _entry(self, repo: str, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }
        if self.server_state.large(repo, path):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 120}
        return entry

    def _resolve(self, repository: Repository, file: str) -> None:
        headers = {"X-Repo-Commit": repository.commit}
        if file not in repository.files:
            self._send(404, {}, headers | {"X-Error-Code": "EntryNotFound"})
            return
        content = repository.files[file]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        size = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": etag}
        self._send(200, content, headers | size | {"ETag": etag})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if body is content else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
