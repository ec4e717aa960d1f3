"""The state of each base model, read from the cluster every time."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from knapper.cluster.api import Api
from knapper.cluster.kustomize import Object
from knapper.cluster.model import LABEL, MODELS, NAMESPACE, SERVICES, samples_too
from knapper.state.model_record import slug

PROCESS_STAGES = ("import", "weights", "adapter", "first_step")  # knapper_cold_start_seconds, in their order
_ACCELERATORS = ("cloud.google.com/gke-accelerator", "nvidia.com/gpu.product")


@dataclass(frozen=True)
class PodStart:
    """How the newest pod of a Service started, in seconds by stage; None for a stage that is not over."""

    pod: str
    node_s: float | None  # until it had a node, which the autoscaler may have had to make
    image_s: float | None  # until its process began: image, volumes
    ready_s: float | None  # until it answered: imports, weights
    waits_for: str  # what Kubernetes says of a pod that has no node, or whose container cannot start
    stages: Mapping[str, float]  # of its process, as it says itself; those that are over, once it answers


@dataclass(frozen=True)
class ModelService:
    """One Service of a model."""

    service: str
    name: str
    revision: str  # the newest that was ready; empty for none
    replicas: int
    state: str  # warm, cold, starting or failing
    gpu: str
    error: str  # Knative's message; empty if nothing is wrong
    start: PodStart | None = None  # of the newest pod, while there is one


@dataclass(frozen=True)
class Deployed:
    """One base model. `waiting`: runs with operations that are not answered, None if the gateway does not answer.
    `one_pod`: its train-step samples too.
    """

    model: str
    declared: bool
    parts: Sequence[ModelService]
    waiting: int | None
    one_pod: bool = False


def deployed(api: Api) -> list[Deployed]:
    """All models that have Services, or are declared to the gateway."""
    import msgspec

    config = api.get("v1", "ConfigMap", MODELS, NAMESPACE) or {}
    declared = {name.removesuffix(".json"): text for name, text in (config.get("data") or {}).items()}
    services = [
        each
        for each in api.list("serving.knative.dev/v1", "Service", NAMESPACE, LABEL)
        if each["metadata"].get("labels", {}).get("app.kubernetes.io/name") in SERVICES
    ]
    waiting = _waiting(api)
    found = []
    for one in sorted(declared.keys() | {each["metadata"]["labels"][LABEL] for each in services}):
        own = [each for each in services if each["metadata"]["labels"][LABEL] == one]
        name = str(msgspec.json.decode(declared[one])["name"]) if one in declared else _model_of(own[0])
        parts = [_part(api, each) for each in sorted(own, key=_order)]
        count = None if waiting is None else waiting.get(name, 0)
        found.append(Deployed(name, one in declared, parts, count, one_pod=any(map(samples_too, own))))
    return found


def _model_of(service: Object) -> str:
    (container,) = service["spec"]["template"]["spec"]["containers"]
    return next((str(each["value"]) for each in container.get("env", []) if each["name"] == "KNAPPER_MODEL"), "?")


def _order(service: Object) -> int:
    return SERVICES.index(service["metadata"]["labels"]["app.kubernetes.io/name"])


def _part(api: Api, service: Object) -> ModelService:
    status, spec = service.get("status", {}), service["spec"]["template"]["spec"]
    revision = status.get("latestReadyRevisionName", "")
    about = api.get("serving.knative.dev/v1", "Revision", revision, NAMESPACE) if revision else None
    running = (about or {}).get("status", {})
    replicas, desired = int(running.get("actualReplicas") or 0), int(running.get("desiredReplicas") or 0)
    errors = [
        f"{each['type']}: {each.get('reason', '')} {each.get('message', '')}".strip()
        for each in [*status.get("conditions", []), *running.get("conditions", [])]
        if each["status"] == "False" and each["type"] != "Active"  # not active: at zero, as it should be
    ]
    state = "failing" if errors else "warm" if replicas else "starting" if desired else "cold"
    limits = spec["containers"][0].get("resources", {}).get("limits", {})
    kinds = [value for key, value in spec.get("nodeSelector", {}).items() if key in _ACCELERATORS]
    gpu = f"{limits['nvidia.com/gpu']} x {', '.join(kinds) or 'any'}" if "nvidia.com/gpu" in limits else "none"
    labels = service["metadata"]["labels"]
    name = service["metadata"]["name"]
    pods = api.list("v1", "Pod", NAMESPACE, f"serving.knative.dev/service={name}")
    newest = max(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")), default=None)
    start = None if newest is None else _start(newest, api)
    error = errors[0] if errors else ""
    return ModelService(labels["app.kubernetes.io/name"], name, revision, replicas, state, gpu, error, start)


def _start(pod: Object, api: Api) -> PodStart:
    status = pod.get("status", {})
    conditions = {each["type"]: each for each in status.get("conditions", [])}
    container: Object = next(
        (each for each in status.get("containerStatuses", []) if each["name"] == "user-container"), {}
    )
    now: Object = container.get("state", {})
    scheduled, ready = conditions.get("PodScheduled", {}), conditions.get("Ready", {})
    moments = [
        _moment(pod["metadata"].get("creationTimestamp")),
        _moment(scheduled.get("lastTransitionTime")) if scheduled.get("status") == "True" else None,
        _moment(now.get("running", {}).get("startedAt")),
        _moment(ready.get("lastTransitionTime")) if ready.get("status") == "True" else None,
    ]
    spans = [
        None if begun is None or over is None else max(0.0, (over - begun).total_seconds())
        for begun, over in itertools.pairwise(moments)
    ]
    said: Object = scheduled if scheduled.get("status") == "False" else now.get("waiting", {})
    waits_for = " ".join(filter(None, (said.get("reason", ""), said.get("message", ""))))
    name = pod["metadata"]["name"]
    said_itself = {} if spans[2] is None else process_stages(api.pod_text(name, 8080, "metrics", NAMESPACE) or "")
    return PodStart(name, spans[0], spans[1], spans[2], waits_for, said_itself)


def process_stages(page: str) -> dict[str, float]:
    """Seconds of each stage of a process's start, from its metrics."""
    found = dict(re.findall(r'^knapper_cold_start_seconds_sum\{stage="(\w+)"\} ([\d.e+-]+)$', page, flags=re.MULTILINE))
    return {stage: float(found[stage]) for stage in PROCESS_STAGES if stage in found}


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _waiting(api: Api) -> dict[str, int] | None:
    """Waiting runs by base model, from the gateway's metrics."""
    text = gateway_says(api, "metrics")
    if text is None:
        return None
    found = re.findall(r'^knapper_runs_waiting\{model="([^"]*)"\} ([\d.e+]+)$', text, flags=re.MULTILINE)
    return {model: int(float(count)) for model, count in found}


def gateway_says(api: Api, path: str) -> str | None:
    """A gateway pod's answer to a GET of the path; None if no gateway runs or answers."""
    pod = gateway_pod(api)
    return None if pod is None else api.pod_text(pod, 8080, path, NAMESPACE)


def gateway_pod(api: Api) -> str | None:
    """The name of a gateway pod that runs and is not about to end; None if there is none."""
    for each in api.list("v1", "Pod", NAMESPACE, "app.kubernetes.io/name=gateway"):
        if each.get("status", {}).get("phase") == "Running" and "deletionTimestamp" not in each["metadata"]:
            return str(each["metadata"]["name"])
    return None


def is_of(service: Object, model: str) -> bool:
    """Whether an object belongs to the model."""
    return bool(service["metadata"].get("labels", {}).get(LABEL) == slug(model))
