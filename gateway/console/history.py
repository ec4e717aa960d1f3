"""What a run did, from its journal: a curve's points, its newest operations, and its claims; read once, and kept.

The journal keeps a result for a while after its commit (KNAPPER_KEEP_RESULTS_S), and all since the second newest
snapshot; older points are there as long as this process is.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from knapper import limits
from knapper.errors import UserError
from knapper.ids import RunId
from knapper.state import damage, layout
from knapper.state.journal import history
from knapper.state.journal.records import Commit, Drawn, Kind, Manifest, Operation, Result, decode
from knapper.store import Store, many
from knapper.store.cache import LruCache
from knapper.wire import proto, reductions

_RUNS_MAX: Final = 16
_CLAIMS_READ_MAX: Final = 64
_PAUSE_S: Final = 1.0  # a shorter one nobody notices
_WAITED = "waiting for a process, which may have to start and load the model"
_RESTORED = "restoring the run, and the operation itself"
_NO_MEANS: Final = frozenset(
    {"loss:sum", "tokens:sum", "weights:sum", "sampled_tokens:sum", "groups:sum", "degenerate_groups:sum"}
)
_SAMPLED: Final = frozenset({"kl_sample_train_v1:sum", "kl_sample_train_v2:sum", "entropy:sum"})  # by sampled tokens
Point = dict[str, float]


@dataclass(frozen=True)
class AnsweredOperation:
    """An operation with its result. `size`: bytes of its record's body. Times in seconds since the epoch."""

    seq: int
    kind: Kind
    accepted_at: float
    committed_at: float
    epoch: int
    size: int
    failed: bool
    error: str


class _Metrics(msgspec.Struct):
    metrics: dict[str, float] = {}
    error: str = ""


@dataclass
class RunHistory:
    """`through`: the newest commit that was read. `points`: one for each optimizer step."""

    through: int = 0
    points: deque[Point] = field(default_factory=lambda: deque(maxlen=limits.console_points_max))
    operations: deque[AnsweredOperation] = field(default_factory=lambda: deque(maxlen=limits.console_points_max))
    _sums: dict[str, float] = field(default_factory=dict)  # of passes since the last step
    _sources: list[Drawn] = field(default_factory=list)  # of the same passes
    _device_s: float = 0.0

    def newest(self) -> list[AnsweredOperation]:
        """The newest operations, newest first."""
        return list(self.operations)[: -limits.console_operations_max - 1 : -1]

    def pauses(self, claimed_at: Mapping[int, float]) -> list["Pause"]:
        """Of operations that the first commit of a claim answered, newest first. `claimed_at`: by epoch."""
        pauses, epoch = [], 0
        for done in self.operations:
            at = claimed_at.get(done.epoch)
            if done.epoch != epoch and at is not None:
                waited_s, restored_s = max(0.0, at - done.accepted_at), done.committed_at - max(at, done.accepted_at)
                stages = [(_WAITED, waited_s), (_RESTORED, max(0.0, restored_s))]
                pauses.append(Pause(done.seq, done.accepted_at, stages))
            epoch = done.epoch
        return [pause for pause in reversed(pauses) if pause.seconds >= _PAUSE_S]

    def add(self, n: int, commit: Commit, answered: Iterable[tuple[Operation, Result, dict[str, float]]]) -> None:
        """The commit's results, in order. `answered`: (operation, result, its metrics)."""
        self.through = n
        self._device_s += commit.device_s
        for operation, result, metrics in answered:
            error = _error(result) if result.failed else ""
            done = AnsweredOperation(
                operation.seq, operation.kind, operation.accepted_at, commit.committed_at, commit.epoch,
                len(operation.body_zstd), result.failed, error,
            )  # fmt: skip
            self.operations.append(done)
            if operation.kind == "forward_backward":
                self._sums = reductions.join(self._sums, metrics)
                self._sources += _own(operation)
            elif operation.kind == "optim_step" and not result.failed:
                self._step(metrics, commit.committed_at)

    def _step(self, metrics: dict[str, float], at: float) -> None:
        sums, tokens = self._sums, self._sums.get("tokens:sum", 0.0)
        point = {"step": metrics.get("optimizer_steps", len(self.points) + 1.0), "at": at}
        if tokens:
            point["loss/mean"] = sums.get("loss:sum", 0.0) / (sums.get("weights:sum") or tokens)
            means = [name for name in sums if name.endswith(":sum") and name not in _NO_MEANS | _SAMPLED]
            point |= {name.replace(":sum", "/mean"): sums[name] / tokens for name in means}
            point["tokens"] = tokens
        if sampled := sums.get("sampled_tokens:sum"):
            point |= {name.replace(":sum", "/mean"): sums[name] / sampled for name in _SAMPLED if name in sums}
            point |= {name.partition(":")[0]: sums[name] for name in sums if name.endswith((":min", ":max"))}
            if groups := sums.get("groups:sum"):
                point["degenerate_groups"] = sums.get("degenerate_groups:sum", 0.0) / groups
        point |= {name: value for name, value in metrics.items() if name != "optimizer_steps"}
        if tokens and self._device_s:
            point["tokens/second"] = tokens / self._device_s
        if datums := sum(drawn.datums for drawn in self._sources):
            ages = [max(0.0, point["step"] - 1 - drawn.step) * drawn.datums for drawn in self._sources]
            point["staleness"] = sum(ages) / datums
        self.points.append(point)
        self._sums, self._sources, self._device_s = {}, [], 0.0


