"""The doctor finds what was broken, names the command, and calls nothing good that it could not see.

Both servers are constructed: Kubernetes' in apiserver.py, Google's here.
"""

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from knapper.cluster.api import Api
from knapper.cluster.doctor import examine
from knapper.cluster.findings import DoctorTarget, Finding
from knapper.cluster.google import Google
from knapper.cluster.installation import kubernetes_ends, support_ends
from tests.cluster.apiserver import Cluster, crd, ready, serving
from tests.cluster.test_deploy import knapper
from tests.manifests.rendering import ROOT

TODAY = date(2026, 11, 28)
CONFIG = "/api/v1/namespaces/knative-serving/configmaps"
SERVICE = "/apis/serving.knative.dev/v1/namespaces/knapper/services"
EVENTING = "/apis/eventing.knative.dev/v1/namespaces/knapper"


def look(cluster: Cluster, directory: Path, google: Google | None = None) -> list[Finding]:
    with serving(cluster, directory) as kubeconfig:
        more = [google.examine] if google else []
        return list(examine(DoctorTarget(Api.open(kubeconfig), ROOT, TODAY, more=more)))


def test_a_healthy_cluster_has_nothing_wrong(cluster: Cluster, tmp_path: Path) -> None:
    found = look(cluster, tmp_path)
    assert [each for each in found if each.verdict == "wrong"] == []
    assert [each.subject for each in found if each.verdict == "unknown"] == ["GPU nvidia-l4"]  # no node while idle
    assert len(found) > 40


def template(cluster: Cluster, name: str = "train-step") -> Any:
    return cluster.objects[f"{SERVICE}/{name}"]["spec"]["template"]


OPERATED = {
    "apiVersion": "operator.knative.dev/v1beta1", "kind": "KnativeServing",
    "metadata": {"name": "knative-serving", "namespace": "knative-serving"}, "spec": {},
}  # fmt: skip


def by_operator(cluster: Cluster) -> Any:
    """The flags of a Knative that its operator installed."""
    cluster.put(crd("knativeservings.operator.knative.dev", "KnativeServing", version="v1beta1"), OPERATED)
    return cluster.objects[f"{CONFIG}/config-features"]["data"]


def release(cluster: Cluster, version: str) -> Any:
    """The labels by which Serving says its version."""
    activator = cluster.objects["/apis/apps/v1/namespaces/knative-serving/deployments/activator"]
    activator["metadata"]["labels"]["app.kubernetes.io/version"] = version
    return activator["metadata"]["labels"]


def node(name: str, allocatable: dict[str, str]) -> Any:
    labels = {"cloud.google.com/gke-accelerator": "nvidia-l4"} if "nvidia.com/gpu" in allocatable else {}
    status = {"allocatable": allocatable}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}, "status": status}


def budget(name: str, namespace: str, allowed: int, healthy: int = 1) -> Any:
    """As Knative's come, with what Kubernetes says of one replica."""
    return {
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": name, "namespace": namespace},
        "spec": {"minAvailable": "80%"} if not allowed else {"maxUnavailable": 1},
        "status": {
            "expectedPods": 1, "currentHealthy": healthy, "desiredHealthy": 1 - allowed, "disruptionsAllowed": allowed,
        },
    }  # fmt: skip


def nodes(count: int) -> list[Any]:
    return [node(f"node-{number}", {"cpu": "32", "memory": "64Gi"}) for number in range(count)]


