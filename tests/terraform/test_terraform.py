"""Terraform's files are formatted, whole, and say what Google's provider takes; planted mistakes are found."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcl2
import helm_python
import pytest
import yaml

from knapper.cluster.kustomize import render
from knapper.events.function_key import SECRET
from tests.manifests import schema as manifests
from tests.terraform import schema
from tests.terraform.checks import findings
from tests.terraform.reading import TERRAFORM, Document, blocks, documents, plain, read, text_of

BINARY = shutil.which("terraform")


@pytest.mark.parametrize("version", schema.PACKAGES)
def test_nothing_is_wrong(version: str) -> None:
    assert list(findings(documents(), schema.known(version))) == []


@pytest.mark.parametrize("version", schema.PACKAGES)
def test_the_schema_knows_exactly_the_types_that_are_used(version: str) -> None:
    assert set(schema.known(version)) == schema.used(), "python -m tests.terraform.schema WHEEL..."


def _paths(body: dict[str, Any], above: str = "") -> Iterator[str]:
    """Every argument and block of a block, as block.argument."""
    for key, value in body.items():
        if not key.startswith("__"):
            yield f"{above}{key}"
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, dict):
                    yield from _paths(each, f"{above}{key}.")


def test_no_argument_is_deprecated() -> None:
    found = [
        f"{kind}.{name}: {path}"
        for document in documents().values()
        for kind, name, body in blocks(document, "resource")
        for path in set(_paths(body)) & set(schema.DEPRECATED.get(kind, ()))
    ]
    assert found == []


def test_every_range_of_the_provider_is_the_one_that_was_checked() -> None:
    ranges = {
        (name, version)
        for path in TERRAFORM.rglob("*.tf")
        for name, version in re.findall(r'"hashicorp/(google[\w-]*)"\n\s+version = "([^"]+)"', path.read_text())
    }
    assert {version for _, version in ranges} == {f">= {schema.OLDEST}, < {schema.NEWEST}"}
    assert {name for name, _ in ranges} == {"google", "google-beta"}


def test_an_empty_project_can_be_planned() -> None:
    """A data source is read while planning, unless it waits: what it asks is an API that may not be enabled yet."""
    platform = documents()[TERRAFORM / "stages/10-platform"]
    for _, name, body in blocks(platform, "module"):
        module = documents()[(TERRAFORM / "stages/10-platform" / plain(body["source"])).resolve()]
        google = [kind for word in ("data", "resource") for kind, _, _ in blocks(module, word)]
        if any(kind.startswith("google_") for kind in google) and "gpu-pool" not in body["source"]:
            assert "google_project_service.this" in text_of(body.get("depends_on", "")), f"module {name} does not wait"
    assert [kind for kind, _, _ in blocks(platform, "data")] == []
    for stage in ("20-knative", "30-functions"):  # of a platform that is there
        assert {kind for kind, _, _ in blocks(documents()[TERRAFORM / "stages" / stage], "data")} <= {
            "google_client_config", "google_container_cluster",
        }  # fmt: skip


@pytest.mark.skipif(BINARY is None, reason="no terraform")
def test_formatted() -> None:
    assert BINARY
    done = subprocess.run([BINARY, "fmt", "-check", "-recursive", str(TERRAFORM)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# (file, what stands there, what a tired person writes instead, what is said of it)
MISTAKES = {
    "an argument, misspelt": (
        "modules/gpu-pool",
        "image_type ",
        "image_typ ",
        "node_config.image_typ is no argument",
    ),
    "an argument of another block": (
        "modules/gpu-pool",
        "gcfs_config {\n      enabled",
        "gcfs_config {\n      mode",
        "gcfs_config.mode",
    ),
    "a block, misspelt": (
        "modules/gke",
        "workload_identity_config {",
        "workload_identity {",
        "workload_identity is no argument",
    ),
    "a required argument left out": (
        "modules/events",
        'payload_format     = "JSON_API_V1"\n',
        "",
        "payload_format is missing",
    ),
    "a required argument of a block left out": (
        "modules/events",
        "dead_letter_topic     = google_pubsub_topic.dead.id\n",
        "dead_letter_topi = 1\n",
        "dead_letter_topi is no",
    ),
    "text for a number": (
        "modules/events",
        "ack_deadline_seconds         = 60",
        'ack_deadline_seconds = "60 s"',
        "should be a number",
    ),
    "a number for a switch": (
        "modules/storage",
        "uniform_bucket_level_access = true",
        "uniform_bucket_level_access = 1",
        "a bool",
    ),
    "an argument for a block": (
        "modules/storage",
        "versioning {\n    enabled = false\n  }",
        "versioning = false",
        "is a block",
    ),
    "a resource that is none": (
        "modules/network",
        '"google_compute_router_nat"',
        '"google_compute_nat"',
        "no such type",
    ),
    "a resource that is not there": (
        "modules/network",
        "google_compute_router.this.name",
        "google_compute_router.main.name",
        "router.main",
    ),
    "a variable that is not declared": (
        "modules/network",
        "var.nodes_cidr\n",
        "var.node_cidr\n",
        "var.node_cidr is not declared",
    ),
    "a variable of a module, misspelt": (
        "stages/10-platform",
        "cpu_nodes_min       = var",
        "cpu_nodes = var",
        "cpu_nodes is none",
    ),
    "a variable of a module left out": (
        "stages/10-platform",
        "  nodes_max             = each.value.nodes_max\n",
        "",
        "nodes_max is missing",
    ),
    "an output that is none": (
        "stages/10-platform",
        "module.storage.state\n",
        "module.storage.bucket\n",
        "no output bucket",
    ),
    "a local that is not there": (
        "stages/30-functions",
        "local.settings :",
        "local.setting :",
        "local.setting is not there",
    ),
    "a variable without a type": (
        "modules/storage",
        "  type        = string\n",
        "",
        "no type",
    ),
    "an output without a description": (
        "modules/iam",
        '  description = "What reward\'s credential file names as audience."\n',
        "",
        "no desc",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake: str, tmp_path: Path) -> None:
    place, before, after, words = MISTAKES[mistake]
    for path in (TERRAFORM / place).glob("*.tf"):
        shutil.copy(path, tmp_path)
    file = next(path for path in sorted(tmp_path.glob("*.tf")) if before in path.read_text())
    file.write_text(file.read_text().replace(before, after, 1))
    found = list(findings(documents() | {TERRAFORM / place: read(tmp_path)}, schema.known(max(schema.PACKAGES))))
    assert [said for said in found if words in said] != [], found


def test_the_state_bucket_keeps_everything_and_no_more() -> None:
    (state,) = [
        body for kind, name, body in blocks(documents()[TERRAFORM / "modules/storage"], "resource") if name == "state"
    ]
    assert state["soft_delete_policy"][0]["retention_duration_seconds"] == 0
    assert state["versioning"][0]["enabled"] is False
    actions = [plain(rule["action"][0]["type"]) for rule in state["lifecycle_rule"]]
    assert actions == ["AbortIncompleteMultipartUpload"]


def test_of_the_secrets_reward_reads_the_key_of_the_functions_alone() -> None:
    """It runs code of others; train-step and sample read the whole state."""
    document = documents()[TERRAFORM / "modules/iam"]
    reads = [body for kind, _, body in blocks(document, "resource") if kind == "google_storage_bucket_iam_member"]
    mine = [body for body in reads if body.get("member") == "${local.reward}" and "secrets/" in text_of(body)]
    (granted,) = mine
    assert plain(granted["role"]) == "roles/storage.objectViewer"
    expression = plain(granted["condition"][0]["expression"])
    assert expression == f"resource.name == 'projects/_/buckets/${{var.state_bucket}}/objects/{SECRET}'"


def test_gpu_nodes_start_from_zero_and_have_a_most() -> None:
    (pool,) = [body for _, _, body in blocks(documents()[TERRAFORM / "modules/gpu-pool"], "resource")]
    (scaling,) = pool["autoscaling"]
    variables = {name: body for _, name, body in blocks(documents()[TERRAFORM / "modules/gpu-pool"], "variable")}
    assert scaling["total_min_node_count"] == "${var.nodes_warm}"
    assert variables["nodes_warm"]["default"] == 0
    assert "var.nodes_max" in scaling["total_max_node_count"]


@pytest.mark.skipif(manifests.CRDS is None, reason="no directory knative-crds beside the checkout")
def test_the_way_in_from_outside_fits_knatives_schemas() -> None:
    text = (TERRAFORM / "stages/30-functions/exposure.yaml").read_text()
    for name, value in (("hostname", "tinker.example.com"), ("address", "knapper"), ("certmap", "knapper")):
        text = text.replace(f"${{{name}}}", value)
    objects = list(yaml.safe_load_all(text))
    assert [
        (thing["kind"], error)
        for thing in objects
        if "knative" in thing["apiVersion"]
        for error in manifests.errors(thing)
    ] == []
    (route,) = [thing for thing in objects if thing["kind"] == "HTTPRoute"]
    paths = [match["path"]["value"] for rule in route["spec"]["rules"] for match in rule["matches"]]
    assert "/events" not in paths
    assert "/" not in paths
    # Knative's operator puts everything, Kourier too, into the namespace of the KnativeServing.
    operator = render(TERRAFORM.parent / "knative/cluster/operator")
    (serving,) = [thing for thing in operator if thing["kind"] == "KnativeServing"]
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    assert (backend["name"], backend["namespace"]) == ("kourier", serving["metadata"]["namespace"])
    about = [thing for thing in objects if thing["kind"] in ("ReferenceGrant", "GCPBackendPolicy", "HealthCheckPolicy")]
    assert {thing["metadata"]["namespace"] for thing in about} == {backend["namespace"]}
    assert len(about) == 3


def test_helm_applies_the_objects_as_they_are_given() -> None:
    """Helm's own engine over our chart: what looks like a template, a number or a boolean comes out as it went in."""
    objects = [
        *render(TERRAFORM.parent / "knative/cluster/operator"),
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "odd"},
         "data": {"a": "{{ .Values }}", "b": "5", "c": "true", "d": "one\ntwo\n", "e": "---"}},
    ]  # fmt: skip
    with helm_python.Chart.load(str(TERRAFORM / "modules/objects/chart")) as chart:
        written = chart.render({"objects": objects}, name="knative-config", namespace="knative-operator")
    assert [each for text in written.values() for each in yaml.safe_load_all(text) if each] == objects


