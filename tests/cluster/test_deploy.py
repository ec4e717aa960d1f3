"""Models come and go on a cluster by commands that can be repeated; the API server is constructed (apiserver.py)."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from kubernetes.utils import parse_quantity

from knapper.cluster.model import _times, _with_vllm
from knapper.errors import InvalidField
from knapper.state.model_record import slug
from tests import command
from tests.cluster.apiserver import Cluster, ready, serving
from tests.manifests import rules, schema
from tests.manifests.rendering import ROOT, rendered

MODEL = "Qwen/Qwen3-8B"
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 12288, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
DEFAULT = "HuggingFaceTB/SmolLM2-135M-Instruct"


def knapper(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return command.knapper(*arguments, environment=environment, cwd=ROOT)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """As terraform/stages/30-functions writes one: the overlay, with a project's names."""
    base = os.path.relpath(ROOT / "knative/overlays/gke-l4", tmp_path / "overlay")
    (tmp_path / "overlay").mkdir()
    names = ("gateway", "train-step", "sample", "reward")
    target = {"group": "serving.knative.dev", "version": "v1", "kind": "Service", "name": "gateway|train-step|sample"}
    bucket = "/spec/template/spec/volumes/0/csi/volumeAttributes/bucketName"
    plan = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": [base],
        "patches": [{"target": target, "patch": json.dumps([{"op": "replace", "path": bucket, "value": "m"}])}],
        "images": [
            {"name": f"REGION-docker.pkg.dev/PROJECT_ID/knapper/{name}", "newName": f"registry/{name}", "newTag": "v1"}
            for name in names
        ],
    }  # fmt: skip
    (tmp_path / "overlay/kustomization.yaml").write_text(yaml.safe_dump(plan))
    return tmp_path / "overlay"


def test_a_model_is_added_twice_as_once_and_removed_without_a_trace(
    cluster: Cluster, config: Path, overlay: Path, tmp_path: Path
) -> None:
    before = {path: dict(thing) for path, thing in cluster.objects.items()}
    declared = dict(cluster.objects["/api/v1/namespaces/knapper/configmaps/knapper-models"]["data"])
    add = ["deploy", "add", MODEL, "--accelerator", "nvidia-l4", "--config", str(config), "--manifests", str(overlay)]
    with serving(cluster, tmp_path) as kubeconfig:
        at = ["--kubeconfig", str(kubeconfig)]
        done = knapper(*add, *at)
        assert done.returncode == 0, done.stderr
        once = json.dumps(cluster.objects, sort_keys=True)
        assert knapper(*add, *at).returncode == 0
        assert json.dumps(cluster.objects, sort_keys=True) == once
        eight = slug(MODEL)[:8]
        made = {path.split("/knapper/")[1] for path in cluster.objects.keys() - before.keys()}
        assert made == {
            f"services/train-step-{eight}", f"services/sample-{eight}", f"triggers/train-step-{eight}",
            f"triggers/sample-{eight}",
        }  # fmt: skip
        entry = cluster.objects["/api/v1/namespaces/knapper/configmaps/knapper-models"]["data"][f"{slug(MODEL)}.json"]
        assert json.loads(entry)["train_step_url"] == f"http://train-step-{eight}.knapper.svc.cluster.local"
        assert json.loads(entry)["context"] == CONFIG["max_position_embeddings"]
        listed = knapper("deploy", "list", *at)
        assert listed.returncode == 0, listed.stderr
        assert MODEL in listed.stdout
        assert DEFAULT in listed.stdout
        told = json.loads(knapper("deploy", "list", "--json", *at).stdout)
        assert {one["model"]: one["declared"] for one in told} == {MODEL: True, DEFAULT: True}
        gone = knapper("deploy", "remove", MODEL, *at)
        assert gone.returncode == 0, gone.stderr
    assert cluster.objects.keys() == before.keys()
    assert cluster.objects["/api/v1/namespaces/knapper/configmaps/knapper-models"]["data"] == declared