def of_four_gpus(cluster: Cluster, *nodes: Any) -> None:
    """The pods of train-step, beside these nodes."""
    cluster.put(*nodes)
    template(cluster)["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = "4"


# What is broken, what is said of, and a word of the command that mends it.
BROKEN: dict[str, tuple[Callable[[Cluster], object], str, str]] = {
    "a flag": (
        lambda cluster: cluster.objects[f"{CONFIG}/config-features"]["data"].pop("kubernetes.podspec-fieldref"),
        "config-features kubernetes.podspec-fieldref", "--patch-file knative/cluster/configmaps/features.yaml",
    ),
    "zero at first": (
        lambda cluster: cluster.objects[f"{CONFIG}/config-autoscaler"]["data"].update(
            {"allow-zero-initial-scale": "false"}
        ),
        "config-autoscaler allow-zero-initial-scale", "kubectl patch configmap config-autoscaler",
    ),
    "a Kubernetes past its end": (
        lambda cluster: setattr(cluster, "version", "v1.34.9"), "Kubernetes", "upgrade the cluster",
    ),
    "a pod that fits on no node of its pool": (
        lambda cluster: cluster.put(
            node("a", {"cpu": "32", "memory": "64Gi"}),
            node("b", {"cpu": "32", "memory": "1Gi", "nvidia.com/gpu": "1"}),
        ),
        "Service sample requests", "resources.requests",
    ),
    "a pod of four GPUs where nodes have one": (
        lambda cluster: of_four_gpus(cluster, node("b", {"cpu": "32", "memory": "64Gi", "nvidia.com/gpu": "1"})),
        "GPU nvidia-l4", "accelerators_per_node = 4",
    ),
    "an old Knative": (lambda cluster: release(cluster, "1.17.0"), "Knative Serving", "docs/cluster-trial.md"),
    "a Knative past its end": (
        lambda cluster: release(cluster, "1.22.1"), "Knative Serving",
        "upgrade, one minor version at a time: kubectl apply -f",
    ),
    "a Knative past its end, with the operator": (
        lambda cluster: (by_operator(cluster), release(cluster, "1.22.1")), "Knative Serving",
        "upgrade, one minor version at a time: kubectl apply --server-side -k knative/cluster/operator",
    ),
    "a flag, with the operator": (
        lambda cluster: by_operator(cluster).pop("kubernetes.podspec-fieldref"),
        "config-features kubernetes.podspec-fieldref", "kubectl apply --server-side -k knative/cluster/operator",
    ),
    "a key that an apply dropped": (
        lambda cluster: cluster.objects[f"{CONFIG}/config-deployment"]["data"].pop("queue-sidecar-image"),
        "config-deployment queue-sidecar-image", "serving-core.yaml",
    ),
    "a driver that loses mounts": (
        lambda cluster: setattr(cluster, "version", "v1.36.4-gke.2000000"), "Cloud Storage FUSE", "1.36.5-gke.1032000",
    ),
    "GPUs that are given away twice": (
        lambda cluster: cluster.put(
            node("a", {"cpu": "32", "memory": "64Gi", "nvidia.com/gpu": "1"}),
            {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {"name": "a"},
             "spec": {"driver": "gpu.nvidia.com", "nodeName": "a"}},
        ),
        "Node a GPUs", "device plugin",
    ),
    "a node that cannot be drained": (
        lambda cluster: cluster.put(
            *nodes(2), budget("activator-pdb", "knative-serving", allowed=0),
            budget("webhook-pdb", "knative-serving", allowed=1),
            budget("eventing-webhook", "knative-eventing", allowed=0, healthy=0),
        ),
        "PodDisruptionBudget activator-pdb", "kubectl patch pdb activator-pdb -n knative-serving --type merge -p",
    ),
    "a node that cannot be drained, with the operator": (
        lambda cluster: cluster.put(
            *nodes(2), budget("3scale-kourier-gateway-pdb", "kourier-system", allowed=0),
            crd("knativeservings.operator.knative.dev", "KnativeServing", version="v1beta1"), OPERATED,
        ),
        "PodDisruptionBudget 3scale-kourier-gateway-pdb", "kubectl apply --server-side -k knative/cluster/operator",
    ),
    "a pod that fits nowhere": (
        lambda cluster: cluster.put(node("a", {"cpu": "100m", "memory": "64Gi"})),
        "Service gateway requests", "resources.requests",
    ),
    "no Eventing": (
        lambda cluster: cluster.objects.pop(
            "/apis/apps/v1/namespaces/knative-eventing/deployments/eventing-controller"
        ),
        "Knative Eventing", "docs/cluster-trial.md",
    ),
    "a kind that is missing": (
        lambda cluster: cluster.objects.pop(
            "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/pingsources.sources.knative.dev"
        ),
        "kind pingsources.sources.knative.dev", "docs/cluster-trial.md",
    ),
    "no permission": (lambda cluster: cluster.forbidden.add("triggers"), "permission to patch triggers", "rolebinding"),
    "a Service that is not ready": (
        lambda cluster: cluster.put(*ready(cluster.objects[f"{SERVICE}/sample"], reason="ContainerMissing")),
        "Service sample", "kubectl describe ksvc",
    ),
    "no ceiling": (
        lambda cluster: template(cluster)["metadata"]["annotations"].pop("autoscaling.knative.dev/max-scale"),
        "Service train-step max-scale", "apply",
    ),
    "a second gateway that the first cannot reach": (
        lambda cluster: (
            template(cluster, "gateway")["metadata"]["annotations"].update({"autoscaling.knative.dev/max-scale": "2"}),
            template(cluster, "gateway")["spec"]["containers"][0].pop("env"),
        ),
        "Service gateway max-scale", "set max-scale to 1",
    ),
    "an image of nobody's": (
        lambda cluster: template(cluster, "gateway")["spec"]["containers"][0].update(image="PROJECT_ID/x"),
        "Service gateway image", "30-functions",
    ),
    "a short deadline": (
        lambda cluster: template(cluster)["metadata"]["annotations"].update(
            {"serving.knative.dev/progress-deadline": "120s"}
        ),
        "Service train-step progress deadline", "progress-deadline",
    ),
    "a probe without patience": (
        lambda cluster: template(cluster)["spec"]["containers"][0]["startupProbe"].update(failureThreshold=3),
        "Service train-step start-up probe", "startupProbe",
    ),
    "an activator that dies first": (
        lambda cluster: cluster.objects["/apis/apps/v1/namespaces/knative-serving/deployments/activator"]["spec"][
            "template"
        ]["spec"].update(terminationGracePeriodSeconds=300),
        "activator grace", "kubectl patch deployment activator",
    ),
    "retries shorter than a cold start": (
        lambda cluster: cluster.objects[f"{EVENTING}/triggers/sample"]["spec"]["delivery"].update(retry=5),
        "Trigger sample retries", "delivery.retry",
    ),
    "a Broker that makes callers wait": (
        lambda cluster: cluster.objects[f"{EVENTING}/brokers/knapper"]["metadata"]["annotations"].pop(
            "messaging.knative.dev/async-handler"
        ),
        "Broker knapper async-handler", "delete the Broker",
    ),
    "no tick": (
        lambda cluster: cluster.objects.pop("/apis/sources.knative.dev/v1/namespaces/knapper/pingsources/tick"),
        "PingSource", "kubectl apply",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_found_alone_with_its_command(what: str, cluster: Cluster, tmp_path: Path) -> None:
    break_, subject, command = BROKEN[what]
    break_(cluster)
    wrong = [each for each in look(cluster, tmp_path) if each.verdict == "wrong"]
    assert [each.subject for each in wrong] == {
        "no permission": [f"permission to {verb} triggers.eventing.knative.dev" for verb in ("patch", "delete")],
        "a pod that fits on no node of its pool": [subject, "Service train-step requests"],
        "a kind that is missing": [subject, "PingSource"],  # without the kind there is none of it
    }.get(what, [subject])
    assert command in wrong[0].remedy


def test_the_only_node_need_not_be_drained(cluster: Cluster, tmp_path: Path) -> None:
    cluster.put(*nodes(1), budget("activator-pdb", "knative-serving", allowed=0))
    assert [each for each in look(cluster, tmp_path) if "Disruption" in each.subject] == []


def _pod(name: str, service: str, **status: Any) -> Any:
    labels = {"app.kubernetes.io/part-of": "knapper", "app.kubernetes.io/name": service}
    metadata = {"name": name, "namespace": "knapper", "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": {"phase": "Running", **status}}


def test_a_model_that_cannot_be_served_is_told_of_in_the_engines_words(cluster: Cluster, tmp_path: Path) -> None:
    cluster.put(_pod("gateway-1", "gateway"))
    path = "/api/v1/namespaces/knapper/pods/gateway-1:8080/proxy/api/v1/healthz"
    said = "model org/name cannot be served: it does not fit"
    cluster.texts[path] = json.dumps({"status": "ok", "unservable": [said]})
    wrong = [each for each in look(cluster, tmp_path) if each.verdict == "wrong"]
    assert [(each.subject, each.seen) for each in wrong] == [("base model", said)]
    cluster.texts[path] = json.dumps({"status": "ok"})
    assert [each for each in look(cluster, tmp_path) if each.verdict == "wrong"] == []


def test_a_gateway_that_does_not_answer_through_the_api_is_unknown_and_never_good(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.put(_pod("gateway-1", "gateway"))
    cluster.texts.pop("/api/v1/namespaces/knapper/pods/gateway-1:8080/proxy/api/v1/healthz", None)
    (found,) = [each for each in look(cluster, tmp_path) if each.subject == "base model"]
    assert (found.verdict, "gateway-1 does not answer" in found.seen) == ("unknown", True)
    assert found.remedy.startswith("kubectl port-forward -n knapper gateway-1 8000:8080")


def test_a_gateway_that_is_about_to_end_is_not_asked(cluster: Cluster, tmp_path: Path) -> None:
    ending = _pod("gateway-1", "gateway")
    ending["metadata"]["deletionTimestamp"] = "2026-11-28T00:00:00Z"
    cluster.put(ending, _pod("gateway-2", "gateway"))
    cluster.texts["/api/v1/namespaces/knapper/pods/gateway-2:8080/proxy/api/v1/healthz"] = '{"status": "ok"}'
    assert [each for each in look(cluster, tmp_path) if each.subject == "base model"] == []


def test_a_pod_that_has_no_node_is_told_of_in_the_schedulers_words(cluster: Cluster, tmp_path: Path) -> None:
    said = "0/1 nodes are available: 1 Insufficient memory."
    waits = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
    cluster.put(_pod("train-step-1", "train-step", conditions=[waits]))
    cluster.put(_pod("sample-1", "sample", conditions=[{"type": "PodScheduled", "status": "True"}]))
    (found,) = [each for each in look(cluster, tmp_path) if each.subject.startswith("Pod ")]
    assert (found.subject, found.verdict, found.seen) == ("Pod train-step-1", "unknown", f"has no node: {said}")
    assert "resources.requests" in found.remedy


def test_a_container_that_is_killed_and_started_again_is_told_of(cluster: Cluster, tmp_path: Path) -> None:
    ended = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
    container = {"name": "user-container", "restartCount": 2, "lastState": ended}
    cluster.put(_pod("train-step-1", "train-step", containerStatuses=[container]))
    cluster.put(_pod("sample-1", "sample", containerStatuses=[{**container, "restartCount": 1}]))
    (wrong,) = [each for each in look(cluster, tmp_path) if each.verdict == "wrong"]
    assert (wrong.subject, wrong.seen) == ("Pod train-step-1", "OOMKilled, started 2 times again")
    assert "resources.limits.memory" in wrong.remedy


GOOGLE: dict[str, Any] = {
    "/storage/b/example-project-knapper-state": {
        "name": "example-project-knapper-state", "location": "EUROPE-WEST4",
        "softDeletePolicy": {"retentionDurationSeconds": "0"},
        "lifecycle": {"rule": [{"action": {"type": "AbortIncompleteMultipartUpload"}, "condition": {"age": 1}}]},
    },
    "/pubsub/projects/example-project/subscriptions/knapper-uploads": {
        "state": "ACTIVE", "expirationPolicy": {}, "pushConfig": {},
        "deadLetterPolicy": {"deadLetterTopic": "projects/example-project/topics/knapper-uploads-dead"},
    },
    "/compute/projects/example-project/regions/europe-west4": {
        "quotas": [{"metric": "PREEMPTIBLE_NVIDIA_L4_GPUS", "limit": 4.0, "usage": 1.0}],
    },
}  # fmt: skip


@contextmanager
def google(answers: dict[str, Any]) -> Iterator[Google]:
    """Constructed: the fields of Google's REST answers that the doctor reads, in their shape."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Authorization"] == "Bearer made-up"
            found = answers.get(self.path)
            sent = json.dumps(found or {"error": {"code": 403}}).encode()
            self.send_response(200 if found else 403)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    try:
        yield Google(
            lambda: "made-up", "example-project", "europe-west4", "nvidia-l4",
            "projects/example-project/subscriptions/knapper-uploads",
            storage=f"{base}/storage", pubsub=f"{base}/pubsub", compute=f"{base}/compute",
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()


STATE, SUBSCRIPTION, REGION = GOOGLE
WRONG: dict[str, tuple[Callable[[Any], object], str, str]] = {
    "soft delete": (
        lambda all_: all_[STATE].update(softDeletePolicy={"retentionDurationSeconds": "604800"}),
        "soft delete", "--clear-soft-delete",
    ),
    "a rule that deletes": (
        lambda all_: all_[STATE]["lifecycle"]["rule"].append({"action": {"type": "Delete"}, "condition": {"age": 7}}),
        "lifecycle", "--clear-lifecycle",
    ),
    "versions": (lambda all_: all_[STATE].update(versioning={"enabled": True}), "versioning", "--no-versioning"),
    "far away": (lambda all_: all_[STATE].update(location="US"), "location", "beside the GPUs"),
    "a subscription that ends": (
        lambda all_: all_[SUBSCRIPTION].update(expirationPolicy={"ttl": "2678400s"}), "expiration", "never",
    ),
    "no dead letters": (lambda all_: all_[SUBSCRIPTION].pop("deadLetterPolicy"), "dead letters", "--dead-letter-topic"),
    "push": (
        lambda all_: all_[SUBSCRIPTION].update(pushConfig={"pushEndpoint": "https://x"}), "delivery", "--push-endpoint",
    ),
    "one GPU": (lambda all_: all_[REGION]["quotas"][0].update(limit=2.0), "quota for nvidia-l4", "quotas?project"),
}  # fmt: skip


def test_googles_side_is_good(cluster: Cluster, tmp_path: Path) -> None:
    with google(GOOGLE) as asked:
        found = look(cluster, tmp_path, asked)
    assert [each for each in found if each.verdict == "wrong"] == []
    assert sum("bucket" in each.subject or "quota" in each.subject for each in found) == 5


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_at_google_is_found_alone(what: str, cluster: Cluster, tmp_path: Path) -> None:
    break_, subject, command = WRONG[what]
    answers = copy.deepcopy(GOOGLE)
    break_(answers)
    with google(answers) as asked:
        wrong = [each for each in look(cluster, tmp_path, asked) if each.verdict == "wrong"]
    assert [each.subject.endswith(subject) for each in wrong] == [True]
    assert command in wrong[0].remedy


def test_what_google_does_not_show_is_unknown_and_never_good(cluster: Cluster, tmp_path: Path) -> None:
    with google({}) as asked:
        found = look(cluster, tmp_path, asked)
    unknown = [each.subject for each in found if each.verdict == "unknown"]
    assert unknown[-3:] == [
        "bucket example-project-knapper-state",
        "subscription knapper-uploads",
        "quota for nvidia-l4",
    ]


def test_the_command_prints_what_is_wrong_and_fails(cluster: Cluster, tmp_path: Path) -> None:
    cluster.objects["/api/v1/namespaces/knapper/configmaps/knapper"]["data"]["STORAGE_EMULATOR_HOST"] = "http://x:4443"
    with serving(cluster, tmp_path) as kubeconfig:
        good = knapper("doctor", "--kubeconfig", str(kubeconfig))
        cluster.objects[f"{CONFIG}/config-features"]["data"].pop("kubernetes.podspec-fieldref")
        bad = knapper("doctor", "--kubeconfig", str(kubeconfig))
    assert (good.returncode, bad.returncode) == (0, 1), good.stdout + good.stderr
    assert "0 wrong" in good.stdout
    assert "wrong   config-features kubernetes.podspec-fieldref: not set, should be enabled" in bad.stdout


def test_a_build_that_is_no_release_is_no_missing_one(cluster: Cluster, tmp_path: Path) -> None:
    path = "/apis/apps/v1/namespaces/knative-serving/deployments/activator"
    cluster.objects[path]["metadata"]["labels"]["app.kubernetes.io/version"] = "devel"
    found = {each.subject: (each.verdict, each.seen) for each in look(cluster, tmp_path)}
    assert found["Knative Serving"] == ("unknown", "version 'devel', which is no release")


@pytest.mark.parametrize(("minor", "end"), [(20, date(2026, 5, 5)), (22, date(2026, 11, 3)), (23, date(2027, 2, 2))])
def test_when_knative_ends_to_mend_a_version(minor: int, end: date) -> None:
    assert support_ends(minor) == end


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("v1.34.1", "wrong"), ("v1.34.1-gke.1", "good"), ("v1.33.9-gke.1", "wrong"), ("v1.35.0", "good")],
)
def test_a_kubernetes_past_its_end_is_told_unless_its_maker_mends_it_for_longer(
    version: str, verdict: str, cluster: Cluster, tmp_path: Path
) -> None:
    assert kubernetes_ends(31) == date(2025, 10, 28)
    cluster.version = version
    assert [each.verdict for each in look(cluster, tmp_path) if each.subject == "Kubernetes"] == [verdict]


@pytest.mark.parametrize(
    ("version", "verdicts"),
    [("v1.34.9", []), ("v1.36.5-gke.1032000", ["good"]), ("v1.37.1-gke.1551999", ["wrong"]), ("v1.36.4", [])],
)
def test_the_fault_of_the_driver_is_told_by_the_version(
    version: str, verdicts: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    cluster.version = version
    assert [each.verdict for each in look(cluster, tmp_path) if each.subject == "Cloud Storage FUSE"] == verdicts
