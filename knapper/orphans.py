"""Orphans: files of adapters that nothing leads to any more. Found by looking, given an hour, deleted.

What keeps a bundle: a checkpoint that lives, and every sampler of a session that is not over, whatever became of the
checkpoint that the sampler was made from. A session is over when it has finished, or after a week without a sign of it.
A save writes its files before it names them, and a load reads them after it has found the name: the hour is for both.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from knapper import limits
from knapper.checkpoints import EVERYONE, Checkpoints
from knapper.ids import SamplerId, SessionId, session_of
from knapper.journal import bundles
from knapper.journal.records import decode
from knapper.remembered import Remembered
from knapper.sessions import Sampler, Sessions
from knapper.store import Store, many


@dataclass
class Orphans:
    """`clock`: seconds since the epoch, by which things expire; `now`: monotonic seconds, by which an hour is one."""

    store: Store
    checkpoints: Checkpoints
    sessions: Sessions
    clock: Callable[[], float]
    now: Callable[[], float]
    _since: dict[str, float] = field(default_factory=dict)  # in memory: a new process gives everything its hour anew
    _expires_at: float = float("inf")  # the next checkpoint that will
    _bundles: Remembered[str, str] = field(default_factory=Remembered)
    _finished: Remembered[SessionId, bool] = field(default_factory=Remembered)

    @property
    def quiet_s(self) -> float:
        """How long no more files become orphans by themselves; 0 while some wait for their hour to be over."""
        return 0.0 if self._since else max(self._expires_at - self.clock(), 0.0)

    async def sweep(self) -> list[str]:
        """Delete what nothing has led to for the time of grace; return the bundles deleted. Safe to cut off."""
        stored = {name.rpartition("/")[0] + "/" for name in await self.store.list("adapters/")}
        wanted = await self._wanted()  # looked at last: what was named in the meantime is seen
        now = self.now()
        self._since = {bundle: self._since.get(bundle, now) for bundle in sorted(stored - wanted)}
        deleted = [bundle for bundle, since in self._since.items() if now - since >= limits.orphan_grace_s]
        for bundle in deleted:
            await bundles.delete(self.store, bundle)
            del self._since[bundle]
        return deleted

    async def _wanted(self) -> set[str]:
        samplers: dict[SessionId, list[str]] = {}
        for name in await self.store.list("samplers/"):
            samplers.setdefault(session_of(SamplerId(name.removeprefix("samplers/"))), []).append(name)
        over = await many.each(samplers, self._over)
        held = [name for names, done in zip(samplers.values(), over, strict=True) if not done for name in names]
        wanted = set(await many.each(held, self._bundle_of))
        living = await self.checkpoints.labels(EVERYONE)
        self._expires_at = min((label.expires_at for label in living if label.expires_at), default=float("inf"))
        return wanted | {label.bundle for label in living}

    async def _over(self, session: SessionId) -> bool:
        """Asked once of a session that has finished: that is for good."""
        if not self._finished.known(session) and await self.sessions.finished(session) is not None:
            self._finished.keep(session, True)
        return self._finished.known(session) or await self.sessions.silent(session, self.clock())

    async def _bundle_of(self, name: str) -> str:
        async def load() -> str:
            data = await self.store.get(name)
            return "" if data is None else decode(data, Sampler, name).bundle

        return await self._bundles.get(name, load)
