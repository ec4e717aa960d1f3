"""The CRDs of GKE Pod snapshots, as their reference describes them: they are installed by GKE, and in no repository.

https://docs.cloud.google.com/kubernetes-engine/docs/reference/crds/podsnapshot (2026-04-10)
"""

from collections.abc import Iterator
from typing import Any, Final

import jsonschema

from knapper.cluster.kustomize import Object

GROUP: Final = "podsnapshot.gke.io"


def _closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


_TEXT: Final = {"type": "string", "minLength": 1}
_TEXTS: Final = {"type": "array", "items": _TEXT}
_SPECS: Final = {
    "PodSnapshotStorageConfig": _closed(
        ["snapshotStorageConfig"],
        snapshotStorageConfig=_closed(["gcs"], gcs=_closed(["bucket"], bucket=_TEXT, path=_TEXT)),
    ),
    "PodSnapshotPolicy": _closed(
        ["selector", "storageConfigName", "triggerConfig"],
        storageConfigName=_TEXT,
        selector=_closed(
            [],
            matchLabels={"type": "object", "additionalProperties": {"type": "string"}},
            matchExpressions={
                "type": "array",
                "items": _closed(
                    ["key", "operator"],
                    key=_TEXT, operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist"]}, values=_TEXTS,
                ),
            },
        ),
        triggerConfig=_closed(
            ["type"], type={"enum": ["workload", "manual"]}, postCheckpoint={"enum": ["stop", "resume"]}
        ),
        retentionConfig=_closed(
            ["lastAccessTimeout"], lastAccessTimeout={"type": "string", "pattern": "^[1-9][0-9]*(y|mo|d|h|min)$"}
        ),
        snapshotGroupingRules=_closed(
            ["groupByLabelValue"],
            groupByLabelValue=_closed(
                ["labels"],
                labels=_TEXTS,
                groupRetentionPolicy=_closed(
                    ["maxSnapshotCountPerGroup"], maxSnapshotCountPerGroup={"type": "integer", "minimum": 0}
                ),
            ),
        ),
    ),
}  # fmt: skip


def errors(thing: Object) -> Iterator[str]:
    """What is wrong with the object, if anything."""
    if thing["apiVersion"] != f"{GROUP}/v1" or thing["kind"] not in _SPECS:
        yield f"{thing['apiVersion']} {thing['kind']}: no such kind"
        return
    for error in jsonschema.Draft202012Validator(_SPECS[thing["kind"]]).iter_errors(thing["spec"]):
        yield f"{'.'.join(map(str, error.absolute_path)) or thing['kind']}: {error.message[:300]}"
