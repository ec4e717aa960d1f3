"""The API that tests are given refuses what a real one refuses: else they would prove less than they seem to."""

import inspect
from typing import Any

import kubernetes
import pytest
import yaml

from tests.cluster.apiserver import BUILT_IN, KNATIVE, Cluster, crd
from tests.manifests import schema

APPLY, MERGE = "application/apply-patch+yaml", "application/merge-patch+json"
MAP = "/api/v1/namespaces/here/configmaps/one"
ONE = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "one", "namespace": "here"}, "data": {"a": "b"}}
OTHER = {**ONE, "metadata": {"name": "one", "namespace": "nowhere"}}
OURS = {"fieldManager": ["us"]}


@pytest.fixture
def cluster() -> Cluster:
    cluster = Cluster()
    cluster.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "here"}}, ONE)
    return cluster


@pytest.mark.parametrize(
    ("method", "path", "query", "body", "kind", "status"),
    [
        ("PATCH", MAP, OURS, ONE, APPLY, 200),
        ("PATCH", MAP, {}, ONE, APPLY, 400),  # whose the fields are must be said
        ("PATCH", MAP, {**OURS, "dryRun": ["true"]}, ONE, APPLY, 400),
        ("PATCH", MAP, {**OURS, "dry": ["All"]}, ONE, APPLY, 400),
        ("PATCH", f"{MAP}s", OURS, ONE, APPLY, 400),  # another name than the object's
        ("PATCH", MAP, OURS, {**ONE, "data": {"a": 1}}, APPLY, 422),
        ("PATCH", MAP, OURS, {**ONE, "unknown": {}}, APPLY, 422),
        ("PATCH", MAP.replace("here", "nowhere"), OURS, OTHER, APPLY, 404),
        ("PATCH", MAP, {}, {"data": {"a": None, "c": "d"}}, MERGE, 200),
        ("PATCH", MAP, {}, {"data": {"a": 1}}, MERGE, 422),
        ("PATCH", f"{MAP}s", {}, {"data": {}}, MERGE, 404),
        ("PATCH", MAP, {}, {"data": {}}, "application/json", 415),
        ("PUT", MAP, {}, ONE, "application/json", 405),
        ("POST", MAP, {}, ONE, "application/json", 405),
        ("GET", "/api/v1/namespaces/here/configmaps", {"labelSelector": ["a in (b)"]}, None, "", 400),
        ("GET", "/api/v1/namespaces/here/configmaps", {"selector": ["a=b"]}, None, "", 400),
        ("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", {}, {"spec": {}}, "application/json", 400),
        ("DELETE", MAP, {"gracePeriodSeconds": ["0"]}, None, "", 200),
        ("DELETE", f"{MAP}s", {}, None, "", 404),
        ("GET", f"{MAP}s", {}, None, "", 404),
        ("GET", "/api/v1/configmaps/one", {}, None, "", 404),  # it lies in a namespace
        ("GET", "/api/v1/namespaces/here/configmap", {}, None, "", 404),  # no such kind
        ("GET", "/apis/serving.knative.dev/v1", {}, None, "", 404),
        ("GET", "/apis/apps/v1", {}, None, "", 200),
        ("POST", "/apis/apps/v1", {}, {}, "application/json", 404),
    ],
)  # fmt: skip
def test_a_request_is_taken_or_refused_as_kubernetes_does(
    cluster: Cluster, method: str, path: str, query: dict[str, list[str]], body: Any, kind: str, status: int
) -> None:
    assert cluster.answer(method, path, query, body, kind)[0] == status
    if method == "PATCH" and kind == MERGE and status == 200:
        assert cluster.objects[MAP]["data"] == {"c": "d"}
    elif method != "DELETE":
        assert cluster.objects[MAP] == ONE


def test_it_has_the_paths_of_kubernetes() -> None:
    """Those that the generated client, made from Kubernetes' own description, has too."""
    for root, kind in BUILT_IN:
        name = "CoreV1Api" if root == "/api/v1" else f"{root.split('/')[2].partition('.')[0].title()}V1Api"
        theirs = inspect.getsource(getattr(kubernetes.client, name))
        plural, namespaced = BUILT_IN[root, kind]
        assert f"resource_path='{root}{'/namespaces/{namespace}' if namespaced else ''}/{plural}'" in theirs, kind


@pytest.mark.skipif(schema.CRDS is None, reason="no directory knative-crds beside the checkout")
def test_it_has_the_kinds_of_knative() -> None:
    assert schema.CRDS
    theirs = {
        thing["metadata"]["name"]: thing["spec"]
        for path in schema.CRDS.rglob("*.yaml") for thing in yaml.safe_load_all(path.read_text(encoding="utf-8"))
        if thing and thing["kind"] == "CustomResourceDefinition"
    }  # fmt: skip
    for name, kind in KNATIVE.items():
        ours, said = crd(name, kind)["spec"], theirs[name]
        assert (ours["group"], ours["scope"]) == (said["group"], said["scope"])
        assert ours["names"].items() <= said["names"].items()
        assert "v1" in {each["name"] for each in said["versions"] if each["served"]}
