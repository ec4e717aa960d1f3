"""What no schema says: annotation names, what Knative's webhook refuses, and what this project has decided and why."""

import re
from collections.abc import Iterator

from knapper import limits
from knapper.cluster.kustomize import Object, identity
from knapper.errors import InvalidField
from knapper.settings import Settings, variable
from tests.manifests import webhook
from tests.manifests.rendering import services

# Knative takes any annotation, and ignores those it does not know: a misspelt one is a setting that is not made.
ANNOTATIONS = {
    *(f"autoscaling.knative.dev/{name}" for name in (
        "class", "metric", "target", "target-utilization-percentage", "min-scale", "max-scale", "initial-scale",
        "activation-scale", "window", "scale-down-delay", "scale-to-zero-pod-retention-period", "target-burst-capacity",
        "panic-window-percentage", "panic-threshold-percentage",
    )),
    "serving.knative.dev/progress-deadline",
    *(f"queue.sidecar.serving.knative.dev/{kind}-resource-request" for kind in ("cpu", "memory")),
    *(f"queue.sidecar.serving.knative.dev/{kind}-resource-limit" for kind in ("cpu", "memory")),
    "eventing.knative.dev/broker.class", "messaging.knative.dev/async-handler",
    "kafka.eventing.knative.dev/delivery.order",
    "gke-gcsfuse/volumes", "gke-gcsfuse/cpu-limit", "gke-gcsfuse/memory-limit", "gke-gcsfuse/ephemeral-storage-limit",
}  # fmt: skip
LABELS = {
    "app.kubernetes.io/name", "app.kubernetes.io/part-of", "networking.knative.dev/visibility", "knapper.dev/model",
    "kubernetes.io/metadata.name",
    *(f"pod-security.kubernetes.io/{mode}" for mode in ("enforce", "warn", "audit")),
}  # fmt: skip
COLD_START_S = 15 * 60  # until a GPU can be used on a new node, as the cluster autoscaler itself assumes


def findings(objects: list[Object]) -> Iterator[str]:
    """Everything that is wrong, each with the object it is about."""
    known = {identity(thing)[1:] for thing in objects}
    for thing in objects:
        about = f"{thing['kind']} {thing['metadata']['name']}"
        yield from (f"{about}: {said}" for said in _names(thing))
    for service in services(objects):
        about = f"Service {service['metadata']['name']}"
        yield from (
            f"{about}: {said}" for said in [*webhook.refused(service), *_decided(service), *_references(service, known)]
        )
    for thing in objects:
        if thing["kind"] in ("Trigger", "PingSource", "Broker"):
            about = f"{thing['kind']} {thing['metadata']['name']}"
            yield from (f"{about}: {said}" for said in [*webhook.sinks(thing), *_eventing(thing, known)])
    yield from _settings(objects)


def _names(thing: Object) -> Iterator[str]:
    template = thing.get("spec", {}).get("template", {}) if isinstance(thing.get("spec"), dict) else {}
    for metadata in (thing["metadata"], template.get("metadata", {}) if isinstance(template, dict) else {}):
        yield from (
            f"annotation {name} is none that we know" for name in set(metadata.get("annotations", {})) - ANNOTATIONS
        )
        yield from (f"label {name} is none that we know" for name in set(metadata.get("labels", {})) - LABELS)


