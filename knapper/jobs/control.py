"""What becomes of a job: versions of one small record, of which the highest wins. Without any, the job runs.

running -> cancelled | failed | completed;  cancelled -> running;  failed -> running;  all but running -> deleted

Of a deleted job this record stays: whoever still works on it, or finds its files once more, sees that.
"""

from knapper.errors import UserError
from knapper.ids import number
from knapper.jobs.names import Start
from knapper.state.job_records import Control, State, decode, encode
from knapper.state.journal.newest import newest_of_few
from knapper.store import Store

REPLACED = "job.yaml was replaced"
_MAY = {
    "running": ("cancelled", "failed", "completed"),
    "cancelled": ("running", "deleted"),
    "failed": ("running", "deleted"),
    "completed": ("deleted",),
    "deleted": (),
}
_RUNNING = Control(state="running", reason="", at=0.0)


async def now(store: Store, start: Start) -> Control:
    """What the job is at this moment."""
    return (await _newest(store, start))[1]


async def runs(store: Store, start: Start) -> bool:
    return (await now(store, start)).state == "running"


async def change(store: Store, start: Start, state: State, reason: str, at: float) -> bool:
    """True once it is in this state; False if another change that excludes this one came first."""
    while True:
        n, newest = await _newest(store, start)
        if newest.state == state:
            return True
        if state not in _MAY[newest.state]:
            return False
        data = encode(Control(state=state, reason=reason, at=at))
        if await store.put_if_absent(f"{start.controls}{number(n + 1)}", data):
            return True


async def note(store: Store, start: Start, reason: str, at: float) -> bool:
    """Say why the job, which runs, does not move; empty: it does. True if that is news.

    Of one that does not run nothing is noted.
    """
    n, newest = await _newest(store, start)
    if newest.state != "running" or newest.reason == reason:
        return False
    return await store.put_if_absent(
        f"{start.controls}{number(n + 1)}", encode(Control(state="running", reason=reason, at=at))
    )


async def ask(store: Store, start: Start, state: State, reason: str, at: float) -> None:
    """Raises UserError if the job cannot come into this state."""
    if not await change(store, start, state, reason, at):
        is_now = (await now(store, start)).state
        verb = {"cancelled": "cancelled", "running": "resumed"}.get(state, state)
        raise UserError(f"job {start.job} is {is_now}, and cannot be {verb}; allowed then: {_allowed(is_now)}")


def _allowed(state: str) -> str:
    return {"running": "cancel", "cancelled": "resume", "failed": "resume"}.get(state, "nothing; submit it anew")


async def _newest(store: Store, start: Start) -> tuple[int, Control]:
    n, data = await newest_of_few(store, start.controls)
    return n, _RUNNING if data is None else decode(data, Control, f"{start.controls}{number(n)}")
