"""Requirements of each image, made from pyproject.toml; `python -m tests.images.requirements` writes them anew.

Tools that know nothing of extras (func, buildpacks, the Dockerfile's layers) read requirements.txt. `constraints.txt`
holds the versions that the tests ran with, so that an image built next month is the same one. `constraints-vllm.txt`
is another such list, of which no test ran: its first lines say how it is made.
"""

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

# What each image needs beside the core. Only the gateway pulls Pub/Sub, but the extra is one.
EXTRAS = {
    "gateway/requirements.txt": ("gcp", "sweep", "traces"),
    "functions/train_step/requirements.txt": ("train", "gcp", "traces"),
    "functions/sample/requirements.txt": ("train", "gcp", "traces"),
    "functions/sample/requirements-vllm.txt": ("train", "vllm", "gcp", "traces"),
    "functions/reward/requirements.txt": ("reward", "gcp", "traces"),
}
# Needs a GPU, and is installed nowhere here: constraints-vllm.txt is what pip resolved for it.
VLLM = "functions/sample/requirements-vllm.txt"
# What the images get from torch's own index, with a version of its own: see TORCH_VERSION in the Dockerfile.
_FROM_TORCH = {"torch"}


def render(file: str, project: Mapping[str, object]) -> str:
    """The requirements of an image."""
    extras = EXTRAS[file]
    named = f"the extras {', '.join(extras)}"
    head = f"# knapper's core and {named}, from pyproject.toml; `python -m tests.images.requirements` writes this file."
    return "\n".join([head, *sorted(requirements(project, *extras))]) + "\n"


def requirements(project: Mapping[str, object], *extras: str) -> list[str]:
    optional = project["optional-dependencies"]
    core = project["dependencies"]
    assert isinstance(optional, dict)
    assert isinstance(core, list)
    return [*core, *(line for extra in extras for line in optional[extra])]


def constraints(project: Mapping[str, object]) -> str:
    """The versions that are installed here, of everything that any image installs."""
    wanted = {line for file, extras in EXTRAS.items() if file != VLLM for line in requirements(project, *extras)}
    found = dict(pair for line in wanted for pair in _closure(Requirement(line)))
    head = "# Versions that the tests ran with; `python -m tests.images.requirements` writes this file."
    return "\n".join([head, *(f"{name}=={version}" for name, version in sorted(found.items()))]) + "\n"


def _closure(wanted: Requirement, seen: set[str] | None = None) -> Iterator[tuple[str, str]]:
    seen = set() if seen is None else seen
    name = canonical(wanted.name)
    key = f"{name}[{','.join(sorted(wanted.extras))}]"
    if key in seen or name in _FROM_TORCH:
        return
    seen.add(key)
    distribution = importlib.metadata.distribution(wanted.name)
    yield name, distribution.version
    for line in distribution.requires or []:
        required = Requirement(line)
        extras = wanted.extras or {""}
        if required.marker is None or any(required.marker.evaluate({"extra": extra}) for extra in extras):
            yield from _closure(required, seen)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def project() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def main() -> None:
    for file in EXTRAS:
        (ROOT / file).write_text(render(file, project()), encoding="utf-8")
    (ROOT / "constraints.txt").write_text(constraints(project()), encoding="utf-8")


if __name__ == "__main__":
    main()
