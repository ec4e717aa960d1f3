"""One run, operation by operation: joins the passes of each optimizer step, and says what is wrong with it."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from knapper.diagnostics import rules
from knapper.diagnostics.rules import Before, Load, Step
from knapper.diagnostics.timeline import Timeline
from knapper.state.journal.records import Drawn, Provenance
from knapper.wire import reductions

_BATCHES_MAX: Final = 256  # that are remembered, to know them again
_DOUBLED_TOKENS_MIN: Final = 64  # two small passes may be equal by chance


@dataclass
class _Round:
    """The steps that train on samples of the same weights."""

    key: int = -2  # the newest save among those that drew them
    repeats: bool = False


@dataclass
class RunWatch:
    """`declared`: the staleness, in updates, that the run's user said is meant."""

    run: str
    declared: int = 0
    load: Load | None = None  # since the newest step
    before: Before | None = None
    own: set[str] = field(default_factory=set)  # digests of the weights that the run began from
    timeline: Timeline = field(default_factory=Timeline)
    raised: set[str] = field(default_factory=set)  # by the newest step
    batches: OrderedDict[bytes, tuple[int, int]] = field(default_factory=OrderedDict)  # -> (step, seq)
    newest: Before | None = None
    newest_batch: bytes = b""
    silent_groups: int = 0  # in a row
    repeated: bool = False  # some batch was trained on twice already
    _passes: list[tuple[Provenance, float]] = field(default_factory=list)  # since the newest step, with their tokens
    _drawn: list[tuple[Drawn, int | None]] = field(default_factory=list)
    _metrics: dict[str, float] = field(default_factory=dict)
    _excused: bool = False  # a pass of this step failed, or nothing is known of it
    _stepped: bool = False
    _began_at: int = 0  # the operation by which the run has the weights that it began from
    _round: _Round = field(default_factory=_Round)
    _regular: bool = False

    def miss(self) -> None:
        """An operation went past another gateway: begin anew after it. (Its timeline is told at once.)"""
        self._forget_passes()
        self._stepped, self._round, self._regular = False, _Round(), False

    def excuse(self) -> None:
        """A pass of the step under way failed, or nothing is known of it: the step may well be without another."""
        self._excused = True

    def begin_from(self, load: Load, source: "RunWatch | None") -> None:
        """The run's weights are now those that were loaded. `source`: the watch of the run that saved them."""
        self.load, self._began_at = load, load.seq
        self._forget_passes()
        if source is not None:
            self.before = source.newest
            self.repeated = self.repeated or source.repeated
            contained = [(digest, at) for digest, at in source.batches.items() if at[1] <= load.saved_at]
            self.batches = OrderedDict(contained)
            self.newest_batch = contained[-1][0] if contained else b""

    def add_pass(self, seq: int, provenance: Provenance, metrics: Mapping[str, float]) -> None:
        self._passes.append((provenance, metrics.get("tokens:sum", 0.0)))
        self._metrics = reductions.join(self._metrics, metrics)
        for drawn in provenance.drawn:
            since = self.since(drawn.run, drawn.seq, drawn.digest)
            self._drawn.append((drawn, None if since is None else self.timeline.updates_since(since, before=seq)))

    def since(self, run: str, seq: int, digest: str) -> int | None:
        """The operation of this run since which it has left those weights behind; None if they are of another run."""
        if run == self.run:
            return seq
        if digest in self.own:
            return self._began_at
        return None if run else 0

    def add_step(self, seq: int, metrics: Mapping[str, float]) -> dict[str, str]:
        """The alarms that this step raises: name -> sentence. None is raised again by the step after."""
        self._count_silent_groups()
        step = self._step(seq, metrics)
        unknown = step.passes == 0 and (self._excused or not self._stepped)
        found = {} if unknown else rules.alarms(step)
        new = {name: sentence for name, sentence in found.items() if name not in self.raised}
        self.raised = set(found)
        self._remember(step, seq)
        return new

    def staleness(self) -> list[int]:
        """The ages of the weights that drew the data of the step under way, in updates."""
        return [age for _, age in self._drawn if age is not None]

    def kl(self) -> float | None:
        """The mean k2 of the sampled tokens of the step under way."""
        tokens = self._metrics.get("sampled_tokens:sum", 0.0)
        return self._metrics.get("kl_sample_train_v2:sum", 0.0) / tokens if tokens else None

    def _step(self, seq: int, metrics: Mapping[str, float]) -> Step:
        digests, tokens = [each.digest for each, _ in self._passes], sum(count for _, count in self._passes)
        half = len(digests) // 2
        doubled = half > 0 and digests[:half] == digests[half:] and tokens >= 2 * _DOUBLED_TOKENS_MIN
        batch = b"".join(digests)
        repeats = self.batches.get(batch) if batch else None
        same_round = self._round.key == self._round_key()
        return Step(
            run=self.run, seq=seq, step=int(metrics.get("optimizer_steps", 0)), passes=len(self._passes),
            losses=frozenset(each.loss for each, _ in self._passes), kl=self.kl(),
            sampled=sum(each.sampled for each, _ in self._passes), drawn=tuple(self._drawn), declared=self.declared,
            learning_rate=metrics.get("learning_rate", 0.0), repeats=repeats[0] if repeats else None,
            silent_groups=self.silent_groups, doubled_pass=doubled,
            regular=self._regular and same_round and not self._round.repeats,
            contained=batch == self.newest_batch and not self.repeated, load=self.load, before=self.before,
            own=frozenset(self.own),
        )  # fmt: skip

    def _count_silent_groups(self) -> None:
        if groups := self._metrics.get("groups:sum", 0.0):
            silent = self._metrics.get("degenerate_groups:sum", 0.0) == groups
            self.silent_groups = self.silent_groups + int(groups) if silent else 0

    def _round_key(self) -> int:
        """Which samples the step under way trains on: by the newest weights among those that drew them."""
        return max((drawn.seq for drawn, _ in self._drawn), default=-1)

    def _remember(self, step: Step, seq: int) -> None:
        key = self._round_key()
        if key != self._round.key:
            if self._round.key >= 0:
                self._regular = not self.repeated
            self._round = _Round(key)
        if step.repeats is not None:
            self._round.repeats = self.repeated = True
        batch = b"".join(each.digest for each, _ in self._passes)
        if batch:
            self.batches[batch] = (step.step, seq)
            self.newest = Before(step.losses, step.learning_rate)
            self.newest_batch = batch
        while len(self.batches) > _BATCHES_MAX:
            self.batches.popitem(last=False)
        self._stepped, self.load, self.before = True, None, None
        self._forget_passes()

    def _forget_passes(self) -> None:
        self._passes, self._drawn, self._metrics, self._excused = [], [], {}, False
