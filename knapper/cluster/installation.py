"""What is installed on a cluster: versions, kinds, Knative's settings, and the faults of drivers that meet here."""

import re
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Final

import yaml

from knapper.cluster.findings import DoctorTarget, Finding
from knapper.cluster.kustomize import Object
from knapper.cluster.model import NAMESPACE

CONFIGURATION: Final = "knative/cluster/configmaps"
KNATIVE_MIN: Final = (1, 22)  # the manifests were checked against it
KUBERNETES_MIN: Final = (1, 34)  # what that Knative asks for
_BY_OPERATOR: Final = "kubectl apply --server-side -k knative/cluster/operator"
_BY_HAND: Final = "kubectl apply -f the files of that release, as docs/cluster-trial.md has them (step 1)"
_NODES_TO_DRAIN: Final = 2  # where there is one, its pods have nowhere to go
_MANAGED: Final = "-gke|-eks"  # their makers mend them for longer, and upgrade them
_FUSE_FIXED: Final = {36: (5, 1032000), 37: (1, 1552000)}  # minor version of GKE -> (patch, build)
_KINDS = {
    "services.serving.knative.dev": "serving", "revisions.serving.knative.dev": "serving",
    "brokers.eventing.knative.dev": "eventing", "triggers.eventing.knative.dev": "eventing",
    "pingsources.sources.knative.dev": "eventing", "inmemorychannels.messaging.knative.dev": "eventing",
}  # fmt: skip


def versions(target: DoctorTarget) -> Iterator[Finding]:
    """Kubernetes, Serving and Eventing are new enough, and not too old to be mended."""
    kubernetes = target.api.version()
    end = _never if re.search(_MANAGED, kubernetes) else kubernetes_ends
    yield _version("Kubernetes", kubernetes, KUBERNETES_MIN, "upgrade the cluster", target.today, end)
    how = _by_hand_or_operator(target)
    for part, deployment in (("serving", "activator"), ("eventing", "eventing-controller")):
        found = target.api.get("apps/v1", "Deployment", deployment, f"knative-{part}")
        labels = (found or {}).get("metadata", {}).get("labels", {})
        remedy = f"install Knative {part.title()} 1.{KNATIVE_MIN[1]} or newer: {how}"
        version = labels.get("app.kubernetes.io/version", "")
        yield _version(f"Knative {part.title()}", version, KNATIVE_MIN, remedy, target.today, support_ends)


def _by_hand_or_operator(target: DoctorTarget) -> str:
    """How Knative is installed on this cluster: the operator's resource is of no use where the operator is not."""
    return _BY_OPERATOR if _operated(target) else _BY_HAND


def _operated(target: DoctorTarget) -> bool:
    """Whether Knative's operator keeps Serving, and takes back what is set in its ConfigMaps."""
    where = ("operator.knative.dev/v1beta1", "KnativeServing", "knative-serving", "knative-serving")
    return target.api.get(*where) is not None


def _version(
    what: str, text: str, least: tuple[int, int], remedy: str, today: date, ends: Callable[[int], date]
) -> Finding:
    """`remedy`: how a newer one is installed. `ends`: until when 1.n gets fixes."""
    match = re.search(r"(\d+)\.(\d+)", text)
    if match is None and text:
        return Finding(what, "unknown", f"version {text!r}, which is no release", remedy)
    if match is None:
        return Finding(what, "wrong", "not installed", remedy)
    version = (int(match[1]), int(match[2]))
    if version < least:
        return Finding(what, "wrong", text, f"needs {least[0]}.{least[1]}: {remedy}")
    if (end := ends(version[1])) < today:
        newer = f"upgrade, one minor version at a time: {remedy.partition(': ')[2] or remedy}"
        return Finding(what, "wrong", f"{text}, without fixes since {end}", newer)
    return Finding(what, "good", text)


def support_ends(minor: int) -> date:
    """Until when Knative 1.`minor` gets fixes: a week after the second release that follows it, a quarter apart each.

    By knative/community's RELEASE-SCHEDULE.md; 1.21 came on 2026-01-27, and 1.20 ended on 2026-05-05.
    """
    return date(2026, 1, 27) + timedelta(weeks=13 * (minor + 2 - 21) + 1)


