"""Two and four ranks on gloo against one process: the same numbers, and of any number of ranks the same bits."""

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.ranks import story
from tests.engine.tiny import tiny_model

pytestmark = pytest.mark.timeout(600)
Told = Callable[[int], dict[str, Any]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What the story tells on so many devices; each is run once."""
    directory = tmp_path_factory.mktemp("ranks")
    model = tiny_model(directory / "model", kind="qwen3")

    @cache
    def tell(devices: int) -> dict[str, Any]:
        out = directory / f"{devices}.pt"
        command = [sys.executable, "-m", "tests.engine.ranks.story", str(model), str(devices), str(out)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
        assert ran.returncode == 0, ran.stderr[-4000:]
        found: dict[str, Any] = torch.load(out, weights_only=False)
        return found

    return tell


def arrays(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}


def texts(found: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in found.items() if name.endswith("metrics")}


def test_two_ranks_give_the_numbers_of_one_process(told: Told) -> None:
    """Products over packed matrices add in another order: nothing but float32's rounding is between them."""
    one, two = told(1), told(2)
    assert arrays(one).keys() == arrays(two).keys()
    for name, expected in arrays(one).items():
        scale = np.abs(expected).max()
        tolerance = 1e-4 if name.startswith(("steps", "forward only", "after")) else 1e-6  # AdamW divides by small ones
        assert np.abs(arrays(two)[name] - expected).max() <= tolerance * scale, name
    assert one["error"] == two["error"]


def test_four_ranks_give_the_bits_of_two(told: Told) -> None:
    """A request's micro-batches are added in their order, whoever computed them."""
    two, four = told(2), told(4)
    for name, expected in arrays(two).items():
        assert np.array_equal(arrays(four)[name], expected), name
    assert texts(four) == texts(two)
    assert four["error"] == two["error"]


@pytest.mark.parametrize("rank", [1, 8, 17])
@pytest.mark.parametrize("devices", [2, 4])
def test_a_run_has_the_bits_alone_that_it_has_in_a_crowd(told: Told, devices: int, rank: int) -> None:
    """Seventeen tenants with ranks 1 to 17 share the passes; none of them hangs, and none is moved."""
    found = told(devices)
    for what in ("logprobs", "grads"):
        assert np.array_equal(found[f"crowd {rank} {what}"], found[f"alone {rank} {what}"]), what
    assert np.abs(found[f"crowd {rank} grads"]).max() > 0
    assert found[f"crowd {rank} metrics"] == found[f"alone {rank} metrics"]


@pytest.mark.parametrize("devices", [2, 4])
def test_no_rank_is_idle_while_another_has_two_requests(told: Told, devices: int) -> None:
    assert told(devices)["adapters sent for two small requests"] == 1


def test_an_error_on_another_rank_names_the_datum_of_the_request(told: Told) -> None:
    assert re.match(r"datum 1: the loss importance_sampling is .*; nothing was changed", told(2)["error"])
    assert np.abs(told(2)["after the error grads"]).max() > 0


@pytest.mark.parametrize("devices", [2, 4])
def test_a_pass_asks_for_no_more_than_its_bound(told: Told, devices: int) -> None:
    """Each layer is gathered twice and the head once; an adapter goes to the ranks that compute with it, and comes
    back as a gradient.
    """
    found, layers = told(devices), told(devices)["layers"]
    assert found["count gathers"] == found["calls _allgather_base_"] == 2 * layers + 1
    assert found["count whole"] == 2 * (found["weights"] - found["head"]) + found["head"]
    assert found["count commands"] == found["calls broadcast_"] == 2 * layers + 1 + 2  # a lane, and its results
    others = devices - 1
    headers = 4 * 8 * found["count commands"] * others
    message = 4096  # a lane's texts: two arrays beside the tokens, of at most 64 rows, and what names them
    assert found["arena"] < found["count sent_bytes"] <= found["arena"] + headers + message + 64 * others
    assert found["arena"] < found["count received_bytes"] <= found["arena"] + message


def test_the_next_part_is_gathered_while_one_computes(told: Told) -> None:
    """Parts are begun (+), waited for (!) and given back (-): another is always begun before one is waited for, and no
    more than two are whole at a time.
    """
    order = told(2)["order"]
    whole: set[str] = set()
    begun: set[str] = set()
    for before, step in itertools.pairwise(["", *order.split()]):
        mark, part = step[0], step[1:]
        if mark == "+":
            begun.add(part)
        elif mark == "!":
            assert before != f"+{part}", f"{part} is waited for as soon as it is begun: {order}"
            begun.remove(part)
            whole.add(part)
        else:
            whole.remove(part)
        assert len(whole | begun) <= 2, order
    assert not whole | begun, order


def test_story_has_several_micro_batches_a_request() -> None:
    assert story.ROWS < 2 * 40, "or one rank would compute all"
