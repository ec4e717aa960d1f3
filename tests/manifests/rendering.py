"""Every kustomization that an operator applies, rendered once."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import yaml

from knapper.cluster.installation import configuration
from knapper.cluster.kustomize import Object, render

ROOT = Path(__file__).parents[2]
VLLM = ["overlays/gke-l4-vllm", "overlays/gke-h100-vllm"]
SPREAD = {"overlays/gke-l4-4": 4, "overlays/gke-h100-8": 8}  # GPUs of a pod
OVERLAYS = ["overlays/local", "overlays/gke-l4", "overlays/gke-l4-shared", "overlays/gke-h100", *VLLM, *SPREAD]
ONE_POD = "overlays/gke-h100-one-pod"  # its train-step samples too, at /sample/
APPLIED = [*OVERLAYS, ONE_POD, "cluster/operator"]
KUBECTL = shutil.which("kubectl")


@cache
def rendered(name: str) -> list[Object]:
    return render(ROOT / "knative" / name)


def patched() -> list[Object]:
    """The patches of Knative's own ConfigMaps."""
    return configuration(ROOT)


def by_kubectl(name: str) -> list[Object]:
    assert KUBECTL
    command = [KUBECTL, "kustomize", str(ROOT / "knative" / name)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return list(yaml.safe_load_all(said))


def find(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def services(objects: list[Object]) -> list[Object]:
    """The Knative Services."""
    return [each for each in objects if each["apiVersion"] == "serving.knative.dev/v1" and each["kind"] == "Service"]


def stacked(at: Path, overlay: str, *components: str) -> Path:
    """A kustomization over ours, as an operator writes one."""
    plan = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": [os.path.relpath(ROOT / "knative" / overlay, at)],
        "components": [os.path.relpath(ROOT / "knative" / each, at) for each in components],
        "generatorOptions": {"disableNameSuffixHash": True},
    }  # fmt: skip
    (at / "kustomization.yaml").write_text(yaml.safe_dump(plan))
    return at
