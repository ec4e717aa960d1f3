"""The objects of one base model on a cluster, derived from the manifests of another."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

import msgspec
from kubernetes.utils import parse_quantity
from kubernetes.utils.quantity import format_quantity

from knapper.catalogue.declared_models import encode
from knapper.cluster.kustomize import Object
from knapper.errors import InvalidField
from knapper.state.model_record import ModelRecord, slug

NAMESPACE = "knapper"
LABEL = "knapper.dev/model"
SERVICES = ("train-step", "sample")
MODELS = "knapper-models"  # the ConfigMap that the gateway reads
GPUS = (2, 4, 8)  # of a pod that has several
_DEVICES, _SHARED_MEMORY = "KNAPPER_DEVICES", "/dev/shm"
_ACCELERATOR = "cloud.google.com/gke-accelerator"
_PLACEHOLDER = re.compile(r"PROJECT_ID|PROJECT_NUMBER|REGION-docker")


@dataclass(frozen=True)
class Wanted:
    """The arguments of `knapper deploy add`."""

    record: ModelRecord  # its URLs are set here
    accelerator: str  # by its GKE name; empty: that of the manifests
    sample_replicas_max: int | None = None
    gpus: int | None = None  # of a pod; None: those of the manifests


def objects(manifests: Sequence[Object], wanted: Wanted) -> list[Object]:
    """Services and Triggers of the model, and its entry in the ConfigMap. Raises InvalidField.

    Of manifests whose train-step samples too there is one Service, and both Triggers lead to it.
    """
    services = {"train-step": only(manifests, "serving.knative.dev/v1", "Service", "train-step")}
    if not (one_pod := samples_too(services["train-step"])):
        services["sample"] = only(manifests, "serving.knative.dev/v1", "Service", "sample")
    triggers = {each: only(manifests, "eventing.knative.dev/v1", "Trigger", each) for each in SERVICES}
    model = wanted.record.name
    ours = services["train-step"]["metadata"]["labels"][LABEL] == slug(model)  # the manifests' own: it keeps its names
    names = {each: each if ours else f"{each}-{slug(model)[:8]}" for each in SERVICES}
    found = [_service(service, each, names[each], wanted) for each, service in services.items()]
    if one_pod and wanted.sample_replicas_max is not None:
        allowed = "none where one pod trains and samples: runs share it"
        raise InvalidField("sample-replicas-max", wanted.sample_replicas_max, allowed)
    hosts = names | ({"sample": names["train-step"]} if one_pod else {})
    found += [_trigger(triggers[each], names[each], hosts[each], model) for each in SERVICES]
    if placeholder := _PLACEHOLDER.search(repr(found)):
        raise InvalidField(
            "manifests", placeholder[0], "an overlay with the names of your project in it",
            "Give the one that terraform/stages/30-functions wrote: --manifests .../.rendered/NAME",
        )  # fmt: skip
    urls = {each: f"http://{host}.{NAMESPACE}.svc.cluster.local" for each, host in hosts.items()}
    path = "/sample/" if one_pod else ""
    record = msgspec.structs.replace(
        wanted.record, train_step_url=urls["train-step"], sample_url=urls["sample"] + path
    )  # fmt: skip
    return [*found, _models({f"{slug(model)}.json": encode(record)})]


def no_entry(model: str) -> Object:
    """A merge patch that takes the model out of the ConfigMap."""
    return _models({f"{slug(model)}.json": None})


def _models(data: Mapping[str, str | None]) -> Object:
    metadata = {"name": MODELS, "namespace": NAMESPACE}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": dict(data)}


def only(manifests: Sequence[Object], version: str, kind: str, name: str) -> Object:
    """A copy of the object, to be changed. Raises InvalidField where there is none."""
    for thing in manifests:
        if (thing["apiVersion"], thing["kind"], thing["metadata"]["name"]) == (version, kind, name):
            return copy.deepcopy(thing)
    raise InvalidField("manifests", f"{kind} {name}", "a kustomization of knative/overlays, or one that stands on it")


def _service(thing: Object, service: str, name: str, wanted: Wanted) -> Object:
    record, template = wanted.record, thing["spec"]["template"]
    thing["metadata"]["name"] = name
    for metadata in (thing["metadata"], template["metadata"]):
        metadata["labels"][LABEL] = slug(record.name)
    (container,) = template["spec"]["containers"]
    ours = {"KNAPPER_MODEL": record.name, "KNAPPER_MODEL_DIRECTORY": record.directory, "KNAPPER_DTYPE": record.dtype}
    container["env"] = [
        *({"name": key, "value": value} for key, value in ours.items()),
        *(each for each in container["env"] if each["name"] not in ours),
    ]
    if wanted.accelerator:
        if not has_gpu(thing):
            raise InvalidField(
                "accelerator", wanted.accelerator, "none with manifests that ask for no GPU",
                "Take an overlay for GPUs, or leave --accelerator out",
            )  # fmt: skip
        template["spec"]["nodeSelector"] = template["spec"].get("nodeSelector", {}) | {_ACCELERATOR: wanted.accelerator}
    if wanted.gpus is not None:
        _spread(thing, wanted.gpus)
    if service == "sample" and wanted.sample_replicas_max is not None:
        scale = str(wanted.sample_replicas_max)
        template["metadata"]["annotations"]["autoscaling.knative.dev/max-scale"] = scale
    if samples_by_vllm(thing) or samples_too(thing):
        container["image"] = _with_vllm(container["image"])
    return thing


def _spread(thing: Object, gpus: int) -> None:
    """Have so many GPUs in a pod, with CPUs and memory in proportion, and the model spread over them."""
    if gpus not in GPUS or not has_gpu(thing) or shares_card(thing):
        raise InvalidField(
            "gpus", gpus, "2, 4 or 8, with manifests whose pods have GPUs of their own",
            "Take an overlay such as gke-h100, without components/gpu-time-sharing",
        )  # fmt: skip
    spec = thing["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    resources = container["resources"]
    before = int(resources["limits"]["nvidia.com/gpu"])
    for amounts in (resources["requests"], resources["limits"]):
        for name, amount in amounts.items():
            amounts[name] = _times(str(amount), gpus, before)
    container["env"] = [each for each in container["env"] if each["name"] != _DEVICES]
    container["env"].append({"name": _DEVICES, "value": str(gpus)})
    if all(mount["mountPath"] != _SHARED_MEMORY for mount in container["volumeMounts"]):  # vLLM's pods have one
        container["volumeMounts"].append({"name": "shm", "mountPath": _SHARED_MEMORY})
        spec["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}})


def _times(amount: str, after: int, before: int) -> str:
    """A quantity of Kubernetes, of so many GPUs, for another number of them; in the unit that it has."""
    try:
        quantity: Decimal = parse_quantity(amount)  # type: ignore[no-untyped-call]  # the library has no types
    except ValueError as error:
        raise InvalidField("resources", amount, "a quantity of Kubernetes, such as 4, 500m or 16Gi") from error
    scaled: str = format_quantity(quantity * after / before, amount.lstrip("0123456789."))
    return scaled


def samples_by_vllm(service: Object) -> bool:
    (container,) = service["spec"]["template"]["spec"]["containers"]
    return {"name": "KNAPPER_SAMPLER", "value": "vllm"} in container.get("env", [])


def samples_too(train_step: Object) -> bool:
    """Whether a Service train-step has sample in its pods as well (knative/components/one-pod)."""
    (container,) = train_step["spec"]["template"]["spec"]["containers"]
    return any(each["name"] == "FUNCTION_SOURCES" and "/sample/" in each["value"] for each in container.get("env", []))


def shares_card(service: Object) -> bool:
    """Whether its pods have a part of a GPU that other pods use (knative/components/gpu-time-sharing)."""
    (container,) = service["spec"]["template"]["spec"]["containers"]
    return any(each["name"] == "KNAPPER_GPU_MEMORY_SHARE" for each in container.get("env", []))


def has_gpu(service: Object) -> bool:
    (container,) = service["spec"]["template"]["spec"]["containers"]
    return "nvidia.com/gpu" in container["resources"]["limits"]


def _with_vllm(image: str) -> str:
    """The image of the same release that has vLLM in it. Raises InvalidField if the name does not show it."""
    if re.search(r"(^|/)sample-vllm([:@]|$)", image):
        return image
    renamed, count = re.subn(r"(^|/)(?:sample|train-step)(:[^/@]+)?$", r"\1sample-vllm\2", image)
    if not count:
        raise InvalidField(
            "sampler", f"vllm with the image {image}", "the image by its tag: sample-vllm has the same",
            "Or write an overlay with knative/components/vllm and the image's digest, and give it by --manifests",
        )  # fmt: skip
    return renamed


def _trigger(thing: Object, name: str, service: str, model: str) -> Object:
    thing["metadata"]["name"] = name
    thing["metadata"]["labels"][LABEL] = slug(model)
    thing["spec"]["subscriber"]["ref"]["name"] = service
    thing["spec"]["filters"] = _renamed(thing["spec"]["filters"], slug(model))
    return thing


def _renamed(filters: object, model: str) -> object:
    """The filters for another model."""
    if isinstance(filters, list):
        return [_renamed(each, model) for each in filters]
    if isinstance(filters, dict):
        return {key: model if key == "model" else _renamed(value, model) for key, value in filters.items()}
    return filters
