"""Who may take a run over when a bell comes. For liveness only: whoever claims, the fence keeps the run safe."""

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
    store: Store, run: RunId, us: Holder, hint: Hint, now: float, manifests: Manifests | None = None
) -> None:
    """Raises NotHolder, which names the holder, unless the run is ours, nobody's, or its holder is lost."""
    newest = await (manifests or Manifests(store)).newest(run)
    if newest is None:
        return
    holder = newest[1]
    if holder.holder.startswith(f"{us.name}/") or (hint.way != "direct" and await _lost(store, run, holder, hint, now)):
        return
    raise NotHolder(f"{run} is held by {holder.holder} at {holder.address}, since epoch {holder.epoch}", 0.2)


async def _lost(store: Store, run: RunId, holder: Manifest, hint: Hint, now: float) -> bool:
    """Whether the gateway says so of this very claim, nobody can ring it, or nothing was heard of it for long."""
    if not holder.address or (hint.way == "lost" and (hint.holder, hint.epoch) == (holder.holder, holder.epoch)):
        return True
    heard = max(holder.claimed_at, await _last_commit(store, run, holder.snapshot_out))
    return not 0.0 <= now - heard < limits.holder_stale_s  # one in the future tells nothing: a clock stepped


async def _last_commit(store: Store, run: RunId, after: int) -> float:
    """When; 0 if there is none."""
    name = await newest_name(store, layout.commits(run), after)
    data = await store.get(name) if name else None
    return 0.0 if data is None else decode(data, Commit, name).committed_at
