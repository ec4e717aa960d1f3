"""Objects against schemas: Knative's own CRDs, with unknown fields refused, and Kubernetes' core."""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from knapper.cluster.kustomize import Object
from tests.manifests import pod_snapshots
from tests.manifests.rendering import ROOT

# The CRD files of Knative, in a directory `knative-crds` of a sibling of the checkout: serving/ and eventing/ as in
# those projects' config/core/300-resources and config/core/resources.
CRDS = next(iter(sorted(ROOT.parent.glob("*/knative-crds"))), None)
KUBERNETES = ("1.34", "1.35", "1.36")
_OPERATOR = {
    "KnativeServing",
    "KnativeEventing",
}  # of Knative's operator: knative.py

# Where a CRD says only "anything": what the API's types have there.
_DESTINATION = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "ref": {
            "type": "object", "additionalProperties": False, "required": ["kind", "name"],
            "properties": {name: {"type": "string"} for name in ("apiVersion", "kind", "name", "namespace")},
        },
        "uri": {"type": "string"}, "CACerts": {"type": "string"}, "audience": {"type": "string"},
    },
}  # fmt: skip
_DELIVERY = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "deadLetterSink": _DESTINATION, "retry": {"type": "integer", "minimum": 0}, "timeout": {"type": "string"},
        "backoffPolicy": {"enum": ["linear", "exponential"]}, "backoffDelay": {"type": "string"},
        "retryAfterMax": {"type": "string"}, "format": {"enum": ["json", "binary"]},
    },
}  # fmt: skip
_ATTRIBUTES = {
    "type": "object", "minProperties": 1, "propertyNames": {"pattern": "^[a-z0-9]{1,20}$"},
    "additionalProperties": {"type": "string"},
}  # fmt: skip
_FILTER = {
    "$defs": {
        "filters": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/filter"}},
        "filter": {
            "type": "object", "additionalProperties": False, "minProperties": 1, "maxProperties": 1,
            "properties": {
                **dict.fromkeys(("exact", "prefix", "suffix"), _ATTRIBUTES), "cesql": {"type": "string"},
                **{key: {"$ref": "#/$defs/filters"} for key in ("all", "any")},
                "not": {"$ref": "#/$defs/filter"},
            },
        },
    },
    "type": "array", "items": {"$ref": "#/$defs/filter"},
}  # fmt: skip


def errors(thing: Object) -> Iterator[str]:
    """What is wrong with the object, if anything."""
    group = thing["apiVersion"].rpartition("/")[0]
    if group.endswith("knative.dev") and thing["kind"] not in _OPERATOR:
        schema = _schemas().get((thing["apiVersion"], thing["kind"]))
        if schema is None:
            yield f"{thing['apiVersion']} {thing['kind']}: no such kind"
            return
        checks = [(schema, thing), *_more(thing)]
        for rules, value in checks:
            for error in jsonschema.Draft202012Validator(rules).iter_errors(value):
                yield f"{'.'.join(map(str, error.absolute_path)) or thing['kind']}: {error.message[:300]}"
        if thing["kind"] == "Service":
            yield from _core(pod_of(thing))
    elif group == pod_snapshots.GROUP:
        yield from pod_snapshots.errors(thing)
    elif thing["kind"] not in _OPERATOR:
        yield from _core(thing)


def _more(thing: Object) -> Iterator[tuple[Object, Any]]:
    if thing["kind"] in ("Trigger", "Broker"):
        yield _DELIVERY, thing["spec"].get("delivery", {})
    if thing["kind"] == "Trigger":
        yield _FILTER, thing["spec"].get("filters", [])


def _core(thing: Object) -> Iterator[str]:
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message[:300]}"


def pod_of(service: Object) -> Object:
    """The pod of a Knative Service, for what the CRD leaves open: CSI volumes, tolerations, node selectors."""
    spec = copy.deepcopy(service["spec"]["template"]["spec"])
    for own in ("containerConcurrency", "timeoutSeconds", "responseStartTimeoutSeconds", "idleTimeoutSeconds"):
        spec.pop(own, None)
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": service["metadata"]["name"], "namespace": service["metadata"]["namespace"]},
        "spec": spec,
    }


@cache
def _schemas() -> dict[tuple[str, str], Object]:
    assert CRDS
    found = {}
    for path in sorted(Path(CRDS).rglob("*.yaml")):
        for crd in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            if not crd or crd["kind"] != "CustomResourceDefinition":
                continue
            for version in crd["spec"]["versions"]:
                schema = copy.deepcopy(version["schema"]["openAPIV3Schema"])
                schema.get("properties", {}).update(apiVersion={}, kind={}, metadata={}, status={})
                _close(schema)
                found[f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]] = schema
    return found


def _close(schema: Any) -> None:
    """Refuse unknown fields wherever the schema names fields and does not ask to keep others."""
    if isinstance(schema, list):
        for each in schema:
            _close(each)
    if not isinstance(schema, dict):
        return
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    for key, value in schema.items():
        if key not in ("enum", "required", "default", "example"):
            _close(value)
