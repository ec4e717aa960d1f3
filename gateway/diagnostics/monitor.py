"""Watches runs as their operations are accepted and committed: provenance into their records, alarms to their users.

All of it is beside the road of a request: nothing here can fail or delay an operation. Memory is bounded; what is
forgotten makes ages unknown, and raises no alarm. What went past another gateway is not known here.
"""

import asyncio
import contextlib
import json
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec
import structlog

from gateway.diagnostics.drawn_log import DrawnLog
from gateway.diagnostics.sample_index import SampleIndex, SampleSource
from gateway.lookups import Lookups
from gateway.sample_queue import QueuedSample
from knapper.diagnostics.rules import Load
from knapper.diagnostics.watch import RunWatch
from knapper.diagnostics.weights import SavedWeights, WeightsReader, describe
from knapper.errors import KnapperError, UserError
from knapper.ids import RunId, Tenant
from knapper.observability import metrics
from knapper.state.alarms import Alarms
from knapper.state.journal.records import Alarm, Commit, Drawn, Kind, Provenance, Result
from knapper.store import Store
from knapper.store.cache import LruCache
from knapper.wire import fingerprints, scan
from knapper.wire.fingerprints import PassContent

_RUNS_MAX: Final = 256
_NOTES_MAX: Final = 1024  # operations of a run that were accepted and have no result yet
_NOTICES_MAX: Final = 4  # of a run whose client does not poll
_QUEUE_MAX: Final = 4096  # results that wait to be looked at
_MATCH_S: Final = 1.0  # the longest that a pass waits for its samples to be entered

log = structlog.get_logger()


class _Params(msgspec.Struct):
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class _Call(msgspec.Struct):
    """The fields of a sample request that say how it is drawn."""

    adapter: str
    params: _Params


class _Metrics(msgspec.Struct):
    metrics: dict[str, float] = {}


@dataclass(frozen=True)
class Accepted:
    """An operation without a result. `optimizer`: a load asks for its state. `source`: the bundle of a creation."""

    kind: Kind
    provenance: Provenance | None = None
    optimizer: bool = False
    source: str = ""


@dataclass
class _Run:
    watch: RunWatch
    accepted: OrderedDict[int, Accepted] = field(default_factory=OrderedDict)
    through: int = -1  # the newest result that was taken
    notices: deque[str] = field(default_factory=lambda: deque(maxlen=_NOTICES_MAX))
    declared: bool = False  # the staleness that its user declared has been read


