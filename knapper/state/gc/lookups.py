"""What looks at sessions share: how long things stay, what a look found, and what is asked of the store once."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from math import inf

from knapper.ids import RunId, SamplerId, SessionId
from knapper.settings import Settings
from knapper.state import damage
from knapper.state.checkpoints import EVERYONE, Checkpoints
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
    """How long what is not needed any more stays, in seconds. The settings `keep_...` say why."""

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
    """What a job may still ask of a run: answers from operation `seq` on. `running`: and it will."""

    seq: float = inf
    running: bool = False


@dataclass
class Look:
    """What a look found. `next_s`: when time alone lets something go. `left`: whether anything may, whenever.

    `over`: the session is, so that nothing happens in it any more. `others`: whose files have lost what led to them.
    """

    deleted: int = 0
    next_s: float = inf
    left: bool = False
    over: bool = False
    others: set[SessionId] = field(default_factory=set)

    def wait(self, seconds: float) -> None:
        """Something is left, to be looked at again then."""
        self.left, self.next_s = True, min(self.next_s, max(0.0, seconds))


@dataclass
class Memory:
    """What all looks of a process share. `clock`: seconds since the epoch; `now`: monotonic, for what is given grace.

    `need`: of a job, in the session, for one of its runs. `account`: writes down what a tenant's run
    used, before the records go that tell it.
    """

    store: Store
    retention: Retention
    clock: Callable[[], float]
    now: Callable[[], float]
    need: Callable[[Session, RunId], Awaitable[Need]]
    account: Callable[[str, RunId], Awaitable[None]]
    # Of this process, so that a new one gives everything its time anew:
    asked: dict[SamplerId, float] = field(default_factory=dict)  # when somebody last did
    since: dict[str, float] = field(default_factory=dict)  # when a prefix was first seen that nobody needs
    out: dict[RunId, int] = field(default_factory=dict)  # out records up to here are gone, or fences

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.store, self.clock)
        self.sessions, self.samplers, self.register = Sessions(self.store), Samplers(self.store), Register(self.store)
        self.manifests = Manifests(self.store)
        self.acceptor = Acceptor(self.store, self.clock, self.manifests)
        self.records: LruCache[str, Sampler] = LruCache()

    async def sampler(self, name: str) -> Sampler | None:
        """The record, which never changes."""
        if (known := self.records.known(name)) is None and (data := await self.store.get(name)) is not None:
            self.records.keep(name, known := decode(data, Sampler, name))
        return known


@dataclass
class SharedLookups:
    """What several looks, one after another, ask once. `at_once`: nothing is given grace but what others may use."""

    memory: Memory
    at_once: bool = False
    _held: frozenset[str] | None = None
    _unknown: bool = False

    async def held(self, bundles: Iterable[str]) -> frozenset[str]:
        """Those of the bundles that a checkpoint which lives, or a sampler, of whatever session leads to.

        All of them while one of those is damaged: it may lead to any.
        """
        if self._held is None and not self._unknown:
            listed = await self.memory.store.list(ObjectKind.SAMPLER.under())
            try:
                samplers = await many.each(listed, self.memory.sampler)
                living = await self.memory.checkpoints.labels(EVERYONE)
                self._held = frozenset(each.bundle for each in (*samplers, *living) if each is not None)
            except damage.ERRORS as error:
                damage.tell(error)
                self._unknown = True
        return frozenset(bundles) if self._held is None else self._held & frozenset(bundles)
