"""The state of a job: versions of one small record, of which the highest wins. Without any, the job runs.

running -> cancelled | failed | completed;  cancelled -> running;  failed -> running;  all but running -> deleted

A deleted job keeps this record, so that a process that still works on it, or finds its files again, sees that.
"""

from knapper.errors import UserError
from knapper.ids import number
from knapper.jobs.names import Start
from knapper.state.job_records import Control, State, decode, encode
from knapper.state.journal.newest import newest_of_few
from knapper.store import Store

REPLACED = "job.yaml was replaced"
WITH_SWEEP = "its sweep does not run"  # how the reason of a trial begins that goes on with its sweep
PAUSED = "paused by its quota"  # how the reason of a running job begins that waits for its tenant's quota
_MAY = {
    "running": ("cancelled", "failed", "completed"),
    "cancelled": ("running", "deleted"),
    "failed": ("running", "deleted"),
    "completed": ("deleted",),
    "deleted": (),
}
_RUNNING = Control(state="running", reason="", at=0.0)


async def now(store: Store, start: Start) -> Control:
    """The job's state at this moment."""
    return (await _newest(store, start))[1]


async def runs(store: Store, start: Start) -> bool:
    return (await now(store, start)).state == "running"


async def change(store: Store, start: Start, state: State, reason: str, at: float) -> bool:
    """True once the job is in this state; False if an earlier change excludes it."""
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
    """Record why a running job makes no progress; empty: it does. True if that changed.

    Does nothing for a job that does not run.
    """
    n, newest = await _newest(store, start)
    if newest.state != "running" or newest.reason == reason:
        return False
    return await store.put_if_absent(
        f"{start.controls}{number(n + 1)}", encode(Control(state="running", reason=reason, at=at))
    )


async def ask(store: Store, start: Start, state: State, reason: str, at: float) -> None:
    """Change the state. Raises UserError if the job cannot enter it."""
    if not await change(store, start, state, reason, at):
        is_now = (await now(store, start)).state
        verb = {"cancelled": "cancelled", "running": "resumed"}.get(state, state)
        raise UserError(f"job {start.job} is {is_now}, and cannot be {verb}; allowed then: {_allowed(is_now)}")


def _allowed(state: str) -> str:
    return {"running": "cancel", "cancelled": "resume", "failed": "resume"}.get(state, "nothing; submit it anew")


async def _newest(store: Store, start: Start) -> tuple[int, Control]:
    n, data = await newest_of_few(store, start.controls)
    return n, _RUNNING if data is None else decode(data, Control, f"{start.controls}{number(n)}")