class Monitor:
    """`clock`: seconds since the epoch. `now`: monotonic seconds."""

    def __init__(
        self,
        store: Store,
        lookups: Lookups,
        clock: Callable[[], float],
        now: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self.weights = WeightsReader(store)
        self.alarms = Alarms(store)
        self.samples = SampleIndex()
        self.drawn = DrawnLog(store, self.samples, clock, new_id)
        self._lookups = lookups
        self._clock, self._now = clock, now
        self._runs: LruCache[RunId, _Run] = LruCache(_RUNS_MAX)
        self._results: asyncio.Queue[tuple[RunId, Result, Accepted | None, bool]] = asyncio.Queue(_QUEUE_MAX)
        self._entering: set[asyncio.Task[None]] = set()

    # -- samples -------------------------------------------------------------------------------------------------------

    async def entered(self) -> None:
        """Return once the samples that are done are entered, or after a moment."""
        if self._entering:
            await asyncio.wait(self._entering, timeout=_MATCH_S)

    def note_sample(self, entry: QueuedSample, response: bytes) -> None:
        """A sample is done. Its weights are read from the store if they are new here."""
        try:
            call = msgspec.json.decode(entry.call, type=_Call)
            found = fingerprints.of_response(response)
        except (msgspec.MsgspecError, UserError) as error:
            log.warning("a sample cannot be traced", request=entry.request_id, reason=str(error))
            return
        metrics.samples_drawn.labels(entry.sampler or "unknown").inc()
        began, ended = entry.submitted_at, self._now()
        if (weights := self.weights.known(call.adapter)) is not None:
            self._enter(entry, call, found, weights, began, ended)
            return
        task = asyncio.create_task(self._read_and_enter(entry, call, found, began, ended))
        self._entering.add(task)
        task.add_done_callback(self._entering.discard)

    async def _read_and_enter(
        self, entry: QueuedSample, call: _Call, found: list[bytes], began: float, ended: float
    ) -> None:
        with contextlib.suppress(KnapperError):
            self._enter(entry, call, found, await self.weights.of(call.adapter), began, ended)

    def _enter(
        self, entry: QueuedSample, call: _Call, found: list[bytes], weights: SavedWeights, began: float, ended: float
    ) -> None:
        truncated = call.params.top_k != -1 or call.params.top_p != 1.0
        entry.drawn_by = describe(weights, entry.sampler)
        source = SampleSource(weights, entry.sampler, call.params.temperature, truncated, began, ended)
        self.samples.add(entry.tenant, found, source)
        self.drawn.note(entry.tenant, found, source)

    # -- operations ----------------------------------------------------------------------------------------------------

    async def trace(self, tenant: Tenant, run: RunId, content: PassContent | None) -> Provenance | None:
        """What the pass trains on, as far as its samples are remembered."""
        if content is None:
            return None
        if any(content.sampled):
            await self.entered()
            if not all(self.samples.find(tenant, turns) for turns in content.sampled if turns):
                with contextlib.suppress(KnapperError):
                    await self.drawn.look(tenant)
        watch = (await self._run(run)).watch
        groups: dict[tuple[SavedWeights, str, float, bool], list[bool]] = {}
        for turns in content.sampled:
            if sources := self.samples.find(tenant, turns):
                oldest = min(sources, key=lambda source: source.weights.seq)
                key = (oldest.weights, oldest.sampler, oldest.temperature, oldest.truncated)
                groups.setdefault(key, []).append(self._overdue(watch, sources[0]))
        drawn = [
            Drawn(
                run=weights.run, seq=weights.seq, step=weights.step, digest=weights.digest, sampler=sampler,
                temperature=temperature, truncated=truncated, datums=len(overdue), overdue=sum(overdue),
            )
            for (weights, sampler, temperature, truncated), overdue in groups.items()
        ]  # fmt: skip
        sampled = sum(1 for turns in content.sampled if turns)
        return Provenance(loss=content.loss, digest=content.digest, sampled=sampled, drawn=drawn)

    @staticmethod
    def _overdue(watch: RunWatch, source: SampleSource) -> bool:
        """Whether newer weights were there when the completion began, and the run stood still until it was drawn."""
        weights = source.weights
        since = watch.since(weights.run, weights.seq, weights.digest)
        if since is None:
            return False
        newer = watch.timeline.updates_since(since, until=source.began)
        return newer is not None and newer > watch.declared and watch.timeline.stood_still(source.began, source.ended)

    async def note_accepted(self, run: RunId, seq: int, accepted: Accepted) -> None:
        state = await self._run(run)
        state.watch.timeline.accept(seq, self._now())
        state.accepted[seq] = accepted
        while len(state.accepted) > _NOTES_MAX:
            state.accepted.popitem(last=False)

    def note_committed(self, run: RunId, commit: Commit) -> None:
        """Take the commit's results; they are looked at later."""
        if (state := self._runs.known(run)) is None:
            return
        for result in commit.results:
            if result.seq <= state.through:
                continue
            accepted = state.accepted.pop(result.seq, None)
            missed = accepted is None or (state.through >= 0 and result.seq != state.through + 1)
            if missed:
                state.watch.timeline.miss(result.seq if accepted is None else result.seq - 1)
            if accepted is not None and not result.failed:
                state.watch.timeline.apply(result.seq, accepted.kind, self._now())
            state.through = result.seq
            with contextlib.suppress(asyncio.QueueFull):
                self._results.put_nowait((run, result, accepted, missed))

    def take_notice(self, run: RunId) -> str:
        """A message for the run's client, or nothing: each is handed out once."""
        state = self._runs.known(run)
        return state.notices.popleft() if state is not None and state.notices else ""

    # -- results, one after another ------------------------------------------------------------------------------------

    async def work(self) -> None:
        """Look at results for ever."""
        while True:
            run, result, accepted, missed = await self._results.get()
            try:
                if missed:
                    (await self._run(run)).watch.miss()
                if accepted is not None:
                    await self._look(run, result, accepted)
            except (KnapperError, msgspec.MsgspecError) as error:
                log.warning("a result was not looked at", run=run, seq=result.seq, reason=str(error))
            finally:
                self._results.task_done()

    async def idle(self) -> None:
        """Return once every result so far was looked at."""
        await self._results.join()

    async def _look(self, run: RunId, result: Result, accepted: Accepted) -> None:
        state = await self._run(run)
        watch = state.watch
        if accepted.kind in ("forward_backward", "tombstone"):
            if result.failed:
                watch.excuse()
            elif accepted.provenance is not None:
                watch.add_pass(result.seq, accepted.provenance, scan.metrics(result.body))
        elif result.failed:
            return
        elif accepted.kind == "optim_step":
            await self._step(run, state, result)
        elif accepted.kind in ("create", "load_weights"):
            bundle = accepted.source or result.source
            if bundle:
                await self._load(watch, result.seq, await self.weights.of(bundle), accepted.optimizer)

    async def _load(self, watch: RunWatch, seq: int, weights: SavedWeights, optimizer: bool) -> None:
        source = self._runs.known(RunId(weights.run))
        load = Load(seq, weights.run, weights.seq, weights.step, optimizer, weights.resumable)
        watch.own.add(weights.digest)
        watch.begin_from(load, None if source is None else source.watch)

    async def _step(self, run: RunId, state: _Run, result: Result) -> None:
        await self._declare(run, state)
        watch, values = state.watch, msgspec.json.decode(result.body, type=_Metrics).metrics
        for age in watch.staleness():
            metrics.sample_age.observe(age)
        if (kl := watch.kl()) is not None:
            metrics.sampler_trainer_kl.observe(kl)
        for name, message in watch.add_step(result.seq, values).items():
            metrics.alarms.labels(name).inc()
            log.warning("alarm", run=run, alarm=name, message=message)
            state.notices.append(f"{run}: {message}")
            step = int(values.get("optimizer_steps", 0))
            await self.alarms.put(run, Alarm(name=name, seq=result.seq, step=step, message=message, at=self._clock()))

    async def _run(self, run: RunId) -> _Run:
        if (state := self._runs.known(run)) is None:
            state = _Run(RunWatch(run))
            self._runs.keep(run, state)
        return state

    async def _declare(self, run: RunId, state: _Run) -> None:
        """Read what the run's user declared, once."""
        if not state.declared:
            state.watch.declared = declared_staleness((await self._lookups.spec_of(run)).user_metadata_json)
            state.declared = True


def declared_staleness(user_metadata_json: str) -> int:
    """`staleness` of the metadata of a run, in optimizer steps; 0 without one, or for one that is no number."""
    try:
        declared = json.loads(user_metadata_json).get("staleness", 0)
        return max(0, int(declared))
    except (ValueError, TypeError, AttributeError):
        return 0
