"""What the choices of `batch_invariance` depend on, as one hash: they hold wherever it is equal.

Libraries choose their kernels, and block them, by the CPU's model, instruction sets and caches, by their versions and
environment variables, and by the number of threads. The layers' own code decides what is multiplied.
"""

import hashlib
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import torch

# Of the libraries below torch: oneDNN, MKL, OpenMP's runtimes, OpenBLAS; and what replaces one of them.
_VARIABLES: Final = ("ATEN_", "DNNL_", "GOMP_", "KMP_", "LD_", "MKL_", "ONEDNN_", "OMP_", "OPENBLAS_", "TORCH_")
_CPU: Final = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags", "Features")
_CACHES: Final = "devices/system/cpu/cpu0/cache/index*"


def fingerprint(
    model: bytes, environ: Mapping[str, str], proc: Path = Path("/proc"), sys: Path = Path("/sys")
) -> str | None:
    """SHA-256 in hexadecimal; None on a system that does not describe its CPU. `model`: its config.json."""
    try:
        described = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return None
    cpu = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in described.splitlines())}
    facts = [
        model.hex(),
        *(f"{name}={cpu.get(name, '')}" for name in _CPU),
        *_caches(sys),
        f"cpus={os.cpu_count()} usable={len(os.sched_getaffinity(0))} machine={platform.machine()}",
        f"capability={torch.backends.cpu.get_cpu_capability()} threads={torch.get_num_threads()}",
        f"torch={torch.__version__}",
        torch.__config__.show(),
        *(f"{name}={value}" for name, value in sorted(environ.items()) if name.startswith(_VARIABLES)),
        *(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))),
    ]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def _caches(sys: Path) -> Iterable[str]:
    for cache in sorted(sys.glob(_CACHES)):
        values = [(cache / name).read_text().strip() for name in ("level", "type", "size") if (cache / name).is_file()]
        yield " ".join(values)
