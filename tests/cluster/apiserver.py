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
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlparse

import yaml

from knapper.cluster.kustomize import Object, identity
from tests.manifests import schema

# What a server without CRDs has, as far as it is asked for here: (path of its group, kind) -> (plural, in a namespace).
BUILT_IN: Final[dict[tuple[str, str], tuple[str, bool]]] = {
    ("/api/v1", "ConfigMap"): ("configmaps", True),
    ("/api/v1", "Namespace"): ("namespaces", False),
    ("/api/v1", "Node"): ("nodes", False),
    ("/api/v1", "Pod"): ("pods", True),
    ("/api/v1", "Service"): ("services", True),
    ("/api/v1", "ServiceAccount"): ("serviceaccounts", True),
    ("/apis/apiextensions.k8s.io/v1", "CustomResourceDefinition"): ("customresourcedefinitions", False),
    ("/apis/apps/v1", "Deployment"): ("deployments", True),
    ("/apis/authorization.k8s.io/v1", "SelfSubjectAccessReview"): ("selfsubjectaccessreviews", False),
    ("/apis/networking.k8s.io/v1", "NetworkPolicy"): ("networkpolicies", True),
    ("/apis/policy/v1", "PodDisruptionBudget"): ("poddisruptionbudgets", True),
    ("/apis/resource.k8s.io/v1", "ResourceSlice"): ("resourceslices", False),
}
# What Knative's CRDs say: plural and group, and kind.
KNATIVE: Final[dict[str, str]] = {
    "services.serving.knative.dev": "Service", "revisions.serving.knative.dev": "Revision",
    "brokers.eventing.knative.dev": "Broker", "triggers.eventing.knative.dev": "Trigger",
    "pingsources.sources.knative.dev": "PingSource", "inmemorychannels.messaging.knative.dev": "InMemoryChannel",
}  # fmt: skip

# What each kind of request may say beside its path.
_QUERIES: Final[dict[tuple[str, str], set[str]]] = {
    ("GET", ""): {"labelSelector"},
    ("PATCH", "application/apply-patch+yaml"): {"fieldManager", "force", "dryRun"},
    ("DELETE", ""): {"gracePeriodSeconds"},
}


