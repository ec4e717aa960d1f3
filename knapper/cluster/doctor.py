"""Finds problems of a cluster before a run meets them, each with the command that fixes it.

Reads only. It reports what it cannot see (no permission, no Google Cloud), and never takes silence for health.
"""

import json
import re
from collections.abc import Callable, Iterator

from kubernetes.utils import parse_quantity

from knapper.cluster import installation
from knapper.cluster.findings import DoctorTarget, Finding
from knapper.cluster.kustomize import Object
from knapper.cluster.model import LABEL, NAMESPACE
from knapper.cluster.state import gateway_pod, gateway_says
from knapper.errors import KnapperError

_RESTARTS_MAX = 2
_SCHEDULED = ("cpu", "memory", "ephemeral-storage")
_CHANNELS = "MTChannelBasedBroker"
_DUTIES = (  # what `knapper deploy` does
    ("patch", "serving.knative.dev", "services"), ("delete", "serving.knative.dev", "services"),
    ("patch", "eventing.knative.dev", "triggers"), ("delete", "eventing.knative.dev", "triggers"),
    ("patch", "", "configmaps"), ("list", "", "pods"),
)  # fmt: skip


def examine(target: DoctorTarget) -> Iterator[Finding]:
    """All checks, in the order in which to fix their findings."""
    looks: tuple[Callable[[DoctorTarget], Iterator[Finding]], ...] = (
        *installation.CHECKS, permissions, services, capacity, models, pods, times, eventing, accelerators,
    )  # fmt: skip
    for look in looks:
        try:
            yield from look(target)
        except KnapperError as error:
            yield Finding(look.__name__, "unknown", str(error), "fix the findings above, or ask for the permission")
    settings = (target.api.get("v1", "ConfigMap", "knapper", NAMESPACE) or {}).get("data", {})
    for more in target.more:
        yield from more(settings)


def permissions(target: DoctorTarget) -> Iterator[Finding]:
    """The current user may deploy."""
    for verb, group, resource in _DUTIES:
        may = target.api.review(verb, group, resource, NAMESPACE)
        about = f"permission to {verb} {resource}{'.' + group if group else ''}"
        remedy = (
            f"kubectl create rolebinding knapper-deploy -n {NAMESPACE} "
            "--clusterrole=knative-serving-namespaced-admin --user=YOU"
        )
        yield Finding(about, "good" if may else "wrong", "yes" if may else "no", "" if may else remedy)


def services(target: DoctorTarget) -> Iterator[Finding]:
    """Each Service is ready, has a ceiling, and knows where its image is."""
    for service in _ours(target):
        about = f"Service {service['metadata']['name']}"
        ready = next(
            (each for each in service.get("status", {}).get("conditions", []) if each["type"] == "Ready"), None
        )
        if ready is None or ready["status"] != "True":
            seen = "no word yet" if ready is None else f"{ready.get('reason', '')}: {ready.get('message', '')}"
            yield Finding(about, "wrong", seen, f"kubectl describe ksvc -n {NAMESPACE} {service['metadata']['name']}")
        else:
            yield Finding(about, "good", "ready")
        notes = service["spec"]["template"]["metadata"].get("annotations", {})
        for key, default in (("max-scale", "0"), ("initial-scale", "1"), ("target-utilization-percentage", "70")):
            value, wanted = notes.get(f"autoscaling.knative.dev/{key}", default), _WANTED[key]
            if LABEL in service["metadata"].get("labels", {}) and not wanted(value):
                yield Finding(f"{about} {key}", "wrong", value, "apply knative/overlays again: it was changed by hand")
        most = notes.get("autoscaling.knative.dev/max-scale", "0")
        environment = service["spec"]["template"]["spec"]["containers"][0].get("env", [])
        addressed = any(each["name"] == "KNAPPER_POD_IP" for each in environment)
        is_gateway = service["metadata"].get("labels", {}).get("app.kubernetes.io/name") == "gateway"
        if is_gateway and most != "1" and not addressed:
            remedy = (
                "set max-scale to 1, or apply knative/overlays again: without KNAPPER_POD_IP gateways do not find each "
                "other's samples, and a client whose requests go to two in turn is never answered"
            )
            yield Finding(f"{about} max-scale", "wrong", most, remedy)
        image = service["spec"]["template"]["spec"]["containers"][0]["image"]
        if "PROJECT_ID" in image:
            yield Finding(
                f"{about} image", "wrong", image, "apply the overlay that terraform/stages/30-functions wrote"
            )


