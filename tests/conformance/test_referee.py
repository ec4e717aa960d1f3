"""The referee passes knapper, and fails a knapper with a fault in it, by the checks that the fault concerns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.server import Server

ROOT = Path(__file__).parents[2]
PLANTED = ROOT / "tests" / "referee" / "planted"
CONCERNED = {
    "ppo_without_clips": {"ppo is its formula", "ppo has its formula's gradient"},
    "last_gradient_alone": {"gradients add up until a step"},
    "warmer_in_a_crowd": {"a sample is the same alone and in a crowd"},
    "seeds_of_its_own": {
        "a seed brings the same text again, and other seeds others",
        "a sample is the same alone and in a crowd",
    },
}


def judged(server: Server, to: Path, *options: str) -> tuple[int, dict[str, str], str]:
    """(exit status, outcome by check, what was printed)"""
    command = [sys.executable, "-m", "knapper", "referee", server.url, "--json", str(to / "found.json"), *options]
    environment = os.environ | {"TINKER_API_KEY": "tml-local", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (to / "found.json").exists(), done.stdout + done.stderr
    found = json.loads((to / "found.json").read_text())
    return done.returncode, {each["name"]: each["outcome"] for each in found["findings"]}, done.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "groups",
    [("methods", "exactness"), pytest.param(("methods", "semantics", "exactness", "speed"), marks=pytest.mark.long)],
    ids="-".join,
)
def test_knapper_passes(server: Server, tmp_path: Path, groups: tuple[str, ...]) -> None:
    chosen = [option for group in groups for option in ("--only", group)]
    status, outcomes, printed = judged(server, tmp_path, *chosen, "--page", str(tmp_path / "page.md"))
    assert {name for name, outcome in outcomes.items() if outcome not in ("passed", "measured")} == set(), printed
    assert status == 0
    assert "exactness 6 of 6" in printed
    page = (tmp_path / "page.md").read_text()
    assert all(f"## {group.capitalize()}" in page for group in groups)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "faults",
    [
        ("ppo_without_clips", "last_gradient_alone", "warmer_in_a_crowd"),
        pytest.param(("seeds_of_its_own",), marks=pytest.mark.long),
        *(pytest.param((fault,), marks=pytest.mark.long) for fault in list(CONCERNED)[:3]),
    ],
    ids="-".join,
)
def test_a_knapper_with_a_fault_fails_by_the_checks_that_it_concerns(
    model: Path, tmp_path: Path, faults: tuple[str, ...]
) -> None:
    settings = {"PYTHONPATH": f"{PLANTED}{os.pathsep}{ROOT}", "PLANTED": ",".join(faults)}
    with Server.start(model, tmp_path / "data", settings=settings) as server:
        status, outcomes, printed = judged(server, tmp_path, "--only", "semantics", "--only", "exactness")
    wrong = {name for name, outcome in outcomes.items() if outcome == "failed"}
    assert wrong == set().union(*(CONCERNED[fault] for fault in faults)), printed
    assert status == 1


@pytest.mark.timeout(600)
@pytest.mark.long
def test_a_server_under_kills_is_durable(model: Path, tmp_path: Path) -> None:
    with Server.start(model, tmp_path / "data") as server:
        kill = f'{sys.executable} -c \'import json, os; at = json.load(open("{server.data}/run/processes.json")); '
        kill += 'os.kill(at["engine"]["pid"], 9)\''
        status, outcomes, printed = judged(server, tmp_path, "--only", "durability", "--kill", kill)
    assert (status, set(outcomes.values())) == (0, {"passed"}), printed


def test_without_a_command_that_kills_durability_is_not_tried_and_fails_nothing(server: Server, tmp_path: Path) -> None:
    status, outcomes, _ = judged(server, tmp_path, "--only", "durability")
    assert (status, set(outcomes.values())) == (0, {"not tried"})