class Cluster:
    """Objects by path. `asked`: what was sent, as (method, path, query)."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.asked: list[tuple[str, str, dict[str, list[str]]]] = []
        self.forbidden: set[str] = set()  # resources that whoever asks may not touch
        self.texts: dict[str, str] = {}  # what proxied pods answer
        self.broken: set[str] = set()  # paths that are answered by 503
        self.version = "v1.36.2"

    def put(self, *things: Object) -> None:
        for thing in things:
            self.objects[self.path_of(thing)] = copy.deepcopy(thing)

    def path_of(self, thing: Object) -> str:
        """Where the object is, by what is served; KeyError if its kind is not."""
        _, kind, namespace, name = identity(thing)
        root = _root(thing["apiVersion"])
        plural, namespaced = self._kinds()[root, kind]
        assert namespaced == bool(namespace), f"{kind} {name}: namespace {namespace!r}"
        return f"{root}{f'/namespaces/{namespace}' if namespaced else ''}/{plural}/{name}"

    def _kinds(self) -> dict[tuple[str, str], tuple[str, bool]]:
        """What is served: it grows and shrinks with the CRDs."""
        specs = [each["spec"] for path, each in self.objects.items() if "/customresourcedefinitions/" in path]
        return BUILT_IN | {
            (f"/apis/{spec['group']}/{version['name']}", spec["names"]["kind"]): (
                spec["names"]["plural"], spec["scope"] == "Namespaced"
            )
            for spec in specs for version in spec["versions"] if version["served"]
        }  # fmt: skip

    def _discovery(self, path: str) -> Any:
        """What a server says of its kinds, at the paths where it does: one at a time, unless asked for all."""
        roots = {root for root, _ in self._kinds()}
        if path == "/apis":
            groups: dict[str, list[dict[str, str]]] = {}
            for root in sorted(roots - {"/api/v1"}):
                group, version = root.removeprefix("/apis/").split("/")
                groups.setdefault(group, []).append({"groupVersion": f"{group}/{version}", "version": version})
            listed = [{"name": name, "versions": all_, "preferredVersion": all_[0]} for name, all_ in groups.items()]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
        if path not in roots:
            return None
        resources = []
        for (root, kind), (plural, namespaced) in sorted(self._kinds().items()):
            if root == path:
                about = {"kind": kind, "namespaced": namespaced, "singularName": "", "verbs": ["get", "list", "patch"]}
                resources += [{"name": plural, **about}, {"name": f"{plural}/status", **about}]
        version = path.removeprefix("/apis/").removeprefix("/api/")
        return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}

    def _serves(self, path: str) -> str:
        """Whether the path is of all ("list") or of one ("object") of a kind that is served; empty if of neither."""
        for (root, _), (plural, namespaced) in self._kinds().items():
            where = f"{root}/namespaces/[^/]+/{plural}" if namespaced else f"{root}/{plural}"
            if match := re.fullmatch(f"{where}(/[^/]+)?", path):
                return "object" if match[1] else "list"
        return ""

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any, kind: str) -> tuple[int, Any]:
        self.asked.append((method, path, query))
        if unknown := set(query) - _QUERIES.get((method, kind), set()):
            return self._wrong(400, f"{method} {path}: {', '.join(sorted(unknown))}")
        if path in self.broken:
            return self._wrong(503, "the server is currently unable to handle the request")
        if path == "/version":
            return 200, {"major": "1", "minor": self.version.split(".")[1], "gitVersion": self.version}
        if path.endswith("/selfsubjectaccessreviews"):
            return self._review(method, body, kind)
        if path in self.texts:
            return 200, self.texts[path]
        if method == "GET" and (said := self._discovery(path)):
            return 200, said
        if not self._serves(path):
            return 404, "404 page not found\n"
        match method, kind:
            case "GET", "":
                return self._read(path, query)
            case "PATCH", "application/apply-patch+yaml":
                return self._apply(path, body, query)
            case "PATCH", "application/merge-patch+json":
                return self._merge(path, body)
            case "DELETE", "":
                gone = self.objects.pop(path, None)
                return (200, {"kind": "Status", "status": "Success"}) if gone else self._missing(path)
            case "PATCH", _:
                return self._wrong(415, f"the body of the request was in an unknown format: {kind}")
        return self._wrong(405, f"the server does not allow this method on the requested resource: {method} {path}")

    def _review(self, method: str, body: Any, kind: str) -> tuple[int, Any]:
        if (method, kind) != ("POST", "application/json"):
            return self._wrong(405, method)
        if not {"apiVersion", "kind"} <= body.keys():
            return self._wrong(400, "Object 'Kind' is missing")
        if errors := list(schema.errors({**body, "metadata": {}, "status": {"allowed": False}})):
            return self._wrong(400, errors[0])
        return 201, {
            **body,
            "status": {"allowed": body["spec"]["resourceAttributes"]["resource"] not in self.forbidden},
        }

    def _read(self, path: str, query: dict[str, list[str]]) -> tuple[int, Any]:
        if path in self.objects:
            return 200, self.objects[path]
        if self._serves(path) == "object":
            return self._missing(path)
        below = [self.objects[each] for each in sorted(self.objects) if each.rpartition("/")[0] == path]
        for selector in query.get("labelSelector", []):
            for wanted in selector.split(","):
                if not re.fullmatch(r"[A-Za-z0-9._/-]+(=[A-Za-z0-9._-]*)?", wanted):
                    return self._wrong(400, f"unable to parse requirement: {wanted}")
                key, equal, value = wanted.partition("=")
                below = [
                    each for each in below
                    if key in (labels := each["metadata"].get("labels", {})) and (not equal or labels[key] == value)
                ]  # fmt: skip
        return 200, {"kind": "List", "apiVersion": "v1", "items": [_item(each) for each in below]}

    def _apply(self, path: str, body: Object, query: dict[str, list[str]]) -> tuple[int, Any]:
        if not query.get("fieldManager"):
            return self._wrong(400, "PatchOptions.meta.k8s.io is invalid: fieldManager: is required for apply patch")
        if query.get("dryRun", ["All"]) != ["All"] or query.get("force", ["true"]) not in (["true"], ["false"]):
            return self._wrong(400, f"dryRun and force: {query}")
        if self.path_of(body) != path:
            return self._wrong(400, f"the object is {self.path_of(body)}, and not {path}")
        namespace = body["metadata"].get("namespace")
        if namespace and f"/api/v1/namespaces/{namespace}" not in self.objects:
            return self._wrong(404, f'namespaces "{namespace}" not found')
        if errors := self._errors(body):
            return self._wrong(422, errors[0])
        after = {**self.objects.get(path, {}), **copy.deepcopy(body)}
        if "dryRun" not in query:
            self.objects[path] = after
        return 200, after

    def _merge(self, path: str, body: Object) -> tuple[int, Any]:
        if path not in self.objects:
            return self._missing(path)
        after = _merged(self.objects[path], body)
        if self.path_of(after) != path:
            return self._wrong(400, "the name of the object does not match the name on the URL")
        if errors := self._errors(after):
            return self._wrong(422, errors[0])
        self.objects[path] = after
        return 200, after

    @staticmethod
    def _errors(thing: Object) -> list[str]:
        """Against the schemas that are there: Kubernetes' always are."""
        knatives = "knative.dev" in thing["apiVersion"]
        return list(schema.errors(thing)) if schema.CRDS is not None or not knatives else []

    @staticmethod
    def _wrong(code: int, message: str) -> tuple[int, Any]:
        return code, {"kind": "Status", "code": code, "message": message}

    @staticmethod
    def _missing(path: str) -> tuple[int, Any]:
        return 404, {"kind": "Status", "code": 404, "message": f"{path} not found"}