@pytest.mark.parametrize(
    "overlay", ["gke-l4", "gke-l4-shared", "gke-h100", "gke-l4-vllm", "gke-h100-vllm", "gke-h100-one-pod"]
)
def test_the_names_that_stage_30_replaces_are_in_the_overlays(overlay: str) -> None:
    stage = (TERRAFORM / "stages/30-functions/main.tf").read_text()
    for thing in render(TERRAFORM.parent / "knative/overlays" / overlay):
        if thing["apiVersion"] == "serving.knative.dev/v1":
            name, spec = thing["metadata"]["name"], thing["spec"]["template"]["spec"]
            by_vllm = {"gke-l4-vllm": "sample", "gke-h100-vllm": "sample", "gke-h100-one-pod": "train-step"}
            target = "sample-vllm" if name == by_vllm.get(overlay) else name
            assert spec["containers"][0]["image"].startswith(f"REGION-docker.pkg.dev/PROJECT_ID/knapper/{target}:")
            assert f'"{target}"' in stage
            if name != "reward":
                assert spec["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "PROJECT_ID-knapper-models"
    assert "REGION-docker.pkg.dev/PROJECT_ID/knapper/${target}" in stage
    assert "/spec/template/spec/volumes/0/csi/volumeAttributes/bucketName" in stage


@pytest.mark.parametrize("stage", ["10-platform", "20-knative", "30-functions"])
def test_the_tests_of_a_stage_are_about_it(stage: str) -> None:
    """They parse, name what the stage has, and reach no cloud."""
    document = documents()[TERRAFORM / "stages" / stage]
    variables = {name: body for _, name, body in blocks(document, "variable")}
    providers = {plain(name) for each in document["provider"] for name in each if not name.startswith("__")}
    required = {plain(name) for each in document["terraform"] for block in each["required_providers"] for name in block}
    (path,) = (TERRAFORM / "stages" / stage / "tests").glob("*.tftest.hcl")
    with path.open(encoding="utf-8") as file:
        test = hcl2.load(file)
    mocked = {plain(name) for each in test["mock_provider"] for name in each}
    assert providers <= mocked <= required, "no test may reach a cloud"
    assert {name for name in required if not name.startswith("__")} <= mocked
    for given in (*test["variables"], *(each for run in _runs(test).values() for each in run.get("variables", []))):
        assert {key for key in given if not key.startswith("__")} <= set(variables), given
    needed = {name for name, body in variables.items() if "default" not in body}
    assert needed <= set(test["variables"][0])
    for name, run in _runs(test).items():
        refused = [each.removeprefix("${var.").removesuffix("}") for each in run.get("expect_failures", [])]
        assert all("validation" in variables[each] for each in refused), name
        assert refused or run.get("assert"), f"{name} asserts nothing"


def _runs(test: dict[str, Any]) -> dict[str, Any]:
    return {plain(name): body for each in test["run"] for name, body in each.items() if not name.startswith("__")}


@pytest.mark.long
@pytest.mark.skipif(BINARY is None, reason="no terraform")
@pytest.mark.parametrize("stage", ["10-platform", "20-knative", "30-functions"])
def test_validate_and_test_with_mocked_providers(stage: str, tmp_path: Path) -> None:
    """As Terraform itself does it; skipped where its registry of providers does not answer."""
    assert BINARY
    copy = tmp_path / "repository"
    shutil.copytree(TERRAFORM, copy / "terraform", ignore=shutil.ignore_patterns(".terraform", ".rendered"))
    shutil.copytree(TERRAFORM.parent / "knative", copy / "knative")
    at = [BINARY, f"-chdir={copy / 'terraform/stages' / stage}"]
    init = subprocess.run([*at, "init", "-backend=false", "-input=false"], capture_output=True, text=True, timeout=110)
    if init.returncode and "registry.terraform.io" in init.stderr:
        pytest.skip("Terraform's registry of providers does not answer")
    assert init.returncode == 0, init.stderr
    for command in (["validate"], ["test"]):
        done = subprocess.run([*at, *command], capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stdout + done.stderr


def _commands(document: Document) -> dict[str, str]:
    """What each terraform_data runs, by its name."""
    return {
        name: text_of(body["provisioner"])
        for kind, name, body in blocks(document, "resource")
        if kind == "terraform_data"
    }


@pytest.mark.parametrize("stage", ["20-knative", "30-functions"])
def test_a_stage_asks_for_its_tools_before_it_makes_anything(stage: str, tmp_path: Path) -> None:
    document = documents()[TERRAFORM / "stages" / stage]
    commands = _commands(document)
    tools = re.search(r"tools\.sh ([\w -]+)", commands.pop("tools"))
    assert tools
    used = set(re.findall(r"\b(gcloud|kubectl|helm|jq)\b ", " ".join(commands.values()) + text_of(document["locals"])))
    assert used <= set(tools[1].split())
    for name in ("gcloud", "gke-gcloud-auth-plugin"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    script = ["/bin/sh", str(TERRAFORM / "tools.sh"), *tools[1].split()]
    done = subprocess.run(script, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "not on PATH: kubectl." in done.stderr
    (tmp_path / "kubectl").symlink_to(tmp_path / "gcloud")
    assert subprocess.run(script, env={"PATH": str(tmp_path)}).returncode == 0


def test_knatives_objects_go_while_knative_is_there() -> None:
    """And only when the stage is destroyed: a resource that an update replaces would delete them."""
    document = documents()[TERRAFORM / "stages/30-functions"]
    removal = next(body for _, name, body in blocks(document, "resource") if name == "removal")
    assert "triggers_replace" not in removal
    assert re.search(r"^(\$\{)?destroy\}?$", text_of(removal["provisioner"]), re.MULTILINE), "when"
    (overlay,) = [body for _, name, body in blocks(document, "resource") if name == "overlay"]
    assert "terraform_data.removal" in text_of(overlay["depends_on"])
    command = _commands(document)["removal"]
    assert command.index("services.serving") < command.index("brokers") < command.index("delete namespace")


def test_stage_20_ends_when_knative_serves() -> None:
    document = documents()[TERRAFORM / "stages/20-knative"]
    ready = next(body for _, name, body in blocks(document, "resource") if name == "ready")
    assert "module.knative" in text_of(ready["depends_on"])
    for kind in ("knativeserving/knative-serving", "knativeeventing/knative-eventing"):
        assert f"--for=condition=Ready {kind}" in text_of(ready["provisioner"])
