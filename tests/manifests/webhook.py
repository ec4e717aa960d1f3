"""What Knative's webhooks refuse of a Service or Trigger, as seen on clusters and read in their source.

knative/serving 1.22.1, 1.23.0 and its main branch of 2026-08-21, which validate our fields alike:
pkg/apis/serving/k8s_validation.go (containers, ports, volumes), pkg/apis/serving/v1/revision_validation.go (time-outs,
progress-deadline), pkg/apis/autoscaling/annotation_validation.go. knative/eventing 1.22.2:
vendor/knative.dev/pkg/apis/duck/v1/destination.go.
"""

import re
from collections.abc import Iterator

from knapper.cluster.kustomize import Object

AUTOSCALING = "autoscaling.knative.dev/"
_LONGEST_S = 3600  # WindowMax
_PORTS = {8008, 8012, 8013, 8022, 9090, 9091}  # of queue-proxy
_NUMBERS = {  # annotation: least and most
    "target": (0.01, float("inf")), "target-utilization-percentage": (1, 100), "panic-window-percentage": (1, 100),
    "panic-threshold-percentage": (110, 1000), "initial-scale": (0, float("inf")),
}  # fmt: skip


def annotations(service: Object) -> dict[str, str]:
    found: dict[str, str] = service["spec"]["template"]["metadata"]["annotations"]
    return found


def seconds(text: str) -> float:
    """Of 90s, 1m30s, PT2S, PT0.2S, PT15M."""
    units = {"h": 3600, "m": 60, "s": 1}
    parts = re.findall(r"([\d.]+)([hms])", text.lower().removeprefix("pt"))
    assert parts, text
    return float(sum(float(number) * units[unit] for number, unit in parts))


def refused(service: Object) -> Iterator[str]:
    yield from _volumes(service)
    yield from _scale(annotations(service))
    spec = service["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    if len(container.get("ports", [])) > 1:
        yield "more than one port"
    for port in container.get("ports", []):
        if port.get("name", "") not in ("", "h2c", "http1") or port.get("protocol", "TCP") != "TCP":
            yield f"a port is named {port.get('name')}, or not TCP; allowed: no name, h2c, http1"
        if port["containerPort"] in _PORTS:
            yield f"port {port['containerPort']} is queue-proxy's"
    if container["name"] == "queue-proxy":
        yield "a container with the name of Knative's own"
    if any(each["name"] in ("PORT", "K_SERVICE", "K_CONFIGURATION", "K_REVISION") for each in container.get("env", [])):
        yield "an environment variable that Knative sets"
    if not 0 <= spec.get("containerConcurrency", 0) <= 1000:
        yield "containerConcurrency over 1000"
    if spec.get("timeoutSeconds", 300) > 600:
        yield "timeoutSeconds over the 600 that Knative allows"
    if spec.get("responseStartTimeoutSeconds", 300) > spec.get("timeoutSeconds", 300):
        yield "responseStartTimeoutSeconds over timeoutSeconds"
    deadline = seconds(annotations(service).get("serving.knative.dev/progress-deadline", "600s"))
    if deadline <= 0 or deadline % 1:
        yield "progress-deadline is no whole number of seconds above 0"


def _scale(said: dict[str, str]) -> Iterator[str]:
    scale = {name.removeprefix(AUTOSCALING): value for name, value in said.items() if name.startswith(AUTOSCALING)}
    least, most = int(scale.get("min-scale", 0)), int(scale.get("max-scale", 0))
    if least > most > 0:
        yield "min-scale above max-scale"
    if "activation-scale" in scale:
        first = int(scale["activation-scale"])
        if first < max(2, least) or 0 < most < first:
            yield "activation-scale below 2 or min-scale, or above max-scale"
    if "window" in scale and (not 6 <= seconds(scale["window"]) <= _LONGEST_S or seconds(scale["window"]) % 1):
        yield "window outside 6 s to 1 h, or no whole number of seconds"
    for name in ("scale-down-delay", "scale-to-zero-pod-retention-period"):
        if not 0 <= seconds(scale.get(name, "0s")) <= _LONGEST_S:
            yield f"{name} over 1 h"
    for name, (lowest, highest) in _NUMBERS.items():
        if name in scale and not lowest <= float(scale[name]) <= highest:
            yield f"{name} outside {lowest:g} to {highest:g}"
    burst = float(scale.get("target-burst-capacity", 0))
    if burst < 0 and burst != -1:
        yield "target-burst-capacity below 0, and not -1"
    if not scale.get("class", "kpa").startswith("hpa") and scale.get("metric", "rps") not in ("concurrency", "rps"):
        yield f"metric {scale['metric']} is none of Knative's autoscaler: concurrency, rps"


def _volumes(service: Object) -> Iterator[str]:
    spec = service["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = container["volumeMounts"]
    yield from (f"volume {name} is not mounted" for name in set(volumes) - {mount["name"] for mount in mounts})
    places = [mount["mountPath"].rstrip("/") for mount in mounts]
    yield from (f"{place} is mounted twice" for place in set(places) if places.count(place) > 1)
    for mount in mounts:
        if mount["mountPath"].rstrip("/") in ("", "/dev", "/dev/log"):
            yield f"{mount['mountPath']} is Knative's own"
        if not mount["mountPath"].startswith("/"):
            yield f"{mount['mountPath']} does not begin at /"
        if not {"emptyDir", "persistentVolumeClaim"} & set(volumes.get(mount["name"], {})) and not mount.get(
            "readOnly"
        ):
            yield f"volume {mount['name']} is not mounted readOnly"


def sinks(thing: Object) -> Iterator[str]:
    """Of a Trigger, Broker or PingSource: an address is beside a reference as a path, and alone as a whole."""
    spec = thing["spec"]
    for sink in filter(
        None, (spec.get("subscriber"), spec.get("sink"), spec.get("delivery", {}).get("deadLetterSink"))
    ):
        absolute = re.match(r"[a-z][a-z0-9+.-]*:", sink.get("uri", ""))
        if "ref" in sink and absolute:
            yield f"{sink['uri']} is a whole address, beside a reference"
        if "ref" not in sink and not absolute:
            yield "neither a reference nor a whole address"
