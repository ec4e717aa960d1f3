"""The Dockerfile says what it should, and what it installs is what pyproject.toml declares."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from knapper.local.web import PROTOCOL
from tests.images import requirements
from tests.images.dockerfile import TARGETS, VLLM, ignored, image, lay_out, stages
from tests.images.requirements import EXTRAS, ROOT, canonical

FILES = {
    "gateway": "gateway/requirements.txt",
    **{name: f"functions/{name.replace('-', '_')}/requirements.txt" for name in TARGETS[1:]},
    VLLM: requirements.VLLM,
}


@pytest.mark.parametrize("file", EXTRAS)
def test_requirements_are_those_of_pyproject(file: str) -> None:
    written = (ROOT / file).read_text()
    again = "run `python -m tests.images.requirements`"
    assert written == requirements.render(file, requirements.project()), again


def test_constraints_fit_every_requirement() -> None:
    for file in EXTRAS:
        constraints = "constraints-vllm.txt" if file == requirements.VLLM else "constraints.txt"
        pinned = pins(constraints)
        for line in (ROOT / file).read_text().splitlines()[1:]:
            wanted = Requirement(line)
            if wanted.name != "torch":  # has a version of its own, and an index
                version = pinned[canonical(wanted.name)]
                assert wanted.specifier.contains(version), f"{line}: {constraints} has {version}"
    torch = dict(rest.split("=") for word, rest in stages()["torch-cpu"].instructions if word == "ARG" and "=" in rest)
    (line,) = [each for each in requirements.requirements(requirements.project(), "train") if each.startswith("torch")]
    assert Requirement(line).specifier.contains(torch["TORCH_VERSION"])
    assert f"torch=={torch['TORCH_VERSION']}" in (ROOT / "Makefile").read_text()


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_vllm_stands_on_what_the_tests_ran_with_wherever_it_lets_us() -> None:
    """One torch, one transformers, one numpy would be best: what is sampled there is trained elsewhere."""
    ours, theirs = pins("constraints.txt"), pins("constraints-vllm.txt")
    other = {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]}
    assert other == {"numpy", "llguidance"}, "mistral-common, which vLLM wants, is not for our numpy yet"
    (torch,) = {rest for word, rest in stages()["torch-cuda"].instructions if word == "ARG"}
    assert theirs["torch"] == torch.removeprefix("TORCH_VERSION=")
    assert stages()["vllm-environment"].base == "torch-cuda", "the layer of torch is train-step's"


def test_vllm_finds_a_compiler_and_writes_only_below_one_directory() -> None:
    made = image(VLLM)
    assert made.environment["KNAPPER_SAMPLER"] == "vllm"
    caches = {
        name: value for name, value in made.environment.items() if re.search("CACHE|_HOME|_ROOT$|WORKSPACE", name)
    }
    assert len(caches) >= 8
    assert all(value == "/tmp/cache" or value.startswith("/tmp/cache/") for value in caches.values()), caches
    assert any(word == "RUN" and "gcc" in rest for word, rest in stages()[VLLM].instructions)


@pytest.mark.parametrize("stage", ["engine-environment", "vllm-environment"])
def test_torch_compiles_as_the_image_compiles_it(stage: str, tmp_path: Path) -> None:
    """The line of the Dockerfile itself, on the part of torch that has a module for a newer Python."""
    (argument,) = [each for each in re.findall(r"^ARG (\w+=\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
                   if each.startswith("UNPARSABLE=")]  # fmt: skip
    assert ("ARG", "UNPARSABLE") in stages()[stage].instructions, "an argument from before FROM is declared again"
    (line,) = [rest for word, rest in stages()[stage].instructions if word == "RUN" and "compileall" in rest]
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    shutil.copytree(Path(torch.origin).parent / "testing", tmp_path / "torch/testing")
    command = line.replace("python ", f"{sys.executable} ", 1).replace("/opt/venv/lib", str(tmp_path))
    name, _, value = argument.partition("=")
    done = subprocess.run(["sh", "-ec", command], env={name: value}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert list(tmp_path.rglob("common_utils.*.pyc"))


@pytest.mark.parametrize("target", ["train-step", "sample", VLLM])
def test_what_computes_finds_the_driver_where_gke_lays_it(target: str) -> None:
    assert image(target).environment["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"


@pytest.mark.parametrize("arguments", [{}, {"TORCH": "cuda", "WEIGHTS": "none"}])
def test_every_stage_stands_on_a_stage_or_on_an_image_by_digest(arguments: dict[str, str]) -> None:
    every = stages(arguments)
    for stage in every.values():
        assert stage.base in every or re.search(r"@sha256:[0-9a-f]{64}$", stage.base), stage.base
        for word, rest in stage.instructions:
            if word == "COPY" and rest.startswith("--from="):
                assert rest.split()[0].removeprefix("--from=") in every


def test_what_is_copied_is_there_and_is_not_ignored() -> None:
    for stage in stages().values():
        for word, rest in stage.instructions:
            if word == "COPY" and not rest.startswith("--from"):
                for source in rest.split()[:-1]:
                    assert (ROOT / source).exists()
                    assert not ignored(source), f".dockerignore keeps {source} out"


@pytest.mark.parametrize(
    "path",
    [".git", "tests/conftest.py", "docs/errors.md", "README.md", "knapper/__pycache__/a.pyc", "out/x", ".venv/bin"],
)
def test_the_context_is_small(path: str) -> None:
    assert ignored(path)


@pytest.mark.parametrize("target", [*TARGETS, VLLM])
def test_a_container_runs_as_nobody_under_asgi_in_one_process(target: str) -> None:
    made = image(target)
    assert made.user == "65532:65532"
    assert made.environment["HOME"] == "/tmp"
    app = "gateway.app:app" if target == "gateway" else "functions_framework.aio:app"
    assert made.entrypoint[:2] == ["uvicorn", app]
    options = dict(zip(made.entrypoint[2:-1:2], made.entrypoint[3::2], strict=True))
    assert (options["--workers"], options["--lifespan"], options["--port"]) == ("1", "on", "8080")
    assert (options["--http"], options["--ws"]) == (PROTOCOL, "none")  # what bounds headers and connections
    if target != "gateway":
        assert made.environment["FUNCTION_TARGET"] == target.removesuffix("-vllm").replace("-", "_")


# Keeps out what is installed here and not in the image. torch's own dependencies come with torch.
STRANGERS = """
import importlib.abc, importlib.metadata, sys
brought, by_name = {brought!r}, importlib.metadata.packages_distributions()
sys.path[:] = [{app!r}, *(path for path in sys.path if path != {root!r})]

