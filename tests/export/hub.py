"""A hub of our own for `huggingface_hub`: as much of the real one's protocol as an upload uses, and as strict.

Repositories are made by their owner alone; large files come through LFS, under their SHA-256 and with their size,
before a commit may name them; a commit is lines of JSON whose first is its header; a card's metadata is checked.
"""

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

import yaml

TOKEN, OWNER = "hf_of_ada", "ada"
_LFS = (".safetensors", ".gguf")
_RELATIONS = ("adapter", "merge", "quantized", "finetune")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Hub:
    """`repositories`: by name, whether private, and their files. `received`: sizes of bodies stored."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)
    received: list[int] = field(default_factory=list)
    verified: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)


class Refused(Exception):
    """`args`: status, what is said, and perhaps more of the answer."""


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *args: object) -> None:
            pass

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def _answer(self) -> None:
            content = self._body()
            path = self.path.partition("?")[0]
            try:
                if path.startswith("/storage/"):  # as a bucket's: signed, without the token
                    status, body = 200, _store(hub, path.removeprefix("/storage/"), content)
                elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise Refused(401, "Invalid username or password.")
                else:
                    status, body = 200, _asked(hub, self.command, path, content)
            except Refused as refusal:
                status, body = refusal.args[0], {"error": refusal.args[1], **dict(*refusal.args[2:])}
            encoded = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(encoded)))
            if status >= 400:
                self.send_header("X-Error-Message", str(body["error"]))
            self.end_headers()
            self.wfile.write(encoded)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _asked(hub: Hub, method: str, path: str, content: bytes) -> dict[str, Any]:
    if (method, path) == ("POST", "/api/repos/create"):
        return _create(hub, json.loads(content))
    if (method, path) == ("POST", "/api/validate-yaml"):
        return _card(json.loads(content))
    match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit)/main)?", path)
    lfs = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", path)
    name = (match or lfs or [None, ""])[1]
    if name not in hub.repositories:
        raise Refused(404, "Repository not found")
    if match is not None and method == "GET" and match[2] is None:
        return {"id": name, "sha": "0" * 40, "private": hub.private[name]}
    if match is not None and method == "POST" and match[2] == "preupload":
        return {"files": [_mode(each) for each in json.loads(content)["files"]]}
    if match is not None and method == "POST" and match[2] == "commit":
        return _commit(hub, name, content)
    if lfs is not None and method == "POST":
        return _batch(hub, name, json.loads(content)) if lfs[2] == "batch" else _verify(hub, json.loads(content))
    raise Refused(404, f"no {method} {path}")


def _create(hub: Hub, asked: dict[str, Any]) -> dict[str, Any]:
    name = f"{asked.get('organization') or OWNER}/{asked['name']}"
    if not _NAME.fullmatch(name):
        raise Refused(400, f"{name} is no name")
    if not name.startswith(f"{OWNER}/"):
        raise Refused(403, f"You don't have the rights to create a model under the namespace {name.partition('/')[0]}")
    if name in hub.repositories:
        raise Refused(409, "You already created this model repo", {"url": f"{hub.url}/{name}", "name": name})
    hub.repositories[name], hub.private[name] = {}, asked.get("private") is True or asked.get("visibility") == "private"
    return {"url": f"{hub.url}/{name}", "name": name}


def _card(asked: dict[str, Any]) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
    metadata = yaml.safe_load(match[1]) if match else {}
    errors = []
    if (base := metadata.get("base_model")) is not None and not _NAME.fullmatch(str(base)):
        errors.append({"message": f'"base_model[0]" with value "{base}" is not valid. Use a model id'})
    if metadata.get("base_model_relation", "finetune") not in _RELATIONS:
        errors.append({"message": '"base_model_relation" must be one of ' + ", ".join(_RELATIONS)})
    if not all(isinstance(tag, str) for tag in metadata.get("tags", [])):
        errors.append({"message": '"tags" must be an array of strings'})
    if errors:
        raise Refused(400, "Invalid metadata", {"errors": errors, "warnings": []})
    return {"errors": [], "warnings": []}


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    base64.b64decode(file["sample"], validate=True)
    mode = "lfs" if file["path"].endswith(_LFS) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def _batch(hub: Hub, name: str, asked: dict[str, Any]) -> dict[str, Any]:
    if asked["operation"] != "upload" or asked["hash_algo"] != "sha256" or "basic" not in asked["transfers"]:
        raise Refused(400, "not a batch")
    objects = []
    for each in asked["objects"]:
        actions = {
            "upload": {"href": f"{hub.url}/storage/{each['oid']}-{each['size']}"},
            "verify": {"href": f"{hub.url}/{name}.git/info/lfs/objects/verify"},
        }
        there = {} if each["oid"] in hub.storage else {"actions": actions}
        objects.append({"oid": each["oid"], "size": each["size"], "authenticated": True, **there})
    return {"transfer": "basic", "objects": objects}


def _store(hub: Hub, key: str, content: bytes) -> dict[str, Any]:
    oid, _, size = key.partition("-")
    if hashlib.sha256(content).hexdigest() != oid or len(content) != int(size):
        raise Refused(400, "BadDigest")
    hub.storage[oid] = content
    hub.received.append(len(content))
    return {}


def _verify(hub: Hub, asked: dict[str, Any]) -> dict[str, Any]:
    if len(hub.storage.get(asked["oid"], b"")) != asked["size"]:
        raise Refused(404, "Object does not exist")
    hub.verified.add(asked["oid"])
    return {}


def _commit(hub: Hub, name: str, content: bytes) -> dict[str, Any]:
    header, *operations = [json.loads(line) for line in content.splitlines()]
    if header["key"] != "header" or not header["value"]["summary"]:
        raise Refused(400, "a commit begins with its header")
    files = dict(hub.repositories[name])
    for each in operations:
        value = each["value"]
        if each["key"] == "lfsFile" and value["oid"] in hub.verified and value["algo"] == "sha256":
            files[value["path"]] = hub.storage[value["oid"]]
        elif each["key"] == "file" and value["encoding"] == "base64" and not value["path"].endswith(_LFS):
            files[value["path"]] = base64.b64decode(value["content"], validate=True)
        else:
            raise Refused(400, f"{each['key']} of {value['path']} cannot be committed")
    hub.repositories[name] = files
    hub.messages.append(header["value"]["summary"])
    return {"success": True, "commitOid": "1" * 40, "commitUrl": f"{hub.url}/{name}/commit/{'1' * 40}"}