def test_a_dry_run_prints_objects_that_fit_and_asks_no_cluster(config: Path, overlay: Path) -> None:
    done = knapper(
        "deploy", "add", MODEL, "--accelerator", "nvidia-h100-80gb", "--config", str(config), "--dry-run",
        "--manifests", str(overlay), "--sample-replicas-max", "3", "--kubeconfig", "/nonexistent",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    assert [thing["kind"] for thing in made] == ["Service", "Service", "Trigger", "Trigger", "ConfigMap"]
    if schema.CRDS is not None:
        assert [error for thing in made for error in schema.errors(thing)] == []
    names = {thing["metadata"]["name"] for thing in made[:4]}
    others = [each for each in rendered("overlays/gke-l4") if each["metadata"]["name"] not in names]
    assert list(rules.findings([*others, *made[:4]])) == []
    sample = made[1]["spec"]["template"]
    assert sample["spec"]["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert sample["metadata"]["annotations"]["autoscaling.knative.dev/max-scale"] == "3"
    given = {each["name"]: each.get("value") for each in sample["spec"]["containers"][0]["env"]}
    assert (given["KNAPPER_MODEL"], given["KNAPPER_MODEL_DIRECTORY"]) == (MODEL, "/srv/models/Qwen--Qwen3-8B")
    models = set(_values(made[2]["spec"]["filters"], "model"))
    assert models == {slug(MODEL)}


def test_vllm_can_sample_one_model_beside_others(config: Path, overlay: Path) -> None:
    done = knapper(
        "deploy", "add", MODEL, "--config", str(config), "--dry-run", "--manifests", str(overlay), "--sampler", "vllm"
    )
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    if schema.CRDS is not None:
        assert [error for thing in made for error in schema.errors(thing)] == []
    names = {thing["metadata"]["name"] for thing in made[:4]}
    others = [each for each in rendered("overlays/gke-l4") if each["metadata"]["name"] not in names]
    assert list(rules.findings([*others, *made[:4]])) == []
    images = [thing["spec"]["template"]["spec"]["containers"][0]["image"] for thing in made[:2]]
    assert images == ["registry/train-step:v1", "registry/sample-vllm:v1"]


@pytest.mark.parametrize(("image", "becomes"), [
    ("registry:5000/a/sample:v1", "registry:5000/a/sample-vllm:v1"), ("sample", "sample-vllm"),
    ("a/sample-vllm@sha256:00", "a/sample-vllm@sha256:00"), ("a/sample@sha256:00", None), ("a/other:v1", None),
    ("a/train-step:v1", "a/sample-vllm:v1"),
])  # fmt: skip
def test_the_image_with_vllm_is_the_sister_of_the_one_without(image: str, becomes: str | None) -> None:
    if becomes is None:
        with pytest.raises(InvalidField, match="by its tag"):
            _with_vllm(image)
    else:
        assert _with_vllm(image) == becomes


def test_a_model_that_vllm_does_not_take_is_refused_with_the_sampler_that_does(tmp_path: Path, overlay: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "model_type": "cohere2"}))
    at = ["--config", str(tmp_path / "config.json"), "--manifests", "gke-l4", "--sampler", "vllm", "--dry-run"]
    done = knapper("deploy", "add", MODEL, *at)
    assert done.returncode == 1
    assert f"allowed: torch, the engine's own, for {MODEL}, which transformers computes" in done.stderr
    whole = {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]}
    text = {**CONFIG, "model_type": "qwen3_vl_text"}
    (tmp_path / "config.json").write_text(json.dumps({**whole, "text_config": text, "vision_config": {}}))
    done = knapper("deploy", "add", MODEL, *at)
    assert done.returncode == 1
    assert f"for {MODEL}, of which only the text part is served" in done.stderr
    mixture = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
               "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
               "mlp_only_layers": []}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | mixture))
    for manifests in (["--manifests", "gke-l4", "--sampler", "vllm"], ["--manifests", "gke-l4-vllm"]):
        done = knapper("deploy", "add", MODEL, "--config", str(tmp_path / "config.json"), "--dry-run", *manifests)
        assert done.returncode == 1
        assert f"torch, the engine's own, for {MODEL}, a mixture" in done.stderr
    at = ["--config", str(tmp_path / "config.json"), "--manifests", str(overlay), "--dry-run"]
    for pods in ([], ["--one-pod"]):  # whose sampler is vLLM only where it can be
        assert knapper("deploy", "add", MODEL, *at, *pods).returncode == 0


def test_one_pod_trains_and_samples_on_one_gpu(cluster: Cluster, config: Path, overlay: Path, tmp_path: Path) -> None:
    add = ["deploy", "add", MODEL, "--config", str(config), "--manifests", str(overlay), "--one-pod"]
    done = knapper(*add, "--dry-run")
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    assert [thing["kind"] for thing in made] == ["Service", "Trigger", "Trigger", "ConfigMap"]
    if schema.CRDS is not None:
        assert [error for thing in made for error in schema.errors(thing)] == []
    name = f"train-step-{slug(MODEL)[:8]}"
    assert [thing["spec"]["subscriber"]["ref"]["name"] for thing in made[1:3]] == [name, name]
    assert [thing["spec"]["subscriber"].get("uri") for thing in made[1:3]] == [None, "/sample/"]
    record = json.loads(made[3]["data"][f"{slug(MODEL)}.json"])
    assert (
        record["sample_url"]
        == f"{record['train_step_url']}/sample/"
        == f"http://{name}.knapper.svc.cluster.local/sample/"
    )
    (container,) = made[0]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry/sample-vllm:v1"
    with serving(cluster, tmp_path) as kubeconfig:
        assert knapper(*add, "--kubeconfig", str(kubeconfig)).returncode == 0
        listed = knapper("deploy", "list", "--kubeconfig", str(kubeconfig)).stdout
    assert "in train-step" in next(line for line in listed.splitlines() if line.startswith(MODEL))


