"""Which subscriber receives which event: as in knative/base/triggers.yaml, but for `model`: see `subscribers`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from knapper.events import cloudevents

Exact = Mapping[str, str]


@dataclass(frozen=True)
class Trigger:
    """`any_of`: attributes that an event has, all of one of them. `prefix`: how its subject begins."""

    subscriber: str
    any_of: tuple[Exact, ...]
    prefix: str = ""

    def wants(self, attributes: Mapping[str, str]) -> bool:
        return attributes.get("subject", "").startswith(self.prefix) and any(
            all(attributes.get(name) == value for name, value in exact.items()) for exact in self.any_of
        )


TRIGGERS: Final = (
    Trigger(
        "sample",
        (
            {"type": cloudevents.JOB_STARTED, "kind": "rl"},
            {"type": cloudevents.ADAPTER_STEPPED, "kind": "rl"},
            {"type": cloudevents.ROLLOUTS_ANSWERED},
        ),
    ),
    Trigger("reward", ({"type": cloudevents.ROLLOUTS_SAMPLED},)),
    Trigger(
        "train_step",
        (
            {"type": cloudevents.ROLLOUTS_SCORED},
            {"type": cloudevents.JOB_STARTED, "kind": "sft"},
            {"type": cloudevents.ADAPTER_STEPPED, "kind": "sft"},
            {"type": cloudevents.JOB_STARTED, "kind": "dpo"},
            {"type": cloudevents.ADAPTER_STEPPED, "kind": "dpo"},
            {"type": cloudevents.JOB_STARTED, "kind": "episodes"},
            {"type": cloudevents.ADAPTER_STEPPED, "kind": "episodes"},
        ),
    ),
    Trigger("gateway", ({"type": cloudevents.OBJECT_FINALIZED},), prefix="objects/inbox/"),
    Trigger("gateway", tuple({"type": ended} for ended in cloudevents.JOB_ENDED)),
)