def _decided(service: Object) -> Iterator[str]:
    """What this project wants of each service, for the reasons that the manifests give."""
    name, spec, said = service["metadata"]["name"], service["spec"]["template"]["spec"], webhook.annotations(service)
    (container,) = spec["containers"]
    wanted = (
        {"target-utilization-percentage": "100", "initial-scale": "0", "min-scale": "0"}
        if name != "gateway"
        else {"min-scale": "1"}
    )
    for key, value in wanted.items():
        if said.get(webhook.AUTOSCALING + key) != value:
            yield f"{key} is not {value}"
    if webhook.AUTOSCALING + "max-scale" not in said:
        yield "no max-scale"
    visibility = service["metadata"]["labels"].get("networking.knative.dev/visibility")
    if (visibility == "cluster-local") != (name != "gateway"):
        yield "only the gateway may be reached from outside"
    if spec.get("automountServiceAccountToken") is not False or spec.get("enableServiceLinks") is not False:
        yield "the API's token or service links are not switched off"
    security = container.get("securityContext", {})
    strict = {"runAsNonRoot": True, "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False}
    if any(security.get(key) is not value for key, value in strict.items()) or security.get("capabilities") != {
        "drop": ["ALL"]
    }:
        yield "the container may do more than it needs"
    probe = container["startupProbe"]
    patience_s = probe["periodSeconds"] * probe["failureThreshold"]
    if patience_s >= webhook.seconds(said.get("serving.knative.dev/progress-deadline", "600s")):
        yield "the start-up probe outlasts the progress deadline"
    if "nvidia.com/gpu" in container["resources"]["limits"]:
        yield from _gpu(spec, said, patience_s)
    by_name = {"name": "KNAPPER_SAMPLER", "value": "vllm"} in container.get("env", [])
    if by_name or any(each["name"] == "FUNCTION_SOURCES" for each in container.get("env", [])):  # of one pod for both
        yield from _vllm(spec)


def _gpu(spec: Object, said: dict[str, str], patience_s: float) -> Iterator[str]:
    if patience_s < COLD_START_S:
        yield "the start-up probe gives up before a GPU node can be there"
    if "nvidia.com/gpu" not in {each.get("key") for each in spec.get("tolerations", [])}:
        yield "a GPU is asked for, and the taint of GPU nodes is not tolerated"
    if not any("accelerator" in key for key in spec.get("nodeSelector", {})):
        yield "a GPU is asked for, and not which"
    for key, value in {"panic-threshold-percentage": "1000", "target-burst-capacity": "-1"}.items():
        if said.get(webhook.AUTOSCALING + key) != value:
            yield f"{key} is not {value}"


def _vllm(spec: Object) -> Iterator[str]:
    (container,) = spec["containers"]
    if "nvidia.com/gpu" not in container["resources"]["limits"]:
        yield "vLLM's image is for GPUs, and none is asked for"
    if not re.search(r"/sample-vllm[:@]", container["image"]):
        yield f"vLLM is not in the image {container['image']}"
    shelf = 64.0 / 1024  # GiB of /dev/shm that a container has by itself
    volumes = {each["name"]: each for each in spec["volumes"]}
    for mount in container["volumeMounts"]:
        empty = volumes.get(mount["name"], {}).get("emptyDir", {})
        if mount["mountPath"] == "/dev/shm" and empty.get("medium") == "Memory":
            shelf = gib(empty.get("sizeLimit", "0Gi"))
    if shelf < 1 + limits.adapters_cached_bytes_max / 2**30:
        yield "/dev/shm has no room for the adapters that vLLM keeps"
    if shelf >= gib(container["resources"]["limits"]["memory"]) / 2:
        yield "/dev/shm takes half of the container's memory"


def gib(text: str) -> float:
    assert text.endswith("Gi"), text
    return float(text.removesuffix("Gi"))


def _references(service: Object, known: set[tuple[str, str, str]]) -> Iterator[str]:
    """ConfigMaps and accounts that are named must be there."""
    namespace, spec = service["metadata"]["namespace"], service["spec"]["template"]["spec"]
    named = [("ServiceAccount", spec["serviceAccountName"])]
    for container in spec["containers"]:
        named += [
            ("ConfigMap", each["configMapRef"]["name"])
            for each in container.get("envFrom", [])
            if "configMapRef" in each
        ]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        yield from (f"volume {each} is not there" for each in mounted - {volume["name"] for volume in spec["volumes"]})
    for volume in spec["volumes"]:
        sources = [volume, *volume.get("projected", {}).get("sources", [])]
        named += [("ConfigMap", each["configMap"]["name"]) for each in sources if "configMap" in each]
    yield from (f"{kind} {name} is not there" for kind, name in named if (kind, namespace, name) not in known)


def _eventing(thing: Object, known: set[tuple[str, str, str]]) -> Iterator[str]:
    spec = thing["spec"]
    delivery = spec.get("delivery")
    sinks = [spec.get("subscriber"), spec.get("sink"), (delivery or {}).get("deadLetterSink")]
    for ref in (sink["ref"] for sink in filter(None, sinks) if "ref" in sink):
        if (ref["kind"], ref.get("namespace", thing["metadata"]["namespace"]), ref["name"]) not in known:
            yield f"sink {ref['name']} is not there"
    if "broker" in spec and ("Broker", thing["metadata"]["namespace"], spec["broker"]) not in known:
        yield f"Broker {spec['broker']} is not there"
    if delivery is not None:
        if "deadLetterSink" not in delivery:
            yield "what cannot be delivered is thrown away"
        if outlasts_s(delivery) < 2 * COLD_START_S:
            yield "gives up before a GPU node can be there"
    elif thing["kind"] != "PingSource":
        yield "no delivery: Knative's default gives up after 205 s"
    if thing["kind"] == "Broker":
        notes, config = thing["metadata"].get("annotations", {}), spec["config"]
        of_channels = notes.get("eventing.knative.dev/broker.class", "MTChannelBasedBroker") == "MTChannelBasedBroker"
        if of_channels and notes.get("messaging.knative.dev/async-handler") != "true":
            yield "a POST to it waits for the whole chain of events behind it (messaging.knative.dev/async-handler)"
        if (config["kind"], config["namespace"], config["name"]) not in known:
            yield f"its {config['kind']} {config['name']} is not there"


def outlasts_s(delivery: Object) -> float:
    """How long deliveries are tried again, not counting the attempts themselves."""
    delay, retries = webhook.seconds(delivery.get("backoffDelay", "PT0.2S")), delivery.get("retry", 0)
    if delivery.get("backoffPolicy") == "exponential":
        return sum(delay * float(2**n) for n in range(1, int(retries) + 1))
    return sum(delay * n for n in range(1, retries + 1))


def _settings(objects: list[Object]) -> Iterator[str]:
    """Our programs refuse unknown KNAPPER_ variables and wrong values: what a manifest sets must be a setting."""
    fields = {variable(name) for name in Settings.__struct_fields__}
    given: list[tuple[str, str]] = []
    for thing in objects:
        if thing["kind"] == "ConfigMap" and thing["metadata"]["name"] == "knapper":
            given += thing["data"].items()
    for service in services(objects):
        for container in service["spec"]["template"]["spec"]["containers"]:
            given += [(each["name"], each.get("value", "")) for each in container.get("env", [])]
    for name, value in given:
        if name.startswith("KNAPPER_") and name not in fields:
            yield f"{name}={value} is no setting"
            continue
        try:
            Settings.load(
                {name: value.replace("PROJECT_ID", "a-project")} if name.startswith("KNAPPER_") and value else {}
            )
        except InvalidField as error:
            yield str(error)
