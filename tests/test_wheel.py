"""The wheel: what it says of itself, what it puts where, and that all of it runs without the repository."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from email.parser import Parser
from pathlib import Path

import httpx
import pytest
import trove_classifiers
from packaging.requirements import Requirement

import knapper
from tests.engine.tiny import tiny_model
from tests.test_house import PROJECT, ROOT, tracked


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of this tree, installed alone into an empty directory."""
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "knapper", "gateway", "functions", "knative", "examples"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    quiet = ["--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *quiet, "--no-build-isolation", "--wheel-dir", str(tmp), str(source)], check=True)
    (wheel,) = tmp.glob("knapper-*.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "__pycache__" in name]
    subprocess.run([*pip, "install", *quiet, "--target", str(tmp / "site"), str(wheel)], check=True)
    return tmp / "site"


def run_installed(site: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Code in a Python that sees the installed wheel and the dependencies, and not the checkout."""
    # -P keeps the working directory out, the assignment the editable install.
    boot = f"import sys; sys.path[:] = [{str(site)!r}, *(p for p in sys.path if p != {str(ROOT)!r})]; "
    command = [sys.executable, "-P", "-c", boot + code, *arguments]
    return subprocess.run(command, cwd=site, capture_output=True, text=True, timeout=60)


def test_the_wheel_puts_one_name_into_site_packages(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"knapper", "bin"}


def test_the_wheel_carries_every_file_of_the_product(installed: Path) -> None:
    """Data files too: the wire's descriptor, the functions' requirements."""
    product = tracked("knapper", "gateway", "functions", "knative", "examples")
    places = [installed / ("" if path.startswith("knapper/") else "knapper/_deployables") / path for path in product]
    assert [place for place in places if not place.is_file()] == []


def metadata(installed: Path) -> Message:
    (path,) = installed.glob("knapper-*.dist-info")
    return Parser().parsestr((path / "METADATA").read_text(encoding="utf-8"))


def test_the_wheel_says_what_it_is(installed: Path) -> None:
    """What an index of packages shows and filters by; the license is one expression, and no classifier repeats it."""
    said = metadata(installed)
    assert (said["Name"], said["Version"], said["Summary"]) == ("knapper", knapper.__version__, PROJECT["description"])
    assert (said["License-Expression"], said.get_all("License-File")) == ("Apache-2.0", ["LICENSE"])
    assert said["Requires-Python"] == ">=3.11"
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert said["Keywords"].split(",") == sorted(PROJECT["keywords"])
    classifiers = said.get_all("Classifier") or []
    assert not [each for each in classifiers if each.startswith("License ::")]
    assert {"Operating System :: POSIX :: Linux", "Programming Language :: Python :: 3.13"} <= {*classifiers}


def test_the_wheel_asks_for_what_is_declared_under_the_extra_that_declares_it(installed: Path) -> None:
    said = metadata(installed)
    optional = PROJECT["optional-dependencies"]
    assert {*(said.get_all("Provides-Extra") or [])} == {*optional}
    required = [Requirement(line) for line in said.get_all("Requires-Dist") or []]
    for extra, lines in {"": PROJECT["dependencies"], **optional}.items():
        asked = [each.name for each in required if (f'extra == "{extra}"' if extra else "None") == str(each.marker)]
        assert sorted(asked) == sorted(Requirement(line).name for line in lines), extra


def test_every_classifier_is_one_that_indexes_know(installed: Path) -> None:
    """PyPI refuses an upload with any other."""
    assert {*(metadata(installed).get_all("Classifier") or [])} <= trove_classifiers.classifiers


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--help"], " demo "), (["--version"], knapper.__version__), (["settings"], "KNAPPER_PORT")],
)
def test_the_command_line_of_the_wheel_answers(installed: Path, arguments: list[str], says: str) -> None:
    answer = run_installed(installed, "from knapper.cli.main import main; main()", *arguments)
    assert answer.returncode == 0, answer.stderr
    assert says in answer.stdout


def test_the_wheel_finds_what_it_deploys(installed: Path) -> None:
    answer = run_installed(installed, "from knapper.local import package_root; print(package_root.deployables())")
    assert answer.returncode == 0, answer.stderr
    assert Path(answer.stdout.strip()) == installed / "knapper" / "_deployables"


def environment_of(installed: Path, home: Path) -> dict[str, str]:
    """What a user's shell has: the wheel and its dependencies, and nothing of the checkout."""
    return {
        "HOME": str(home), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "KNAPPER_DTYPE": "float32",
    }  # fmt: skip


@contextmanager
def served(installed: Path, home: Path, model: Path) -> Iterator[str]:
    """The address of `knapper up` as installed: its gateway and functions are the wheel's."""
    up = [sys.executable, str(installed / "bin/knapper"), "up", "--port", "0", "--model", str(model)]
    environment = environment_of(installed, home)
    with subprocess.Popen(up, cwd=home, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            ready = next((line for line in server.stdout if line.startswith("ready: ")), "")
            assert ready, "knapper up ended before it was ready; its own lines are above"
            yield ready.split()[1]
        finally:
            server.send_signal(signal.SIGINT)


@pytest.mark.timeout(110)
def test_the_example_of_the_readme_learns_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    """Only address and model are exchanged. The console's files are served from the wheel too."""
    model = tiny_model(tmp_path / "models" / "tiny")
    with served(installed, tmp_path, model) as url:
        client = [sys.executable, "-c", readme_example(url, str(model))]
        environment = environment_of(installed, tmp_path)
        said = subprocess.run(client, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=90)
        page = httpx.get(url, follow_redirects=True)
        assets = re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text)
        answers = {asset: httpx.get(url + asset).status_code for asset in assets}
    assert said.returncode == 0, said.stderr
    losses_by_step = [float(loss) for loss in re.findall(r"^\d+ (\S+)$", said.stdout, flags=re.MULTILINE)]
    assert len(losses_by_step) == 10
    assert losses_by_step[-1] < 0.75 * losses_by_step[0]
    assert page.status_code == 200
    assert len(assets) >= 2
    assert set(answers.values()) == {200}, answers


@pytest.mark.timeout(110)
def test_the_demo_of_the_wheel_runs_to_its_curves(installed: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "models" / "tiny")
    done = subprocess.run(
        [sys.executable, str(installed / "bin/knapper"), "demo", "--model", str(model)],
        cwd=tmp_path, env=environment_of(installed, tmp_path), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert figures["loss_last"] < 0.9 * figures["loss_first"]
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "data").exists()


def readme_example(url: str, model: str) -> str:
    """The README's program, for another server and another model."""
    block = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert block
    program = block[1]
    for shown, given in (("http://127.0.0.1:8000", url), ("HuggingFaceTB/SmolLM2-135M-Instruct", model)):
        assert program.count(shown) == 1
        program = program.replace(shown, given)
    return program
