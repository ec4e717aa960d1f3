"""The examples run as their first lines say, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from examples import demo
from tests.conformance.server import Server


def lines_of(example: str, server: Server) -> list[float]:
    """The last number of each line that the example prints."""
    environment = {**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local"}
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{example}"], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DEPRECATED" not in done.stderr, "what a newcomer reads first uses nothing that the SDK is about to remove"
    return [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]


def test_the_reinforcement_example_runs(server: Server) -> None:
    rewards = lines_of("rl_addition", server)
    assert len(rewards) == 30
    assert all(0 <= reward <= 1 for reward in rewards)


def test_the_reinforcement_example_with_rewards_of_the_server_runs(server: Server) -> None:
    rewards = lines_of("rl_server_rewards", server)
    assert len(rewards) == 8
    assert all(0 <= reward <= 1.1 for reward in rewards)
    assert max(rewards) > 0  # something was scored: no answer at all is worth nothing


def test_the_supervised_example_learns(server: Server) -> None:
    losses = lines_of("sft_chat", server)
    assert len(losses) == 15
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, RuntimeError])
def test_the_demo_s_server_leaves_nothing_behind_unless_something_failed(
    end: type[BaseException] | None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = ""

    def use() -> None:
        nonlocal url
        with demo.knapper(str(model)) as url:
            assert demo.DATA.is_dir()
            if end is not None:
                raise end

    if end is None:
        use()
    else:
        with pytest.raises(end):
            use()
    assert demo.DATA.exists() == (end is RuntimeError), "what failed can be looked at"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/api/v1/healthz")
