"""What a client is told of a sample that waits."""

from functools import partial
from pathlib import Path
from typing import cast

import aiohttp
import pytest

from gateway.sample_queue import QueuedSample, SampleQueue
from gateway.unservable import UnservableModels
from knapper.ids import LOCAL_TENANT, SamplerId
from knapper.local.state import ProcessTable, presence_at


def told(run_directory: Path) -> str:
    http = cast(aiohttp.ClientSession, None)  # nothing is sent
    at = partial(presence_at, run_directory)
    queue = SampleQueue(http, UnservableModels(), str, lambda: 100.0, lambda *_: None, presence=at)
    sample = QueuedSample("q", (SamplerId("s"), 0), LOCAL_TENANT, 1, "http://127.0.0.1:4/sample/", b"", sent_at=93.0)
    state, reason = queue.queue_state(sample)
    assert state == "paused_capacity"
    assert reason is not None
    return reason


@pytest.mark.parametrize(
    ("port", "loading_since", "expected"),
    [(4, None, "busy"), (4, 90.0, "starting from zero"), (5, None, "starting from zero")],
    ids=["it runs", "it loads", "another model's runs"],
)
def test_a_sample_that_waits_on_one_machine_says_for_what(
    tmp_path: Path, port: int, loading_since: float | None, expected: str
) -> None:
    ProcessTable(tmp_path).set("engine", 1, port, loading_since)
    assert told(tmp_path) == f"sample is {expected}; waited 7 s"


def test_where_it_is_not_known_it_says_both(tmp_path: Path) -> None:
    assert told(tmp_path) == "sample is starting from zero, or busy; waited 7 s"
