import copy
import os

import pytest

from tests.cluster.apiserver import Cluster, healthy
from tests.manifests.rendering import patched, rendered

os.environ.setdefault("TINKER_TELEMETRY", "0")


def pytest_configure(config: pytest.Config) -> None:
    """The SDK leaves the connection of its first request to the garbage collector, whenever that comes."""
    for left in ("unclosed <socket", "unclosed transport"):
        config.addinivalue_line("filterwarnings", f"ignore:{left}:ResourceWarning")


@pytest.fixture
def cluster() -> Cluster:
    """The L4 overlay, with names in it, on a healthy cluster: constructed (see apiserver.py)."""
    objects = copy.deepcopy(rendered("overlays/gke-l4"))
    text = {"REGION-docker.pkg.dev/PROJECT_ID": "europe-west4-docker.pkg.dev/example-project"}
    for thing in objects:
        if thing["apiVersion"] == "serving.knative.dev/v1":
            container = thing["spec"]["template"]["spec"]["containers"][0]
            for before, after in text.items():
                container["image"] = container["image"].replace(before, after)
        if thing["kind"] == "ConfigMap" and thing["metadata"]["name"] == "knapper":
            thing["data"]["KNAPPER_STORE"] = "gs://example-project-knapper-state"
    return healthy(objects, patched())
