"""The commands of docs/cluster-trial.md name what is there; its program runs in test_containers.py."""

import os
import re
import subprocess
from pathlib import Path

import yaml

from knapper.cluster.kustomize import render
from tests.cluster.page import COMMANDS, PAGE, file
from tests.images.dockerfile import TARGETS
from tests.manifests.rendering import ROOT, find, rendered, services

LOCAL = rendered("overlays/local")


def test_they_are_bash() -> None:
    done = subprocess.run(["bash", "-n"], input=COMMANDS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_kustomization_and_file_is_there() -> None:
    for path in re.findall(r"-k (\S+)", COMMANDS):
        assert render(ROOT / path), path
    for path in re.findall(r"\b(examples/\S+?)[/*;\s]", COMMANDS):
        assert (ROOT / path).exists(), path


def test_what_is_built_and_loaded_is_what_the_overlay_runs() -> None:
    loops = re.findall(r"^for target in ([\w -]+); do", COMMANDS, flags=re.MULTILINE)
    assert [loop.split() for loop in loops] == [list(TARGETS)] * 2
    (built,) = re.findall(r"docker build --target \$target -t (\S+) \.", COMMANDS)
    (loaded,) = re.findall(r"kind load docker-image --name knapper (\S+);", COMMANDS)
    ran = {service["spec"]["template"]["spec"]["containers"][0]["image"] for service in services(LOCAL)}
    assert ran == {built.replace("$target", target) for target in TARGETS}
    assert loaded == built


def test_a_registry_can_be_named(tmp_path: Path) -> None:
    plan = yaml.safe_load(file("out/trial/kustomization.yaml"))
    plan["resources"] = [os.path.relpath(ROOT / "out/trial" / plan["resources"][0], tmp_path)]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(plan))
    images = {each["spec"]["template"]["spec"]["containers"][0]["image"] for each in services(render(tmp_path))}
    assert images == {f"registry.example.com/knapper/{target}:v1" for target in TARGETS}


def test_the_way_in_leads_to_pods_and_ports_that_are_there() -> None:
    assert "serving.knative.dev/service=gateway" in COMMANDS
    (container,) = find(services(LOCAL), "Service", "gateway")["spec"]["template"]["spec"]["containers"]
    assert f"-c {container['name']} " in COMMANDS
    assert f"8000:{container['ports'][0]['containerPort']};" in COMMANDS
    emulator = find(LOCAL, "Service", "store-emulator")
    assert f"service/store-emulator 4443:{emulator['spec']['ports'][0]['port']};" in COMMANDS
    bucket = find(LOCAL, "ConfigMap", "knapper")["data"]["KNAPPER_EXCHANGE"].removeprefix("gs://")
    assert re.findall(r"/b/(\w+)/o", COMMANDS) == [bucket] * 2
    deployments = {each["metadata"]["name"] for each in LOCAL if each["kind"] == "Deployment"}
    assert {"store-emulator"} == deployments
    assert "deployment/store-emulator" in COMMANDS
    assert "localhost:5001" in PAGE
