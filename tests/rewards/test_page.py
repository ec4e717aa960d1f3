"""docs/rewards.md says what is."""

import asyncio
import json
import re
from pathlib import Path

import msgspec
import yaml

from knapper import limits
from knapper.jobs.spec import EnvironmentSpec
from knapper.rewards import requests, spec
from knapper.sandbox.pool import Sandbox
from knapper.sandbox.syscalls import STAGES

PAGE = (Path(__file__).parent.parent.parent / "docs" / "rewards.md").read_text()


def test_the_table_lists_every_named_reward_with_all_its_options() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(spec.NAMED)
    of_all = {"weight", "label", "between", "take"}  # said above and below the table
    for name, row in rows:
        for field in msgspec.structs.fields(spec.NAMED[name]):
            assert field.name in of_all or f"`{field.name}`" in row, f"{name}: {field.name}"


def test_the_examples_of_a_job_are_rewards() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    read = [yaml.safe_load(block) for block in blocks]
    assert [next(iter(block)) for block in read] == ["reward", "reward", "reward", "environment"]
    for block in read[:3]:
        spec.parse(block["reward"], {"reward.py": b""})
    msgspec.convert(read[3]["environment"], EnvironmentSpec)


def test_the_example_of_a_request_is_answered_as_shown() -> None:
    block = re.search(r"^answer = httpx.post\(.*?json=(\{.*?\n    \}),\n.*?# (\{.*?)$", PAGE, re.MULTILINE | re.DOTALL)
    assert block

    async def answer() -> bytes:
        sandbox = Sandbox(at_once=1)
        try:
            return await requests.answer(json.dumps(eval(block[1])).encode(), sandbox)  # noqa: S307  our own page
        finally:
            await sandbox.close()

    assert json.loads(asyncio.run(answer())) == json.loads(block[2])


def test_its_numbers_are_those_of_the_code() -> None:
    assert f"At most {limits.rollouts_per_request_max} rollouts" in PAGE
    assert f"at most {limits.reward_text_chars_max:,} characters" in PAGE
    assert f"{limits.rewards_request_s:g} seconds for all" in PAGE
    assert f"{limits.sandbox_memory_bytes // limits.MIB} MiB" in PAGE
    assert f"(10 unless given, at most {limits.reward_s_max:g})" in PAGE
    assert spec.Code(code="reward.py").timeout_s == 10
    assert 40 <= len(STAGES["sealed"]) < 50  # "some forty"
