"""A scorer with one sandbox for all tests of a module."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from knapper.rewards import scorer, spec
from knapper.rewards.rollouts import ScorableRollout
from knapper.rewards.scorer import RewardScore
from knapper.sandbox.pool import Sandbox

Scorer = Callable[..., list[RewardScore]]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def sandbox(runner: asyncio.Runner) -> Iterator[Sandbox]:
    sandbox = Sandbox(at_once=2)
    yield sandbox
    runner.run(sandbox.close())


@pytest.fixture
def scores(runner: asyncio.Runner, sandbox: Sandbox) -> Scorer:
    """Scores of (completion, answer) pairs; `files` as text."""

    def score(described: Any, *pairs: tuple[str, Any], **files: str) -> list[RewardScore]:
        reward = spec.parse(described, {name.replace("_", "."): text.encode() for name, text in files.items()})
        rollouts = [ScorableRollout(f"r{n}", "the prompt", *pair) for n, pair in enumerate(pairs)]
        return runner.run(scorer.score(reward, rollouts, sandbox=sandbox))

    return score
