"""`knapper quota`, as an operator runs it."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from knapper.jobs import quota_file
from knapper.state.quotas import Quota
from tests.security.test_keys import knapper

ALICE = ("--runs", "20", "--bytes", "50GiB", "--tokens-a-day", "10M", "--samples-in-flight", "64", "--rank", "32")


def quota(data: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return knapper(data, "quota", *arguments)


def shown(data: Path, *arguments: str) -> Any:
    return json.loads(quota(data, "show", *arguments, "--json").stdout)


def test_quotas_are_set_shown_and_unset(tmp_path: Path) -> None:
    assert quota(tmp_path, "show").stdout == ("there are no quotas; `knapper quota set TENANT --runs 20` sets one\n")
    made = quota(tmp_path, "set", "alice", *ALICE)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines() == [
        "TENANT        RUNS       BYTES      TOKENS A DAY  SAMPLES IN FLIGHT  RANK",
        "(all others)  unlimited  unlimited  unlimited     unlimited          unlimited",
        "alice         20         50.0 GiB   10000000      64                 32",
    ]
    assert quota(tmp_path, "set", "--default", "--rank", "16").returncode == 0
    assert quota(tmp_path, "set", "alice", "--runs", "unlimited").returncode == 0
    full = {"runs": None, "bytes": 50 * 2**30, "tokens_a_day": 10**7, "samples_in_flight": 64, "rank": 32}
    assert shown(tmp_path) == {"default": {"rank": 16}, "tenants": {"alice": full}}
    assert shown(tmp_path, "alice") == full
    assert shown(tmp_path, "bob")["rank"] == shown(tmp_path, "--default")["rank"] == 16
    assert quota(tmp_path, "unset", "alice").returncode == 0
    assert shown(tmp_path) == {"default": {"rank": 16}, "tenants": {}}
    assert quota(tmp_path, "unset", "--default").returncode == 0
    assert shown(tmp_path) == {"default": {}, "tenants": {}}


def test_a_file_is_all_quotas_there_are(tmp_path: Path) -> None:
    quota(tmp_path, "set", "carol", "--runs", "1")
    file = tmp_path / "quotas.yaml"
    file.write_text("default: {runs: 5}\ntenants: {alice: {bytes: 1MiB}}\n")
    assert quota(tmp_path, "apply", str(file)).returncode == 0
    assert shown(tmp_path) == {"default": {"runs": 5}, "tenants": {"alice": {"bytes": 2**20}}}
    file.write_text("default: {runs: some}\n")
    refused = quota(tmp_path, "apply", str(file))
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"knapper: {file}, line 1: default.runs is 'some'; allowed: a whole number from 0")
    assert shown(tmp_path)["default"] == {"runs": 5}


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("set", "alice", "--rank", "999"), 1, "knapper: --rank is 999; allowed: a whole number from 1 to 256 or unl"),
        (("set", "alice", "--tokens-a-day", "lots"), 1, "knapper: --tokens-a-day is 'lots'; allowed: a whole number"),
        (("set", "alice", "--bytes", "-5"), 1, "knapper: --bytes is '-5'; allowed: a whole number"),
        (("set", "Alice!", "--runs", "1"), 1, "knapper: tenant is 'Alice!'; allowed: 1 to 63 small letters"),
        (("set", "alice"), 2, "name at least one"),
        (("set", "--runs", "1"), 2, "name one tenant, or give --default in its place"),
        (("unset", "alice", "--default"), 2, "name one tenant, or give --default in its place"),
        (("apply", "nowhere.yaml"), 1, "knapper: the file of quotas is 'nowhere.yaml'; allowed: a file that can be"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, arguments: tuple[str, ...], status: int, message: str) -> None:
    refused = quota(tmp_path, *arguments)
    assert refused.returncode == status
    assert message in " ".join(refused.stderr.replace("│", " ").split())
    assert shown(tmp_path) == {"default": {}, "tenants": {}}, "nothing was set"


PAGE = (Path(__file__).parents[2] / "docs" / "operating.md").read_text(encoding="utf-8")


def block(language: str, beginning: str) -> str:
    """The block of the page that begins so."""
    blocks: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return next(each for each in blocks if each.startswith(beginning))


def test_the_commands_of_the_page_do_what_they_say(tmp_path: Path) -> None:
    for line in block("sh", "knapper quota set alice").splitlines():
        command = shlex.split(line, comments=True)
        assert command[:2] == ["knapper", "quota"]
        done = quota(tmp_path, *command[2:])
        assert done.returncode == 0, done.stderr
        if command[2:4] == ["set", "alice"]:
            assert shown(tmp_path, "alice")["tokens_a_day"] == 10_000_000
    assert shown(tmp_path) == {"default": {"runs": 5, "rank": 16}, "tenants": {}}


def test_the_file_of_the_page_is_a_file_of_quotas(tmp_path: Path) -> None:
    content = quota_file.parse(tmp_path, block("yaml", "default: {runs: 5, rank: 16}").encode())
    assert content.of("alice") == Quota(20, 50 * 2**30, 10**7, 64, None)
    assert content.of("bob") == Quota(runs=5, rank=16)
