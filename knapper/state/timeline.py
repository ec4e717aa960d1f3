"""A session as a timeline: every operation of its runs from the moment it was accepted until its answer was durable.

The format is the Trace Event Format in JSON, which ui.perfetto.dev and chrome://tracing open: a run is a process there,
an operation a pair of asynchronous events. Samples are in no journal, and so in no trace.
"""

from typing import Any

import msgspec

from knapper import limits
from knapper.ids import RunId
from knapper.state.journal import history
from knapper.state.journal.records import Operation
from knapper.store import Store

_Answers = dict[int, tuple[float, bool]]  # seq -> (when in seconds, whether it failed)


async def of_session(store: Store, runs: list[RunId]) -> bytes:
    """The document. It tells of the newest operations, up to a limit, and says in `otherData` if there are more."""
    events: list[dict[str, Any]] = []
    told, more = 0, False
    for number, run in enumerate(runs):
        kept: list[Operation] = []
        async for group in history.operations(store, run):
            room = limits.operations_listed_max - told
            more = more or len(group) > room
            kept += group[:room]
            told += len(group[:room])
            if not room:
                break
        answers = await _answers(store, run, min((operation.seq for operation in kept), default=0))
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": run}})
        for operation in reversed(kept):
            events += _events(number, operation, answers.get(operation.seq))
    other = {"operations": told, "complete": not more, "operations_max": limits.operations_listed_max}
    return msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms", "otherData": other})


def _events(run: int, operation: Operation, answer: tuple[float, bool] | None) -> list[dict[str, Any]]:
    same = {"name": operation.kind, "cat": "operation", "pid": run, "tid": 0, "id": f"{run}:{operation.seq}"}
    arguments = {"seq": operation.seq, "bytes": len(operation.body_zstd), "answered": answer is not None}
    begin = {**same, "ph": "b", "ts": _microseconds(operation.accepted_at), "args": arguments}
    if answer is None:
        return [begin]
    at, failed = answer
    end = {**same, "ph": "e", "ts": _microseconds(max(at, operation.accepted_at)), "args": {"failed": failed}}
    return [begin, end]


async def _answers(store: Store, run: RunId, oldest: int) -> _Answers:
    found: _Answers = {}
    async for group in history.commits(store, run):
        for commit in group:
            found |= {result.seq: (commit.committed_at, result.failed) for result in commit.results}
        if found and min(found) <= oldest:
            break
    return found


def _microseconds(at: float) -> int:
    return int(at * 1e6)