def capacity(target: DoctorTarget) -> Iterator[Finding]:
    """Each Service's pod fits on some node, and has one. A pool at zero, or a node to come, is not visible here."""
    nodes = target.api.list("v1", "Node")
    for service in _ours(target):
        spec = service["spec"]["template"]["spec"]
        requests = spec["containers"][0].get("resources", {}).get("requests", {})
        wanted = {name: _quantity(requests[name]) for name in _SCHEDULED if name in requests}
        chosen = [
            node["status"].get("allocatable", {})
            for node in nodes
            if spec.get("nodeSelector", {}).items() <= node["metadata"].get("labels", {}).items()
        ]
        if not chosen or not wanted:
            continue
        fits = any(all(_quantity(node.get(name, "0")) >= wanted[name] for name in wanted) for node in chosen)
        shown = ", ".join(f"{name} {requests[name]}" for name in wanted)
        yield Finding(
            f"Service {service['metadata']['name']} requests",
            "good" if fits else "wrong",
            shown if fits else f"{shown}; no node has so much",
            "" if fits else "lower resources.requests in the overlay, or add a larger node",
        )

    for pod in target.api.list("v1", "Pod", NAMESPACE, "app.kubernetes.io/part-of=knapper"):
        for condition in pod.get("status", {}).get("conditions", []):
            if (condition.get("type"), condition.get("reason")) == ("PodScheduled", "Unschedulable"):
                name, remedy = pod["metadata"]["name"], "lower resources.requests in the overlay, or add a node for it"
                remedy += "; where a pool makes nodes, wait some minutes"
                yield Finding(f"Pod {name}", "unknown", f"has no node: {condition.get('message', '')}", remedy)


def _quantity(text: str) -> float:
    return float(parse_quantity(text))  # type: ignore[no-untyped-call]  # the library has no types


def models(target: DoctorTarget) -> Iterator[Finding]:
    """No function reports that it cannot serve its base model."""
    pod = gateway_pod(target.api)
    if pod is None:
        return  # no gateway runs; `services` reports that
    health = gateway_says(target.api, "api/v1/healthz")
    if health is None:
        seen = f"{pod} does not answer through the cluster's API, which a network policy may keep from port 8080"
        remedy = f"kubectl port-forward -n {NAMESPACE} {pod} 8000:8080, then curl http://127.0.0.1:8000/api/v1/healthz"
        yield Finding("base model", "unknown", seen, remedy)
        return
    for reason in json.loads(health).get("unservable", []):
        yield Finding("base model", "wrong", reason, "fix its files, or deploy it differently: it continues by itself")


def pods(target: DoctorTarget) -> Iterator[Finding]:
    """No container of ours ends and is started again, in silence: one that is killed cannot say why."""
    for pod in target.api.list("v1", "Pod", NAMESPACE, "app.kubernetes.io/part-of=knapper"):
        for container in pod.get("status", {}).get("containerStatuses", []):
            ended = container.get("lastState", {}).get("terminated", {})
            times = int(container.get("restartCount", 0))
            if container.get("name") != "user-container" or times < _RESTARTS_MAX or not ended:
                continue
            name, reason = pod["metadata"]["name"], ended.get("reason", "Error")
            remedy = f"kubectl logs -n {NAMESPACE} {name} -c user-container --previous"
            if reason == "OOMKilled":
                remedy = "raise resources.limits.memory in the overlay, or serve a smaller model"
            yield Finding(f"Pod {name}", "wrong", f"{reason}, started {times} times again", remedy)


_WANTED: dict[str, Callable[[str], bool]] = {
    "max-scale": lambda value: value != "0",  # 0: as many GPUs as there are
    "initial-scale": lambda value: value == "0",
    "target-utilization-percentage": lambda value: float(value) == 100,
}


def times(target: DoctorTarget) -> Iterator[Finding]:
    """Nothing gives up before a start from zero is over."""
    api, budget = target.api, target.cold_start_s
    deployment = (api.get("v1", "ConfigMap", "config-deployment", "knative-serving") or {}).get("data", {})
    for service in _ours(target):
        template = service["spec"]["template"]
        container = template["spec"]["containers"][0]
        if "nvidia.com/gpu" not in container.get("resources", {}).get("limits", {}):
            continue
        name = service["metadata"]["name"]
        notes = template["metadata"].get("annotations", {})
        said = notes.get("serving.knative.dev/progress-deadline", deployment.get("progress-deadline", "600s"))
        yield _enough(
            f"Service {name} progress deadline", seconds(said), budget, "serving.knative.dev/progress-deadline"
        )
        probe = container.get("startupProbe", {})
        patience = float(probe.get("periodSeconds", 10)) * float(probe.get("failureThreshold", 3))
        yield _enough(f"Service {name} start-up probe", patience, budget, "startupProbe.failureThreshold")
    defaults = (api.get("v1", "ConfigMap", "config-defaults", "knative-serving") or {}).get("data", {})
    longest = float(defaults.get("max-revision-timeout-seconds", 600))
    activator = api.get("apps/v1", "Deployment", "activator", "knative-serving")
    if activator is not None:
        grace = float(activator["spec"]["template"]["spec"].get("terminationGracePeriodSeconds", 30))
        yield _enough(
            "activator grace", grace, longest,
            "kubectl patch deployment activator -n knative-serving -p "
            f"'{{\"spec\":{{\"template\":{{\"spec\":{{\"terminationGracePeriodSeconds\":{longest:.0f}}}}}}}}}'",
            "a request that it holds may take",
        )  # fmt: skip