@pytest.mark.parametrize(("gpus", "sampler"), [(2, ""), (4, "vllm"), (8, "")])
def test_a_model_is_spread_over_the_gpus_of_a_pod(config: Path, overlay: Path, gpus: int, sampler: str) -> None:
    add = ["deploy", "add", MODEL, "--config", str(config), "--manifests", str(overlay), "--dry-run"]
    more = ["--sampler", sampler] if sampler else []
    one, several = (
        list(yaml.safe_load_all(knapper(*add, *more, *given).stdout)) for given in ([], ["--gpus", str(gpus)])
    )
    if schema.CRDS is not None:
        assert [error for thing in several for error in schema.errors(thing)] == []
    for before, service in zip(one[:2], several[:2], strict=True):
        (was,), (container,) = (each["spec"]["template"]["spec"]["containers"] for each in (before, service))
        assert {"name": "KNAPPER_DEVICES", "value": str(gpus)} in container["env"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == str(gpus)
        for which, name, unit in (("requests", "cpu", ""), ("requests", "memory", "Gi"), ("limits", "memory", "Gi")):
            of_one = int(was["resources"][which][name].removesuffix(unit))
            assert container["resources"][which][name] == f"{gpus * of_one}{unit}"
        assert [mount["mountPath"] for mount in container["volumeMounts"]].count("/dev/shm") == 1


@pytest.mark.parametrize(
    ("of_one", "of_four"), [("8", "32"), ("500m", "2000m"), ("1.5", "6"), ("1.5Gi", "6Gi"), ("64Gi", "256Gi")]
)
def test_quantities_of_an_overlay_of_ones_own_are_multiplied_too(of_one: str, of_four: str) -> None:
    assert parse_quantity(_times(of_one, 4, 1)) == parse_quantity(of_four)  # type: ignore[no-untyped-call]  # the library has no types
    with pytest.raises(InvalidField, match="resources is 'much'; allowed: a quantity of Kubernetes"):
        _times("much", 4, 1)


def _values(thing: object, key: str) -> list[str]:
    if isinstance(thing, dict):
        return [found for name, value in thing.items() for found in ([value] if name == key else _values(value, key))]
    return [found for each in thing for found in _values(each, key)] if isinstance(thing, list) else []


def test_the_manifests_own_model_keeps_its_names(overlay: Path, config: Path) -> None:
    done = knapper("deploy", "add", DEFAULT, "--config", str(config), "--manifests", str(overlay), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert {thing["metadata"]["name"] for thing in yaml.safe_load_all(done.stdout)} == {
        "train-step", "sample", "knapper-models",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--manifests", "gke-l4"], "an overlay with the names of your project in it"),
        (["--manifests", "gke-b200"], "an overlay: gke-h100, gke-h100-8, gke-h100-one-pod, gke-h100-vllm, gke-l4"),
        (["--manifests", "gke-h100", "--gpus", "3"], "gpus is 3; allowed: 2, 4 or 8"),
        (["--manifests", "gke-l4-shared", "--gpus", "2"], "with manifests whose pods have GPUs of their own"),
        (["--manifests", "local", "--gpus", "2"], "with manifests whose pods have GPUs of their own"),
        (["--manifests", "local", "--accelerator", "nvidia-l4"], "ask for no GPU"),
        (["--manifests", "local", "--sampler", "tgi"], "sampler is 'tgi'; allowed: vllm"),
        (["--manifests", "local", "--sampler", "vllm"], "ask for no GPU"),
        (["--manifests", "local", "--one-pod"], "ask for no GPU"),
        (["--manifests", "gke-l4-vllm", "--one-pod"], "vLLM has pods of its own, or two pods share a GPU"),
        (["--manifests", "gke-l4", "--one-pod", "--sample-replicas-max", "2"], "none where one pod trains and samples"),
    ],
)
def test_what_cannot_be_deployed_is_said(arguments: list[str], words: str, config: Path) -> None:
    done = knapper("deploy", "add", MODEL, "--config", str(config), "--dry-run", *arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_status_tells_warm_from_cold_and_what_went_wrong(cluster: Cluster, tmp_path: Path) -> None:
    services = "/apis/serving.knative.dev/v1/namespaces/knapper/services"
    cluster.put(*ready(cluster.objects[f"{services}/train-step"], replicas=1))
    cluster.put(*ready(cluster.objects[f"{services}/sample"], reason="RevisionFailed", message="Unable to fetch image"))
    pod = {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "gateway-1", "namespace": "knapper", "labels": {"app.kubernetes.io/name": "gateway"}},
        "status": {"phase": "Running"},
    }  # fmt: skip
    cluster.put(pod)
    cluster.texts["/api/v1/namespaces/knapper/pods/gateway-1:8080/proxy/metrics"] = (
        f'# TYPE knapper_runs_waiting gauge\nknapper_runs_waiting{{model="{DEFAULT}"}} 3.0\n'
    )
    with serving(cluster, tmp_path) as kubeconfig:
        done = knapper("deploy", "status", DEFAULT, "--kubeconfig", str(kubeconfig))
        told = json.loads(knapper("deploy", "status", DEFAULT, "--json", "--kubeconfig", str(kubeconfig)).stdout)
        unknown = knapper("deploy", "status", "org/none", "--kubeconfig", str(kubeconfig))
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()[3:]}
    assert "runs waiting: 3" in done.stdout
    assert rows["train-step"].split()[1:4] == ["train-step-00001", "1", "warm"]
    assert "1 x nvidia-l4" in rows["train-step"]
    assert "failing" in rows["sample"]
    assert "RevisionFailed Unable to fetch image" in rows["sample"]
    assert (told["model"], told["declared"], told["waiting"]) == (DEFAULT, True, 3)
    states = {part["name"]: (part["state"], part["replicas"]) for part in told["parts"]}
    assert (states["train-step"], states["sample"][0]) == (("warm", 1), "failing")
    assert unknown.returncode == 1
    assert f"deployed: {DEFAULT}" in unknown.stderr