class Strangers(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        found = by_name.get(name, []) if path is None else []
        if found and not brought & {{each.lower().replace("_", "-").replace(".", "-") for each in found}}:
            raise ModuleNotFoundError(name + " is not among the requirements", name=name)

sys.meta_path.insert(0, Strangers())
"""
WITH_TORCH = {"torch", "sympy", "mpmath", "networkx", "jinja2", "setuptools", "fsspec", "filelock", "typing-extensions"}


@pytest.mark.parametrize("target", [*TARGETS, VLLM])
def test_a_container_has_what_its_program_imports(target: str, tmp_path: Path) -> None:
    """Of this project, only what was copied; of others, only what its requirements bring."""
    made = lay_out(target, tmp_path)
    assert made.environment["PYTHONPATH"] == "/app"
    named = requirements.requirements(requirements.project(), *EXTRAS[FILES[target]])
    named = [line for line in named if not line.startswith("vllm")]  # the page imports without it
    brought = {name for line in named for name, _ in requirements._closure(Requirement(line))}
    brought |= WITH_TORCH if any(line.startswith("torch") for line in named) else set()
    program = STRANGERS.format(brought=brought, app=str(tmp_path / "app"), root=str(ROOT))
    if target == "gateway":
        program += "import gateway.app\n"
        # And the operator's command in its pod: `python -m knapper key create TENANT`.
        program += "import os, runpy, sys\n"
        program += f"os.environ.update(KNAPPER_DATA={str(tmp_path / 'data')!r})\n"
        program += "sys.argv = ['knapper', 'key', 'create', 'alice']\n"
        program += "runpy.run_module('knapper', run_name='__main__')\n"
    else:  # the imports of the page; what it does beside needs a model
        page = tmp_path / made.environment["FUNCTION_SOURCE"].removeprefix("/")
        program += "".join(f"{line}\n" for line in page.read_text().splitlines() if re.match(r"(import|from) ", line))
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert target != "gateway" or done.stdout.startswith("tml-")