@dataclass(frozen=True)
class Pause:
    """An operation that waited for a process. `stages`: (what, seconds), in order."""

    seq: int
    at: float
    stages: list[tuple[str, float]]

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.stages)


class Histories:
    """Those of the runs that were looked at last."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: LruCache[RunId, RunHistory] = LruCache(_RUNS_MAX)

    async def of(self, run: RunId) -> RunHistory:
        """Up to the newest commit: one listing, and a read for each commit and operation that is new."""
        if (known := self._known.known(run)) is None:
            self._known.keep(run, known := RunHistory())
        async for group in history.commits_after(self._store, run, known.through, limits.console_points_max):
            for n, commit in group:
                await self._add(run, known, n, commit)
        return known

    async def manifests(self, run: RunId) -> list[Manifest]:
        """The newest, oldest first: each has a claim, and many have the same."""
        names = (await self._store.list(layout.manifests(run)))[-_CLAIMS_READ_MAX:]

        async def read(name: str) -> Manifest | None:
            data = await self._store.get(name)
            return None if data is None else decode(data, Manifest, name)

        manifests = await damage.readable(names, read)
        return [each for each in manifests if each is not None]

    async def _add(self, run: RunId, known: RunHistory, n: int, commit: Commit) -> None:
        operations = await many.each(
            [result.seq for result in commit.results], lambda seq: damage.unless(self._operation(run, seq), None)
        )
        answered = []
        for operation, result in zip(operations, commit.results, strict=True):
            if operation is not None:
                metrics = {} if result.failed else await many.off_loop(_metrics, (operation, result))
                answered.append((operation, result, metrics))
        if n > known.through:  # else another reader was faster
            known.add(n, commit, answered)

    async def _operation(self, run: RunId, seq: int) -> Operation | None:
        name = layout.operation(run, seq)
        data = await self._store.get(name)
        return None if data is None else decode(data, Operation, name)


def _metrics(answered: tuple[Operation, Result]) -> dict[str, float]:
    """Of a pass its sums, of a step its values. A pass that only computes belongs to no step, and has none."""
    operation, result = answered
    try:
        if operation.kind == "forward_backward":
            if proto.is_forward_only(operation.body()):
                return {}
            return proto.decode_metrics(result.body)
        if operation.kind == "optim_step":
            return msgspec.json.decode(result.body, type=_Metrics).metrics
    except (UserError, msgspec.MsgspecError, *damage.ERRORS):
        pass
    return {}


def _own(operation: Operation) -> list[Drawn]:
    """Data of the pass that weights of its own run drew, or the base model: their age is known, in steps."""
    if operation.provenance is None:
        return []
    return [drawn for drawn in operation.provenance.drawn if drawn.run in ("", operation.run) and drawn.step >= 0]


def _error(result: Result) -> str:
    try:
        return msgspec.json.decode(result.body, type=_Metrics).error
    except msgspec.MsgspecError:
        return ""
