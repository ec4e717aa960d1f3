"""What visits to sessions share: retention, results, and lookups that are made once for all of them."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from math import inf

from knapper.ids import RunId, SessionId
from knapper.settings import Settings
from knapper.state import damage
from knapper.state.checkpoints import EVERYONE, Checkpoints
from knapper.state.gc.uses import SamplerUses
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.newest import Manifests
from knapper.state.journal.records import decode
from knapper.state.layout import ObjectKind
from knapper.state.sessions import Sampler, Samplers, Session, Sessions
from knapper.state.tenant_index import Register
from knapper.store import Store, many
from knapper.store.cache import LruCache


@dataclass(frozen=True)
class Retention:
    """How long garbage is kept, in seconds. The settings `keep_...` say why."""

    results_s: float
    samplers_s: float
    orphans_s: float
    finished_s: float
    records_s: float

    @staticmethod
    def of(settings: Settings) -> "Retention":
        return Retention(
            settings.keep_results_s, settings.keep_samplers_s, settings.keep_orphans_s, settings.keep_finished_s,
            settings.keep_records_s,
        )  # fmt: skip


@dataclass(frozen=True)
class Need:
    """What a job needs of a run: results from operation `seq` on. `running`: whether it is still running."""

    seq: float = inf
    running: bool = False


@dataclass
class VisitResult:
    """`next_s`: seconds until something expires. `left`: whether the session has anything left to collect, ever.

    `over`: whether the session has ended. `others`: sessions whose files have lost a reference.
    """

    deleted: int = 0
    next_s: float = inf
    left: bool = False
    over: bool = False
    others: set[SessionId] = field(default_factory=set)

    def wait(self, seconds: float) -> None:
        """Something is left; visit again after these seconds."""
        self.left, self.next_s = True, min(self.next_s, max(0.0, seconds))


@dataclass
class Memory:
    """What all visits of a process share. `clock`: seconds since the epoch; `now`: monotonic, for grace periods.

    `need`: what a job needs of a run in its session. `account`: stores the usage of a tenant's run before its records
    are deleted.
    """

    store: Store
    retention: Retention
    clock: Callable[[], float]
    now: Callable[[], float]
    need: Callable[[Session, RunId], Awaitable[Need]]
    account: Callable[[str, RunId], Awaitable[None]]
    gateway: str = ""  # the random name of this process
    # In memory only: after a restart, every grace period begins again.
    since: dict[str, float] = field(default_factory=dict)  # when an unreferenced prefix was first seen
    out: dict[RunId, int] = field(default_factory=dict)  # out records up to here are gone, or fences

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.store, self.clock)
        self.sessions, self.samplers, self.register = Sessions(self.store), Samplers(self.store), Register(self.store)
        self.manifests = Manifests(self.store)
        self.acceptor = Acceptor(self.store, self.clock, self.manifests)
        self.records: LruCache[str, Sampler] = LruCache()
        self.uses = SamplerUses(self.store, self.gateway, self.retention.samplers_s, self.clock, self.now)

    async def sampler(self, name: str) -> Sampler | None:
        """The record, cached: it never changes."""
        if (record := self.records.known(name)) is None and (data := await self.store.get(name)) is not None:
            self.records.keep(name, record := decode(data, Sampler, name))
        return record


@dataclass
class SharedLookups:
    """Lookups made once for several visits. `at_once`: no grace period, except for samplers that may be in use."""

    memory: Memory
    at_once: bool = False
    _held: frozenset[str] | None = None
    _unknown: bool = False

    async def held(self, bundles: Iterable[str]) -> frozenset[str]:
        """Those of the bundles that a living checkpoint or a sampler of any session refers to.

        All of them while one of those records is damaged, since it may refer to any.
        """
        if self._held is None and not self._unknown:
            names = await self.memory.store.list(ObjectKind.SAMPLER.under())
            try:
                samplers = await many.each(names, self.memory.sampler)
                living = await self.memory.checkpoints.labels(EVERYONE)
                self._held = frozenset(record.bundle for record in (*samplers, *living) if record is not None)
            except damage.ERRORS as error:
                damage.report(error)
                self._unknown = True
        return frozenset(bundles) if self._held is None else self._held & frozenset(bundles)
