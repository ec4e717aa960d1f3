"""The end of a run: an End record, then a fence that no claim ever passes. Deletion comes after both.

A claim looks for the record after it has stored its manifest, a snapshot before it writes. So a process that slept
through the end stops at the record or at the fence, and brings nothing back.
"""

from datetime import UTC, datetime
from typing import Final

from knapper.errors import NotFound
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal.newest import newest_name, newest_of_few
from knapper.state.journal.records import Commit, End, decode, encode
from knapper.store import Store

_EPOCH: Final = 2**62  # of the last fence: higher than any claim's
_FENCE: Final = encode(Commit(epoch=_EPOCH, results=[]))


async def ended(store: Store, run: RunId) -> End | None:
    """The end of the run, or None while it goes on, which costs one read."""
    n, data = await newest_of_few(store, layout.ends(run))
    return None if data is None else decode(data, End, layout.end(run, n))


async def end(store: Store, run: RunId, request: End) -> End:
    """End the run for good; return the end that is in force. A deleted run stays deleted, and repetition is harmless.

    On return no holder applies anything more. Safe to interrupt and to repeat.
    """
    in_force = await _record(store, run, request)
    await fence(store, run)
    return in_force


async def _record(store: Store, run: RunId, request: End) -> End:
    while True:
        n, data = await newest_of_few(store, layout.ends(run))
        if data is not None:
            newest = decode(data, End, layout.end(run, n))
            if newest.reason == "deleted" or request.reason == "finished":
                return newest
        if await store.put_if_absent(layout.end(run, n + 1), encode(request)):
            return request


async def fence(store: Store, run: RunId) -> None:
    """Take the slot that the holder of the run needs for its next commit."""
    newest = await newest_name(store, layout.commits(run))
    n = layout.last_number(newest) if newest else 0
    if newest and await store.get(newest) == _FENCE:
        return
    while not await store.put_if_absent(layout.commit(run, n + 1), _FENCE):
        n += 1
        if await store.get(layout.commit(run, n)) == _FENCE:
            return


def refusal(run: RunId, end: End) -> NotFound:
    """The error for the tenant of a run that has ended."""
    when = f"{datetime.fromtimestamp(end.at, UTC):%Y-%m-%d %H:%M} UTC"
    if end.reason == "deleted":
        return NotFound(f"training run {run} was deleted on {when}; create another with create_lora_training_client")
    return NotFound(
        f"training run {run} is over: its session had ended, and its state was deleted on {when} "
        "(KNAPPER_KEEP_FINISHED_S says how long one is kept); go on from one of its checkpoints in a new run, with "
        "create_training_client_from_state"
    )
