"""The end of a run: a record that says so, and a fence that no claim ever passes. What is deleted comes after both.

Whoever claims looks for the record once its manifest is stored, and whoever snapshots before it writes. So a process
that slept through the end is stopped by the one or by the other, and brings nothing back.
"""

from datetime import UTC, datetime
from typing import Final

from knapper.errors import NotFound
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal.newest import newest_name, newest_of_few
from knapper.state.journal.records import Commit, End, decode, encode
from knapper.store import Store

_EPOCH: Final = 2**62  # of the last fence: above that of every claim, and that of none
_FENCE: Final = encode(Commit(epoch=_EPOCH, results=[]))


async def ended(store: Store, run: RunId) -> End | None:
    """How the run ended, or None: one read, of a run that goes on."""
    n, data = await newest_of_few(store, layout.ends(run))
    return None if data is None else decode(data, End, layout.end(run, n))


async def end(store: Store, run: RunId, asked: End) -> End:
    """End the run for good; return its end as it stands. A run that is deleted stays so; a repetition changes nothing.

    On return nothing more is applied, whoever holds the run. Safe to cut off and to repeat.
    """
    while True:
        n, data = await newest_of_few(store, layout.ends(run))
        stands = None if data is None else decode(data, End, layout.end(run, n))
        if stands is not None and (stands.reason == "deleted" or asked.reason == "finished"):
            break
        if await store.put_if_absent(layout.end(run, n + 1), encode(asked)):
            stands = asked
            break
    await fence(store, run)
    return stands


async def fence(store: Store, run: RunId) -> None:
    """Take the slot that whoever holds the run needs for its next commit."""
    newest = await newest_name(store, layout.commits(run))
    n = layout.last_number(newest) if newest else 0
    if newest and await store.get(newest) == _FENCE:
        return
    while not await store.put_if_absent(layout.commit(run, n + 1), _FENCE):
        n += 1
        if await store.get(layout.commit(run, n)) == _FENCE:
            return


def refusal(run: RunId, end: End) -> NotFound:
    """What its tenant is told."""
    when = f"{datetime.fromtimestamp(end.at, UTC):%Y-%m-%d %H:%M} UTC"
    if end.reason == "deleted":
        return NotFound(f"training run {run} was deleted on {when}; create another with create_lora_training_client")
    return NotFound(
        f"training run {run} is over: its session had ended, and its state was deleted on {when} "
        "(KNAPPER_KEEP_FINISHED_S says how long one is kept); go on from one of its checkpoints in a new run, with "
        "create_training_client_from_state"
    )
