"""The rules of Knative's webhooks that webhook.py restates find what they are for."""

import copy

import pytest

from tests.manifests import rules
from tests.manifests.rendering import rendered
from tests.manifests.test_manifests import Breaking, container, put, said, trigger

SCALING = "autoscaling.knative.dev/"
REFUSED: dict[str, tuple[Breaking, str]] = {
    "a port of queue-proxy's": (
        lambda all_: put(container(all_)["ports"][0], containerPort=8012), "port 8012 is queue-proxy's",
    ),
    "a port with a name": (lambda all_: put(container(all_)["ports"][0], name="http"), "a port is named http"),
    "a container of Knative's": (lambda all_: put(container(all_), name="queue-proxy"), "name of Knative's own"),
    "half a second of a window": (lambda all_: put(said(all_), **{f"{SCALING}window": "60.5s"}), "window outside"),
    "two hours of idling": (
        lambda all_: put(said(all_), **{f"{SCALING}scale-to-zero-pod-retention-period": "2h"}), "over 1 h",
    ),
    "two hours until pods go": (lambda all_: put(said(all_), **{f"{SCALING}scale-down-delay": "2h"}), "over 1 h"),
    "a metric of the other autoscaler": (lambda all_: put(said(all_), **{f"{SCALING}metric": "cpu"}), "metric cpu"),
    "one to begin with": (lambda all_: put(said(all_), **{f"{SCALING}activation-scale": "1"}), "activation-scale"),
    "a burst of minus two": (
        lambda all_: put(said(all_), **{f"{SCALING}target-burst-capacity": "-2"}), "target-burst-capacity below 0",
    ),
    "no target": (lambda all_: put(said(all_), **{f"{SCALING}target": "0"}), "target outside"),
    "no panic": (lambda all_: put(said(all_), **{f"{SCALING}panic-threshold-percentage": "100"}), "outside 110"),
    "less than none at first": (lambda all_: put(said(all_), **{f"{SCALING}initial-scale": "-1"}), "initial-scale out"),
    "a deadline of parts of seconds": (
        lambda all_: put(said(all_), **{"serving.knative.dev/progress-deadline": "2400.5s"}), "progress-deadline is no",
    ),
    "a place twice": (
        lambda all_: container(all_)["volumeMounts"].append(dict(container(all_)["volumeMounts"][0])), "mounted twice",
    ),
    "a place from nowhere": (
        lambda all_: put(container(all_)["volumeMounts"][0], mountPath="tmp"), "does not begin at /",
    ),
    "a whole address beside a reference": (
        lambda all_: put(trigger(all_)["subscriber"], uri="http://elsewhere/sample/"), "beside a reference",
    ),
    "half an address": (
        lambda all_: put(trigger(all_)["delivery"], deadLetterSink={"uri": "/dead"}), "neither a reference nor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_a_webhook_refuses_is_found(mistake: str) -> None:
    objects = copy.deepcopy(rendered("overlays/gke-l4"))
    breaking, words = REFUSED[mistake]
    breaking(objects)
    assert [finding for finding in rules.findings(objects) if words in finding] != []