def kubernetes_ends(minor: int) -> date:
    """Until when Kubernetes 1.`minor` gets fixes: three releases a year, each for fourteen months.

    By kubernetes/website's data/releases/schedule.yaml: 1.28 ended on 2024-10-28, 1.31 on 2025-10-28.
    """
    months = 2024 * 12 + 9 + 4 * (minor - 28)
    return date(months // 12, months % 12 + 1, 28)


def _never(_minor: int) -> date:
    return date.max


def kinds(target: DoctorTarget) -> Iterator[Finding]:
    """The kinds of our manifests exist."""
    how = _by_hand_or_operator(target)
    for name, part in _KINDS.items():
        there = target.api.get("apiextensions.k8s.io/v1", "CustomResourceDefinition", name) is not None
        remedy = "" if there else f"install Knative {part.title()}: {how}"
        yield Finding(f"kind {name}", "good" if there else "wrong", "there" if there else "missing", remedy)


def flags(target: DoctorTarget) -> Iterator[Finding]:
    """Knative's settings are those of knative/cluster, and its own are still there."""
    by_operator = _operated(target)
    for wanted in configuration(target.root):
        name = wanted["metadata"]["name"]
        remedy = (
            _BY_OPERATOR
            if by_operator
            else (
                f"kubectl patch configmap {name} -n knative-serving --type merge --patch-file "
                f"{CONFIGURATION}/{name.removeprefix('config-')}.yaml"
            )
        )
        found = target.api.get("v1", "ConfigMap", name, "knative-serving") or {}
        for key, value in wanted["data"].items():
            seen = found.get("data", {}).get(key)
            about = f"{name} {key}"
            if seen == value:
                yield Finding(about, "good", str(seen))
            else:
                yield Finding(about, "wrong", f"{'not set' if seen is None else seen}, should be {value}", remedy)


def lost_keys(target: DoctorTarget) -> Iterator[Finding]:
    """No apply has dropped what Knative came with: without this key its webhook refuses every further change."""
    found = target.api.get("v1", "ConfigMap", "config-deployment", "knative-serving")
    if found is not None and "queue-sidecar-image" not in found.get("data", {}):
        yield Finding(
            "config-deployment queue-sidecar-image", "wrong", "lost",
            "apply serving-core.yaml of the installed release of Knative again, then the patches of " + CONFIGURATION,
        )  # fmt: skip


def fuse(target: DoctorTarget) -> Iterator[Finding]:
    """GKE's Cloud Storage FUSE driver is not one that loses mounts, where weights are read through it."""
    match = re.fullmatch(r"v1\.(\d+)\.(\d+)-gke\.(\d+)", version := target.api.version())
    if match is None or int(match[1]) not in _FUSE_FIXED:
        return
    services = target.api.list("serving.knative.dev/v1", "Service", NAMESPACE)
    volumes = [volume for each in services for volume in each["spec"]["template"]["spec"].get("volumes", [])]
    if not any(volume.get("csi", {}).get("driver") == "gcsfuse.csi.storage.gke.io" for volume in volumes):
        return
    patch, build = _FUSE_FIXED[int(match[1])]
    fixed = f"1.{match[1]}.{patch}-gke.{build}"
    if (int(match[2]), int(match[3])) >= (patch, build):
        yield Finding("Cloud Storage FUSE", "good", version)
    else:
        remedy = f"gcloud container clusters upgrade NAME --cluster-version {fixed}, and its node pools"
        yield Finding("Cloud Storage FUSE", "wrong", f"{version} has a fault that {fixed} fixed", remedy)


def shared_twice(target: DoctorTarget) -> Iterator[Finding]:
    """No node offers its GPUs by DRA and by the device plugin: each would give them away without the other."""
    slices = target.api.list("resource.k8s.io/v1", "ResourceSlice")
    by_dra = {each["spec"].get("nodeName", "") for each in slices if each["spec"].get("driver") == "gpu.nvidia.com"}
    for node in target.api.list("v1", "Node") if by_dra else []:
        name, allocatable = node["metadata"]["name"], node["status"].get("allocatable", {})
        if name in by_dra and int(allocatable.get("nvidia.com/gpu", 0)):
            yield Finding(
                f"Node {name} GPUs", "wrong", "offered by DRA and by the device plugin",
                "use one on each node; Knative's pods ask the device plugin (nvidia.com/gpu)",
            )  # fmt: skip


def evictions(target: DoctorTarget) -> Iterator[Finding]:
    """Nodes can be drained and removed: no budget of Knative's keeps a pod where it is while all are healthy.

    As it comes, Knative wants 80 % of the replicas to stay, and has one of each (knative/serving issue 9990).
    """
    if len(target.api.list("v1", "Node")) < _NODES_TO_DRAIN:
        return
    for namespace in ("knative-serving", "kourier-system", "knative-eventing"):
        for budget in target.api.list("policy/v1", "PodDisruptionBudget", namespace):
            name, seen = budget["metadata"]["name"], budget.get("status", {})
            expected = seen.get("expectedPods", 0)
            if not expected or seen.get("currentHealthy", 0) < expected:  # something else is wrong, and said elsewhere
                continue
            about = f"PodDisruptionBudget {name}"
            if seen.get("disruptionsAllowed", 0):
                yield Finding(about, "good", "lets a pod move")
                continue
            patch = '{"spec": {"minAvailable": null, "maxUnavailable": 1}}'
            by_hand = f"kubectl patch pdb {name} -n {namespace} --type merge -p '{patch}'"
            remedy = _BY_OPERATOR if _operated(target) else by_hand
            yield Finding(about, "wrong", "lets no pod move: its node cannot be drained, upgraded or removed", remedy)


def configuration(root: Path) -> list[Object]:
    """The patches of Knative's own ConfigMaps; `root` holds knative/."""
    return [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted((root / CONFIGURATION).glob("*.yaml"))]


CHECKS: Final = (versions, kinds, flags, lost_keys, fuse, shared_twice, evictions)
