"""A Kubernetes API made up for tests: it keeps what is put there, and gives what Knative would have made of it.

CONSTRUCTED: no cluster said any of this. What it stores must fit Kubernetes' and Knative's schemas, as a real server's
admission would have it; statuses are written here, in the shape of the CRDs' status.
"""

import copy
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import yaml

from knapper.cluster.api import path_of
from knapper.cluster.kustomize import Object
from tests.manifests import schema


class Cluster:
    """Objects by path. `asked`: what was sent, as (method, path, query)."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.asked: list[tuple[str, str, dict[str, list[str]]]] = []
        self.forbidden: set[str] = set()  # resources that whoever asks may not touch
        self.texts: dict[str, str] = {}  # what proxied pods answer

    def put(self, *things: Object) -> None:
        for thing in things:
            self.objects[path_of(thing)] = copy.deepcopy(thing)

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any, kind: str) -> tuple[int, Any]:
        self.asked.append((method, path, query))
        if path == "/version":
            return 200, {"major": "1", "minor": "34", "gitVersion": "v1.34.9"}
        if path.endswith("/selfsubjectaccessreviews"):
            allowed = body["spec"]["resourceAttributes"]["resource"] not in self.forbidden
            return 201, {**body, "status": {"allowed": allowed}}
        if path in self.texts:
            return 200, self.texts[path]
        if method == "GET":
            return self._read(path, query)
        if method == "PATCH" and kind == "application/apply-patch+yaml":
            return self._apply(path, body, dry="dryRun" in query)
        if method == "PATCH":
            return self._merge(path, body)
        return (200, {"kind": "Status", "status": "Success"}) if self.objects.pop(path, None) else self._missing(path)

    def _read(self, path: str, query: dict[str, list[str]]) -> tuple[int, Any]:
        if path in self.objects:
            return 200, self.objects[path]
        below = [self.objects[each] for each in sorted(self.objects) if each.rpartition("/")[0] == path]
        if not below and not any(each.startswith(f"{path}/") for each in self.objects) and "knative" in path:
            return self._missing(path)  # no such kind
        for selector in query.get("labelSelector", []):
            key, equal, value = selector.partition("=")
            below = [
                each for each in below
                if (labels := each["metadata"].get("labels", {})) is not None
                and key in labels and (not equal or labels[key] == value)
            ]  # fmt: skip
        return 200, {"kind": "List", "items": below}

    def _apply(self, path: str, body: Object, *, dry: bool) -> tuple[int, Any]:
        if schema.CRDS is not None and (errors := list(schema.errors(body))):
            return 422, {"kind": "Status", "message": errors[0]}
        before = self.objects.get(path, {})
        after = {**before, **copy.deepcopy(body)}
        if not dry:
            self.objects[path] = after
        return 200, after

    def _merge(self, path: str, body: Object) -> tuple[int, Any]:
        if path not in self.objects:
            return self._missing(path)
        data = self.objects[path].setdefault("data", {})
        for key, value in body["data"].items():
            if value is None:
                data.pop(key, None)
            else:
                data[key] = value
        return 200, self.objects[path]

    @staticmethod
    def _missing(path: str) -> tuple[int, Any]:
        return 404, {"kind": "Status", "code": 404, "message": f"{path} not found"}


@contextmanager
def serving(cluster: Cluster, directory: Path) -> Iterator[Path]:
    """A kubeconfig that leads to the cluster."""

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            address = urlparse(self.path)
            size = int(self.headers.get("Content-Length") or 0)
            data = self.rfile.read(size)
            body = json.loads(data) if data else None
            kind = self.headers.get("Content-Type", "")
            status, said = cluster.answer(self.command, address.path, parse_qs(address.query), body, kind)
            sent = said.encode() if isinstance(said, str) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_PATCH = do_POST = do_DELETE = _do

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "me", "user": {"token": "made-up"}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
    }  # fmt: skip
    path = directory / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    try:
        yield path
    finally:
        server.shutdown()
        server.server_close()


def ready(thing: Object, replicas: int = 0, reason: str = "", message: str = "") -> list[Object]:
    """The object with a status, and for a Service the revision behind it: ready, or failing for a reason."""
    condition = {"type": "Ready", "status": "False", "reason": reason, "message": message}
    thing = copy.deepcopy(thing)
    thing["status"] = {"conditions": [condition if reason else {"type": "Ready", "status": "True"}]}
    if thing["apiVersion"] != "serving.knative.dev/v1":
        return [thing]
    name = f"{thing['metadata']['name']}-00001"
    thing["status"]["latestReadyRevisionName"] = name
    active = {"type": "Active", "status": "True" if replicas else "False", "reason": "" if replicas else "NoTraffic"}
    revision = {
        "apiVersion": "serving.knative.dev/v1", "kind": "Revision",
        "metadata": {"name": name, "namespace": thing["metadata"]["namespace"]},
        "spec": thing["spec"]["template"]["spec"],
        "status": {"conditions": [{"type": "Ready", "status": "True"}, active], "actualReplicas": replicas},
    }  # fmt: skip
    return [thing, revision]


def healthy(objects: list[Object], knative: list[Object]) -> Cluster:
    """A cluster on which an overlay runs, cold, with Knative as knative/cluster wants it."""
    cluster = Cluster()
    cluster.put(*knative)
    for part, name in (("serving", "activator"), ("eventing", "eventing-controller")):
        cluster.put({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {
                "name": name, "namespace": f"knative-{part}", "labels": {"app.kubernetes.io/version": "1.22.1"}
            },
            "spec": {"template": {"spec": {"terminationGracePeriodSeconds": 3600}}},
        })  # fmt: skip
    for name in (
        "services.serving.knative.dev", "revisions.serving.knative.dev", "brokers.eventing.knative.dev",
        "triggers.eventing.knative.dev", "pingsources.sources.knative.dev", "inmemorychannels.messaging.knative.dev",
    ):  # fmt: skip
        crd = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": name}}
        cluster.put(crd)
    for thing in objects:
        knatives = re.search(r"(serving|eventing|sources)\.knative\.dev", thing["apiVersion"])
        cluster.put(*(ready(thing) if knatives else [thing]))
    return cluster