def _enough(
    about: str, seen_s: float, needed_s: float, where: str, needed_for: str = "a cold start may take"
) -> Finding:  # fmt: skip
    if seen_s >= needed_s:
        return Finding(about, "good", f"{seen_s:.0f} s")
    remedy = where if where.startswith("kubectl") else f"raise {where} in the overlay, and apply it"
    return Finding(about, "wrong", f"{seen_s:.0f} s, and {needed_for} {needed_s:.0f} s", remedy)


def eventing(target: DoctorTarget) -> Iterator[Finding]:
    """Broker, Triggers and PingSource are ready, and retry for longer than a cold start takes."""
    for version, kind in (
        ("eventing.knative.dev/v1", "Broker"),
        ("eventing.knative.dev/v1", "Trigger"),
        ("sources.knative.dev/v1", "PingSource"),
    ):
        found = target.api.list(version, kind, NAMESPACE)
        if not found:
            yield Finding(kind, "wrong", "none", "kubectl apply -k knative/overlays/...: jobs need it")
        for thing in found:
            name = thing["metadata"]["name"]
            conditions: list[Object] = thing.get("status", {}).get("conditions", [])
            ready: Object = next((each for each in conditions if each["type"] == "Ready"), {})
            good = ready.get("status") == "True"
            seen = "ready" if good else f"{ready.get('reason', 'no word yet')}: {ready.get('message', '')}"
            yield Finding(
                f"{kind} {name}",
                "good" if good else "wrong",
                seen,
                "" if good else f"kubectl describe {kind.lower()} -n {NAMESPACE} {name}",
            )
            if kind == "Trigger":
                yield _enough(
                    f"Trigger {name} retries",
                    outlasts_s(thing["spec"].get("delivery", {})),
                    target.cold_start_s,
                    "delivery.retry",
                )
            notes = thing["metadata"].get("annotations", {})
            if (
                kind == "Broker"
                and notes.get("eventing.knative.dev/broker.class", _CHANNELS) == _CHANNELS
                and notes.get("messaging.knative.dev/async-handler") != "true"
            ):
                remedy = "delete the Broker, apply the overlay again: the annotation counts when it is made"
                yield Finding(
                    f"Broker {name} async-handler", "wrong", "callers wait for the whole chain of events", remedy
                )


def accelerators(target: DoctorTarget) -> Iterator[Finding]:
    """GPUs that Services request exist, as many on a node as a pod has; node pools at zero are not visible here."""
    asked: dict[str, int] = {}
    for service in _ours(target):
        spec = service["spec"]["template"]["spec"]
        if kind := spec.get("nodeSelector", {}).get("cloud.google.com/gke-accelerator"):
            limits = spec["containers"][0].get("resources", {}).get("limits", {})
            asked[kind] = max(asked.get(kind, 0), int(limits.get("nvidia.com/gpu", 1)))
    for kind, of_pod in sorted(asked.items()):
        nodes = target.api.list("v1", "Node", labels=f"cloud.google.com/gke-accelerator={kind}")
        free = [int(node["status"].get("allocatable", {}).get("nvidia.com/gpu", 0)) for node in nodes]
        seen = f"{sum(free)} on {len(nodes)} nodes" if nodes else "no node now, which is normal while idle"
        if any(free) and max(free) < of_pod:
            remedy = f"a pod asks for {of_pod}: give it a pool with accelerators_per_node = {of_pod}"
            yield Finding(f"GPU {kind}", "wrong", f"{seen}, at most {max(free)} on one", remedy)
            continue
        remedy = f"see that a pool has it: gcloud container node-pools list --cluster NAME | grep {kind}"
        yield Finding(f"GPU {kind}", *(("good", seen) if any(free) else ("unknown", seen, remedy)))


def _ours(target: DoctorTarget) -> list[Object]:
    return target.api.list("serving.knative.dev/v1", "Service", NAMESPACE, "app.kubernetes.io/part-of=knapper")


def outlasts_s(delivery: Object) -> float:
    """How long deliveries are retried, not counting the attempts themselves."""
    delay, retries = seconds(delivery.get("backoffDelay", "PT0.2S")), int(delivery.get("retry", 10))
    exponential = delivery.get("backoffPolicy", "exponential") == "exponential"
    return float(sum(delay * (2.0**n if exponential else n) for n in range(1, retries + 1)))


def seconds(text: str) -> float:
    """Seconds of 90s, 1m30s, PT2S, PT0.2S or PT15M."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    return sum(
        float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([hms])", text.lower().removeprefix("pt"))
    )
