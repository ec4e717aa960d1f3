"""The manifest of decision 67, which nothing applies: against Kubernetes' core, and what the CRDs of LeaderWorkerSet
and Kueue say of the fields that it has.

https://github.com/kubernetes-sigs/lws/blob/main/config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml
https://github.com/kubernetes-sigs/kueue/tree/main/config/components/crd/bases
"""

import copy
from collections.abc import Iterator
from typing import Any, Final

import jsonschema
import kubernetes_validate
import pytest
import yaml

from knapper.cluster.kustomize import Object
from tests.manifests.rendering import ROOT
from tests.manifests.schema import KUBERNETES

PAGE: Final = ROOT / "docs/decisions/0067-more-than-one-node.md"
_ANY: Final = {"type": "object"}


def _closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


_NAME: Final = {"type": "string", "minLength": 1}
_QUANTITY: Final = {"type": "string", "pattern": r"^[0-9]+([KMGTPE]i?)?$"}
_QUOTA: Final = _closed(["name", "nominalQuota"], name=_NAME, nominalQuota=_QUANTITY)
SPECS: Final = {
    "LeaderWorkerSet": _closed(
        ["leaderWorkerTemplate"],
        replicas={"type": "integer"},
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        leaderWorkerTemplate=_closed(
            ["workerTemplate"], size={"type": "integer", "minimum": 1}, leaderTemplate=_ANY, workerTemplate=_ANY,
            restartPolicy={"enum": ["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
        ),
    ),
    "ResourceFlavor": _closed([], nodeLabels=_ANY, tolerations={"type": "array", "items": _ANY}),
    "LocalQueue": _closed([], clusterQueue=_NAME),
    "ClusterQueue": _closed(
        [],
        namespaceSelector=_ANY,
        resourceGroups={
            "type": "array",
            "items": _closed(
                ["coveredResources", "flavors"],
                coveredResources={"type": "array", "items": _NAME},
                flavors={
                    "type": "array",
                    "items": _closed(
                        ["name", "resources"],
                        name=_NAME,
                        resources={"type": "array", "items": _QUOTA},
                    ),
                },
            ),
        },
    ),
}  # fmt: skip


def objects() -> list[Object]:
    _, _, after = PAGE.read_text(encoding="utf-8").partition("```yaml\n")
    return list(yaml.safe_load_all(after.partition("```")[0]))


def of(kind: str, among: list[Object]) -> Object:
    (found,) = [each for each in among if each["kind"] == kind]
    return found


def errors(among: list[Object]) -> Iterator[str]:
    for thing in among:
        if thing["kind"] in SPECS:
            yield from (
                error.message
                for error in jsonschema.Draft202012Validator(SPECS[thing["kind"]]).iter_errors(thing["spec"])
            )
    template = of("LeaderWorkerSet", among)["spec"]["leaderWorkerTemplate"]
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"} | each["metadata"], "spec": each["spec"]}
        for each in (template.get("leaderTemplate"), template.get("workerTemplate"))
        if each is not None
    ]
    for core in [*pods, of("Service", among)]:
        for version in KUBERNETES:
            try:
                kubernetes_validate.validate(core, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield str(error.message)


def test_the_manifest_is_what_its_schemas_say() -> None:
    assert list(errors(objects())) == []


@pytest.mark.parametrize("mistake", ["size", "restart", "container", "quota", "port"])
def test_a_mistake_in_it_is_found(mistake: str) -> None:
    among = copy.deepcopy(objects())
    template = of("LeaderWorkerSet", among)["spec"]["leaderWorkerTemplate"]
    match mistake:
        case "size":
            template["size"] = 0
        case "restart":
            template["restartPolicy"] = "Always"
        case "container":
            template["workerTemplate"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
        case "quota":
            del of("ClusterQueue", among)["spec"]["resourceGroups"][0]["flavors"][0]["resources"][0]["nominalQuota"]
        case "port":
            of("Service", among)["spec"]["ports"][0]["targetPorts"] = 8080
    assert list(errors(among)) != []


def test_its_parts_belong_together() -> None:
    among = objects()
    group, service = of("LeaderWorkerSet", among), of("Service", among)
    template = group["spec"]["leaderWorkerTemplate"]
    leader, worker = template["leaderTemplate"], template["workerTemplate"]
    chosen = service["spec"]["selector"].items()
    assert chosen <= leader["metadata"]["labels"].items(), "the doorbell reaches rank 0"
    assert not chosen <= worker["metadata"]["labels"].items(), "and no other"
    cards = [int(each["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) for each in (leader, worker)]
    devices = cards[0] + (template["size"] - 1) * cards[1]
    for each in (leader, worker):
        assert {"name": "KNAPPER_DEVICES", "value": str(devices)} in each["spec"]["containers"][0]["env"]
    queue, cluster = of("LocalQueue", among), of("ClusterQueue", among)
    assert group["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    assert queue["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    (flavor,) = cluster["spec"]["resourceGroups"][0]["flavors"]
    assert flavor["name"] == of("ResourceFlavor", among)["metadata"]["name"]
    quota = {each["name"]: each["nominalQuota"] for each in flavor["resources"]}
    assert int(quota["nvidia.com/gpu"]) >= devices, "or it is never admitted"
