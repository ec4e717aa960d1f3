"""Whether a process may claim a run on a doorbell. For liveness only: the fence keeps the run safe in any case."""

from knapper import limits
from knapper.errors import NotHolder
from knapper.events.cloudevents import Hint
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal.holder import Holder
from knapper.state.journal.newest import Manifests, newest_name
from knapper.state.journal.records import Commit, Manifest, decode
from knapper.store import Store


async def expect_free(
    store: Store, run: RunId, own: Holder, hint: Hint, now: float, manifests: Manifests | None = None
) -> None:
    """Raises NotHolder, which names the holder, unless `own` is the holder, there is none, or it is lost."""
    newest = await (manifests or Manifests(store)).newest(run)
    if newest is None:
        return
    holder = newest[1]
    if holder.holder.startswith(f"{own.name}/") or (
        hint.way != "direct" and await _lost(store, run, holder, hint, now)
    ):
        return
    raise NotHolder(f"{run} is held by {holder.holder} at {holder.address}, since epoch {holder.epoch}", 0.2)


async def _lost(store: Store, run: RunId, holder: Manifest, hint: Hint, now: float) -> bool:
    """Whether the gateway reports this claim lost, the holder has no address, or has been silent for too long."""
    if not holder.address or (hint.way == "lost" and (hint.holder, hint.epoch) == (holder.holder, holder.epoch)):
        return True
    last_seen = max(holder.claimed_at, await _last_commit(store, run, holder.snapshot_out))
    return not 0.0 <= now - last_seen < limits.holder_stale_s  # a time in the future proves nothing: a clock stepped


async def _last_commit(store: Store, run: RunId, after: int) -> float:
    """When the last commit was made; 0 if there is none."""
    name = await newest_name(store, layout.commits(run), after)
    data = await store.get(name) if name else None
    return 0.0 if data is None else decode(data, Commit, name).committed_at
