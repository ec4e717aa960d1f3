"""The small packages that a bare PyTorch machine may lack, as wheels beside the checkout: `make bench-gpu-wheels`.

    python -m benchmarks.gpu.wheels [--python 3.12] [--out out/gpu-wheels]

They are used only where the machine has no package of that name: its own go first. Nothing is installed.
"""

import argparse
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.gpu import VARIABLE

DIRECTORY: Final = Path("out/gpu-wheels")
BYTES_MAX: Final = 60 << 20  # what may travel to a machine without a network
# Beside torch, numpy, safetensors, tokenizers, transformers and peft, which machines for training have.
PACKAGES: Final = (
    "cachetools", "cloudevents", "deprecation", "msgspec", "packaging", "prometheus-client", "protobuf", "pyrage",
    "structlog", "zstandard", "jinja2", "markupsafe", "pyyaml", "peft", "accelerate",
)  # fmt: skip
_PLATFORMS: Final = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17, 12, 5)] + ["manylinux2014_x86_64"]


def use(directory: Path, unpacked: Path) -> None:
    """Makes the packages of the directory importable, here and in child processes, after the machine's own."""
    if not directory.is_dir():
        return
    for wheel in sorted(directory.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    sys.path.append(str(unpacked))
    os.environ[VARIABLE] = str(unpacked)


def versions() -> Iterator[str]:
    """As this environment has them, which the tests ran with."""
    from importlib.metadata import version

    return (f"{name}=={version(name)}" for name in PACKAGES)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__)
    parser.add_argument("--python", default="3.12", help="that of the machine with the GPU")
    parser.add_argument("--out", type=Path, default=DIRECTORY)
    args = parser.parse_args()
    platforms = [part for platform in _PLATFORMS for part in ("--platform", platform)]
    command = [
        sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps",
        "--only-binary=:all:", "--implementation", "cp", "--python-version", args.python, *platforms,
        "--dest", str(args.out), *versions(),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    size = sum(wheel.stat().st_size for wheel in args.out.glob("*.whl"))
    print(f"{size / 2**20:.1f} MiB in {args.out}; at most {BYTES_MAX >> 20}")
    if size > BYTES_MAX:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
