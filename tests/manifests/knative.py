"""What Knative's webhooks and its operator's CRDs take of a cluster's configuration, restated as far as we use it.

Read in knative/serving 1.22.1 and 1.23.0: cmd/webhook/main.go names the ConfigMaps that are checked;
pkg/apis/config/{features,defaults}.go, pkg/autoscaler/config/config.go and pkg/deployment/config.go check them.
In knative/operator 1.22.1 and 1.23.0: config/crd/bases/operator.knative.dev_knative{servings,eventings}.yaml,
pkg/reconciler/common/poddisruptionbudget_override.go, and the releases that it installs, in cmd/operator/kodata.
"""

from collections.abc import Iterator, Mapping

from knapper.cluster.kustomize import Object

_PODSPEC = (
    "affinity", "dnsconfig", "dnspolicy", "fieldref", "hostaliases", "hostipc", "hostnetwork", "hostpid",
    "init-containers", "nodeselector", "persistent-volume-claim", "persistent-volume-write", "priorityclassname",
    "runtimeclassname", "schedulername", "securitycontext", "shareprocessnamespace", "tolerations",
    "topologyspreadconstraints", "volumes-csi", "volumes-emptydir", "volumes-hostpath", "volumes-image",
    "volumes-mount-propagation",
)  # fmt: skip
FLAGS = {
    *(f"kubernetes.podspec-{name}" for name in _PODSPEC), "kubernetes.containerspec-addcapabilities",
    "autodetect-http2", "multi-container", "multi-container-probing", "queueproxy.mount-podinfo",
    "queueproxy.resource-defaults", "tag-header-based-routing",
}  # fmt: skip
AUTOSCALER = {"allow-zero-initial-scale", "initial-scale", "min-scale", "max-scale", "max-scale-limit"}
DEFAULTS = {"max-revision-timeout-seconds", "revision-timeout-seconds", "revision-response-start-timeout-seconds"}
DEPLOYMENT = {"pod-is-always-schedulable", "progress-deadline", "registries-skipping-tag-resolving"}
_LONGEST_S = 600  # what requests may take where max-revision-timeout-seconds is not set

_WORKLOAD = {
    "affinity", "annotations", "env", "hostNetwork", "labels", "livenessProbes", "name", "nodeSelector",
    "readinessProbes", "replicas", "resources", "tolerations", "topologySpreadConstraints", "version", "volumeMounts",
}  # fmt: skip
_SPEC = {
    "additionalManifests", "clusterProfileRef", "config", "deployments", "high-availability", "manifests", "namespace",
    "podDisruptionBudgets", "registry", "resources", "services", "version", "workloads",
}  # fmt: skip
_SPECS = {
    "KnativeServing": {*_SPEC, "controller-custom-certs", "ingress", "security"},
    "KnativeEventing": {*_SPEC, "defaultBrokerClass", "sinkBindingSelectionMode", "source"},
}
_BUDGET = {"maxUnavailable", "minAvailable", "name", "selector"}
# The budgets of those releases, each minAvailable 80 % of a Deployment of one replica, which is that one.
BUDGETS = {
    "KnativeServing": {"activator-pdb", "webhook-pdb", "3scale-kourier-gateway-pdb"},
    "KnativeEventing": {"eventing-webhook"},
}
_KOURIER = {"bootstrap-configmap", "enabled", "http-port", "https-port", "service-load-balancer-ip", "service-type"}

Maps = Mapping[str, Mapping[str, str]]  # a ConfigMap's name without "config-": its data


def refused(maps: Maps, longest_timeout_s: int = 0) -> Iterator[str]:
    """What the webhook refuses of these ConfigMaps, or takes and ignores; and of services with such a timeout."""
    known = {"features": FLAGS, "autoscaler": AUTOSCALER, "defaults": DEFAULTS, "deployment": DEPLOYMENT}
    for name, data in maps.items():
        yield from (f"config-{name}: {key} is none that we know" for key in set(data) - known.get(name, set(data)))
    yield from _flags(maps.get("features", {}))
    yield from _autoscaler(maps.get("autoscaler", {}))
    defaults = maps.get("defaults", {})
    longest = int(defaults.get("max-revision-timeout-seconds", _LONGEST_S))
    usual = int(defaults.get("revision-timeout-seconds", 300))
    if usual > longest:
        yield "config-defaults: revision-timeout-seconds over max-revision-timeout-seconds"
    if int(defaults.get("revision-response-start-timeout-seconds", usual)) > usual:
        yield "config-defaults: revision-response-start-timeout-seconds over revision-timeout-seconds"
    if longest_timeout_s > longest:
        yield f"a service's timeoutSeconds of {longest_timeout_s} is over max-revision-timeout-seconds, {longest}"


def _flags(data: Mapping[str, str]) -> Iterator[str]:
    """Another value is no error there: the flag keeps its default in silence."""
    for key, value in data.items():
        if value not in ("enabled", "allowed", "disabled"):
            yield f"config-features: {key} is {value!r}; allowed: enabled, allowed, disabled"


def _autoscaler(data: Mapping[str, str]) -> Iterator[str]:
    limit, most, least = (int(data.get(key, 0)) for key in ("max-scale-limit", "max-scale", "min-scale"))
    if limit > 0 and not 1 <= most <= limit:
        yield f"config-autoscaler: max-scale = {most}, must be in [1, max-scale-limit({limit})] range"
    if most and least > most:
        yield "config-autoscaler: min-scale over max-scale"
    if data.get("initial-scale") == "0" and data.get("allow-zero-initial-scale") != "true":
        yield "config-autoscaler: initial-scale = 0 without allow-zero-initial-scale"


def unknown_to_the_operator(thing: Object) -> Iterator[str]:
    """Fields that the CRD of a KnativeServing or KnativeEventing lacks: apply refuses them, Helm prunes them."""
    spec, kind = thing["spec"], thing["kind"]
    yield from (f"{kind}: spec.{key}" for key in set(spec) - _SPECS[kind])
    for part in ("deployments", "workloads"):
        for each in spec.get(part, []):
            yield from (f"{kind}: spec.{part}[].{key}" for key in set(each) - _WORKLOAD)
    for budget in spec.get("podDisruptionBudgets", []):
        yield from (f"{kind}: spec.podDisruptionBudgets[].{key}" for key in set(budget) - _BUDGET)
        if budget["name"] not in BUDGETS[kind]:
            yield f"{kind}: the budget {budget['name']} is none of its, and left out in silence"
        if len({"maxUnavailable", "minAvailable"} & set(budget)) == 2:
            yield f"{kind}: the budget {budget['name']} has both limits, and nothing is installed"
    for name, ingress in spec.get("ingress", {}).items():
        if name != "kourier":
            yield f"{kind}: spec.ingress.{name} is none that we use"
        yield from (f"{kind}: spec.ingress.kourier.{key}" for key in set(ingress) - _KOURIER)
    for name, data in spec.get("config", {}).items():
        yield from (f"{kind}: spec.config.{name}.{key} is no text" for key in data if not isinstance(data[key], str))
