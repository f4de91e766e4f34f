"""A Hugging Face Hub on this machine: as much of it as creating, uploading and downloading need, over real HTTP."""

import base64
import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import huggingface_hub
import pytest

OWNER, TOKEN = "me", "hf_secret"


class Hub(http.server.BaseHTTPRequestHandler):
    """Files of 1,000 bytes or less are sent within the commit, larger ones as LFS objects."""

    files: dict[str, bytes]  # "owner/name/path" -> content
    commits: list[str]  # their messages
    stored: dict[str, bytes]  # LFS objects by their SHA-256
    refuses: set[str]  # parts of paths that are answered with 403
    asked: list[str]

    def do_HEAD(self) -> None:
        self._download(with_body=False)

    def do_GET(self) -> None:
        self._download(with_body=True)

    def do_PUT(self) -> None:
        self.stored[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        self.asked.append(self.path)
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if any(part in self.path for part in self.refuses):
            return self._answer({"error": "You have no right to do this."}, 403)
        for part, act in self._actions().items():
            if part in self.path:
                return self._answer(act(body))
        return self._answer({"error": f"no {self.path} here"}, 404)

    def _actions(self) -> dict[str, Callable[[bytes], dict[str, Any]]]:
        return {
            "/api/repos/create": self._create,
            "/api/validate-yaml": lambda body: {"warnings": [], "errors": []},
            "/preupload/": self._choose,
            "/info/lfs/objects/batch": self._invite,
            "/commit/": self._commit,
        }

    def _create(self, body: bytes) -> dict[str, Any]:
        wanted = json.loads(body)
        return {"url": f"{self._address()}/{wanted['organization'] or OWNER}/{wanted['name']}"}

    def _choose(self, body: bytes) -> dict[str, Any]:
        modes = {file["path"]: "lfs" if file["size"] > 1000 else "regular" for file in json.loads(body)["files"]}
        return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}

    def _invite(self, body: bytes) -> dict[str, Any]:
        objects = json.loads(body)["objects"]
        actions = [{"upload": {"href": f"{self._address()}/lfs/{wanted['oid']}", "header": {}}} for wanted in objects]
        return {"transfer": "basic", "objects": [o | {"actions": a} for o, a in zip(objects, actions, strict=True)]}

    def _commit(self, body: bytes) -> dict[str, Any]:
        repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[f"{repository}/{value['path']}"] = base64.b64decode(value["content"])
            else:
                self.files[f"{repository}/{value['path']}"] = self.stored[value["oid"]]
        revision = "0" * 40
        return {"commitUrl": f"{self._address()}/{repository}/commit/{revision}", "commitOid": revision}

    def _download(self, with_body: bool) -> None:
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        content = self.files.get(f"{repository}/{rest.partition('/')[2]}")
        self.send_response(404 if content is None else 200)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if with_body and content:
            self.wfile.write(content)

    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, value: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[type[Hub]]:
    """Run the hub in the place of huggingface.co."""
    handler = type("LocalHub", (Hub,), {"files": {}, "commits": [], "stored": {}, "refuses": set(), "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)  # what HF_ENDPOINT sets at import
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # LFS over HTTP
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()