def _root(api_version: str) -> str:
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"


def _item(thing: Object) -> Object:
    """As lists have it: what Kubernetes itself defines does not say there what it is."""
    if (_root(thing["apiVersion"]), thing["kind"]) not in BUILT_IN:
        return thing
    return {key: value for key, value in thing.items() if key not in ("apiVersion", "kind")}


def crd(name: str, kind: str, scope: str = "Namespaced", version: str = "v1") -> Object:
    plural, _, group = name.partition(".")
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": name},
        "spec": {
            "group": group, "scope": scope, "names": {"plural": plural, "kind": kind},
            "versions": [{"name": version, "served": True, "storage": True}],
        },
    }  # fmt: skip


def _merged(before: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    after = dict(before) if isinstance(before, dict) else {}
    for key, value in patch.items():
        if value is None:
            after.pop(key, None)
        else:
            after[key] = _merged(after.get(key), value)
    return after


@contextmanager
def serving(cluster: Cluster, directory: Path) -> Iterator[Path]:
    """A kubeconfig that leads to the cluster."""

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            address = urlparse(self.path)
            size = int(self.headers.get("Content-Length") or 0)
            data = self.rfile.read(size)
            body = json.loads(data) if data else None
            kind = self.headers.get("Content-Type", "") if data else ""
            if self.headers.get("Authorization") != "Bearer made-up":
                status, said = Cluster._wrong(401, "Unauthorized")
            else:
                path = unquote(address.path)
                status, said = cluster.answer(self.command, path, parse_qs(address.query), body, kind)
            sent = said.encode() if isinstance(said, str) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if isinstance(said, str) else "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_PATCH = do_POST = do_PUT = do_DELETE = _do

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
    cluster.put(*(crd(*each) for each in KNATIVE.items()))
    cluster.put(*knative)
    maps = "/api/v1/namespaces/knative-serving/configmaps"
    cluster.objects[f"{maps}/config-deployment"]["data"]["queue-sidecar-image"] = "queue@sha256:0"
    for part, name in (("serving", "activator"), ("eventing", "eventing-controller")):
        cluster.put({
            "apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": {
                "name": name, "namespace": f"knative-{part}", "labels": {"app.kubernetes.io/version": "1.23.0"}
            },
            "spec": {"template": {"spec": {"terminationGracePeriodSeconds": 600}}},
        })  # fmt: skip
    for thing in objects:
        knatives = re.search(r"(serving|eventing|sources)\.knative\.dev", thing["apiVersion"])
        cluster.put(*(ready(thing) if knatives else [thing]))
    return cluster