def pod_of(service: str, *conditions: dict[str, str], container: dict[str, object]) -> dict[str, object]:
    metadata = {
        "name": f"{service}-00001-deployment-x", "namespace": "knapper", "creationTimestamp": "2027-01-15T08:00:00Z",
        "labels": {"serving.knative.dev/service": service},
    }  # fmt: skip
    containers = [{"name": "user-container", "state": container}]
    status = {"conditions": list(conditions), "containerStatuses": containers}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": status}


def test_status_tells_how_a_start_from_zero_went_stage_by_stage(cluster: Cluster, tmp_path: Path) -> None:
    had_a_node = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2027-01-15T08:02:12Z"}
    answered = {"type": "Ready", "status": "True", "lastTransitionTime": "2027-01-15T08:03:20Z"}
    no_node = {
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available",
        "lastTransitionTime": "2027-01-15T08:00:01Z",
    }  # fmt: skip
    cluster.put(
        pod_of("train-step", had_a_node, answered, container={"running": {"startedAt": "2027-01-15T08:02:52Z"}}),
        pod_of("sample", no_node, container={}),
    )
    took = {"weights": "1.25", "import": "2.4", "total": "9.0", "first_step": "0.5"}
    page = "".join(f'knapper_cold_start_seconds_sum{{stage="{name}"}} {seconds}\n' for name, seconds in took.items())
    cluster.texts["/api/v1/namespaces/knapper/pods/train-step-00001-deployment-x:8080/proxy/metrics"] = page
    with serving(cluster, tmp_path) as kubeconfig:
        done = knapper("deploy", "status", DEFAULT, "--kubeconfig", str(kubeconfig))
        cluster.put(pod_of("sample", had_a_node, container={"waiting": {"reason": "ImagePullBackOff"}}))
        later = knapper("deploy", "status", DEFAULT, "--kubeconfig", str(kubeconfig))
    told = {line.split("-00001")[0]: line for line in done.stdout.splitlines() if line.startswith("start of")}
    own = "import 2.4 s, weights 1.2 s, first step 0.5 s"
    assert told["start of train-step"].endswith(f": node 132 s, image and volumes 40 s, process 28 s ({own})")
    nothing = "node not yet, image and volumes not yet, process not yet"
    assert told["start of sample"].endswith(f": {nothing} (Unschedulable 0/1 nodes are available)")
    assert "node 132 s, image and volumes not yet, process not yet (ImagePullBackOff)" in later.stdout


def test_an_empty_cluster_says_so(cluster: Cluster, tmp_path: Path) -> None:
    for path in [path for path in cluster.objects if "/services/" in path or path.endswith("knapper-models")]:
        del cluster.objects[path]
    with serving(cluster, tmp_path) as kubeconfig:
        said = knapper("deploy", "list", "--kubeconfig", str(kubeconfig)).stdout
        told = knapper("deploy", "list", "--json", "--kubeconfig", str(kubeconfig)).stdout
    assert said == "no base model is deployed; `knapper deploy add MODEL` serves one\n"
    assert json.loads(told) == []


def test_without_a_cluster_the_command_says_so(tmp_path: Path) -> None:
    done = knapper("deploy", "list", "--kubeconfig", str(tmp_path / "none"))
    assert done.returncode == 1
    assert done.stderr.startswith("knapper: kubeconfig is ")
