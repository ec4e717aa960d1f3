"""The Dockerfile, read: its stages, and what a container of a target starts with. As much of the language as we use."""

import fnmatch
import json
import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from tests.images.requirements import ROOT

TARGETS = ("gateway", "train-step", "sample", "reward")
VLLM = "sample-vllm"  # in the place of sample, where there are GPUs


@dataclass
class Stage:
    """One FROM. `base`: an earlier stage, or an image."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Image:
    """What a container has: its command line, its environment, its user, and what was copied from the context."""

    entrypoint: list[str]
    environment: dict[str, str]
    user: str
    copied: list[tuple[str, str]]  # source in the context, place in the image


def stages(arguments: dict[str, str] | None = None) -> dict[str, Stage]:
    """By name, with the build arguments given, or as the file has them."""
    given = dict(arguments or {})
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    found: dict[str, Stage] = {}
    current: Stage | None = None
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, rest = line.split(None, 1)
        if word == "ARG" and current is None:
            name, _, default = rest.partition("=")
            given.setdefault(name, default)
        elif word == "FROM":
            base, _, name = rest.split()
            current = found[name] = Stage(name, re.sub(r"\$\{(\w+)\}", lambda match: given[match[1]], base))
        else:
            assert current is not None
            current.instructions.append((word, rest.strip()))
    return found


def image(target: str, arguments: dict[str, str] | None = None) -> Image:
    every = stages(arguments)
    chain = [every[target]]
    while chain[0].base in every:
        chain.insert(0, every[chain[0].base])
    environment: dict[str, str] = {}
    entrypoint: list[str] = []
    copied: list[tuple[str, str]] = []
    user = "root"
    for word, rest in (each for stage in chain for each in stage.instructions):
        if word == "ENV":
            environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "ENTRYPOINT":
            entrypoint = json.loads(rest)
        elif word == "USER":
            user = rest
        elif word == "COPY" and not rest.startswith("--from"):
            *sources, place = rest.split()
            copied += [(source, place) for source in sources]
    return Image(entrypoint, environment, user, copied)


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path of the checkout out of the context: the last line that matches decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if not pattern or line.startswith("#"):
            continue
        parts = path.split("/")
        heads = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if pattern.startswith("**/"):
            matches = any(fnmatch.fnmatch(part, pattern[3:]) for part in parts)
        else:
            matches = any(fnmatch.fnmatch(head, pattern) for head in heads)
        if matches:
            out = not line.startswith("!")
    return out


def lay_out(target: str, root: Path) -> Image:
    """The files that a container of the target gets from the context, below `root`; nothing else of the checkout."""
    made = image(target)
    for source, place in made.copied:
        path = ROOT / source
        to = root / place.lstrip("/")
        if path.is_dir():
            shutil.copytree(
                path, to, dirs_exist_ok=True,
                ignore=lambda folder, names: {
                    name for name in names if ignored(str((Path(folder) / name).relative_to(ROOT)))
                },
            )  # fmt: skip
        else:
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
    return made
