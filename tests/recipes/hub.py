"""A stand-in of the hub: repositories of small files, over HTTP, on this machine."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_secretOfTheTests"
Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Holds every version of every repository, by its number."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.versions: dict[str, dict[str, Files]] = {}
        self.private: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def files(self, name: str) -> Files:
        """Return the files of a repository's newest version."""
        return [*self.versions[name].values()][-1]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        if self.headers["authorization"] != f"Bearer {TOKEN}":
            self.refuse(401, "Invalid credentials in Authorization header")
        elif self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path.endswith("/preupload/main"):
            files = [{"path": file["path"]} for file in json.loads(body)["files"]]
            more = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [file | more for file in files]})
        else:
            self.commit("/".join(self.path.split("/")[3:5]), body)

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.versions:
            self.refuse(409, "You already created this model repo", url=f"{self.server.url}/{name}")
            return
        self.server.versions[name] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.server.private.add(name)
        self.answer({"url": f"{self.server.url}/{name}"})

    def commit(self, name: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        versions = self.server.versions[name]
        before = self.server.files(name) if versions else {}
        oid = hashlib.sha1(body).hexdigest()
        versions[oid] = before | added
        self.answer({"commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        known = self.headers["authorization"] == f"Bearer {TOKEN}"
        versions = self.server.versions.get(name)
        if versions is None or (name in self.server.private and not known):
            self.refuse(401, "", "RepoNotFound")
            return
        asked = parts[5] if len(parts) > 5 else parts[3] if parts[0] != "api" else "main"
        oid = ([*versions] or [""])[-1] if asked == "main" else asked
        if oid not in versions and versions:
            self.refuse(404, "", "RevisionNotFound")
        elif "tree" in parts:
            found = versions[oid].items()
            self.answer(
                [{"type": "file", "oid": _sha(x), "size": len(x), "path": p} for p, x in found]
            )
        elif "resolve" in parts:
            content = versions[oid][parts[4]]
            self.send(200, content, {"X-Repo-Commit": oid, "ETag": f'"{_sha(content)}"'})
        else:
            is_private = name in self.server.private
            files = [{"rfilename": path} for path in versions.get(oid, {})]
            self.answer({"id": name, "sha": oid, "private": is_private, "siblings": files})

    do_HEAD = do_GET

    def answer(self, content: Any) -> None:
        self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, message: str, code: str = "", **content: str) -> None:
        said = {"X-Error-Message": message} if message else {}
        self.send(
            status, json.dumps(content).encode(), said | ({"X-Error-Code": code} if code else {})
        )

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def standing() -> Iterator[Hub]:
    """Run a hub while the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
