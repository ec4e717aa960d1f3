"""A job's client of its run: operations with derived sequence numbers, in the journal of a run like any other.

The journal gives exactly-once and recovery. A repetition sends the same bytes, and gets the first one's result.
"""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from knapper.errors import UserError
from knapper.events.cloudevents import Committed, Frame
from knapper.ids import RunId
from knapper.state.journal.accept import Acceptor, pack
from knapper.state.journal.newest import Manifests
from knapper.state.journal.records import Creation, Drawn, Kind, Provenance, Result, Spec
from knapper.state.journal.results import Results
from knapper.store import Store
from knapper.wire import fingerprints, proto, reductions, requests
from knapper.wire.types import AdamW, Datum, ForwardBackward, ForwardBackwardOutput

_TOKENS_MAX = 8192  # of one forward_backward: bounds how long a cancelled job goes on; a longer datum goes alone
_DATUMS_MAX = 512


class Applies(Protocol):
    """The part of knapper.serving.runs.ClaimedRuns that jobs use."""

    def answer(self, run_id: RunId) -> AsyncIterator[Frame]: ...


@dataclass(frozen=True)
class AppliedOperation:
    """`accepted_at`: when it was first accepted, None where that is no longer known. `device_s`: its device seconds."""

    result: Result
    accepted_at: float | None
    device_s: float


class Journal:
    """The journals of all runs that this process's jobs train."""

    def __init__(self, store: Store, claimed_runs: Applies, clock: Callable[[], float]) -> None:
        manifests = Manifests(store)
        self._acceptor = Acceptor(store, clock, manifests)
        self._results = Results(store, manifests)
        self._claimed_runs = claimed_runs

    async def create(self, spec: Spec, source: str = "") -> None:
        """Create the run, with its first operation, from its seed or a bundle. Repeating it changes nothing."""
        await self._acceptor.create(Creation(spec=spec, source=source), msgspec.json.encode(spec) + source.encode())
        await self._result(RunId(spec.run), 0)

    async def apply(
        self, run: RunId, seq: int, kind: Kind, body: bytes, provenance: Provenance | None = None
    ) -> AppliedOperation:
        """Apply the operation. Raises UserError if it failed because of its request."""
        accepted_at = await self._acceptor.accept(run, seq, kind, pack(body), provenance)
        result = await self._result(run, seq)
        if accepted_at is None:  # by an earlier slice or process
            accepted_at = await self._acceptor.accepted_at(run, seq)
        return AppliedOperation(result, accepted_at, await self._results.device_s(run, seq))

    async def creation_s(self, run: RunId) -> float:
        """Device seconds that creating the run took."""
        await self._result(run, 0)
        return await self._results.device_s(run, 0)

    def forget(self, run: RunId) -> None:
        """Free the run's memory; the store keeps everything."""
        self._results.forget(run)

    async def _result(self, run: RunId, seq: int) -> Result:
        while (result := await self._results.find(run, seq)) is None:
            async for frame in self._claimed_runs.answer(run):
                if isinstance(frame, Committed):
                    self._results.offer(run, frame.n, frame.commit)
        if result.failed:
            raise UserError(f"operation {seq} of run {run} failed: {_reason(result.body)}")
        return result


@dataclass
class RunClient:
    """Operations of one run, one after another. `go_on` is called before each, with its tokens, and may raise."""

    journal: Journal
    run: RunId
    seq: int  # of the next operation
    go_on: Callable[[int], Awaitable[None]]
    tokens: int = 0  # sent so far
    sent_bytes: int = 0  # and received
    device_s: float = 0.0  # of its operations
    began_at: float | None = None  # when the first of them was accepted

    async def forward_backward(
        self,
        data: Sequence[Datum],
        loss: str,
        config: dict[str, float],
        *,
        forward_only: bool = False,
        drawn: Sequence[Drawn] = (),
    ) -> ForwardBackwardOutput:
        """Over all data, in as many operations as needed; metrics are joined by their reductions.

        `drawn`: of each datum, where its completion is sampled.
        """
        outputs: list[dict[str, Any]] = []
        metrics: dict[str, float] = {}
        for chunk in chunks(data):
            own = drawn[len(outputs) : len(outputs) + len(chunk)]
            request = ForwardBackward(self.run, self.seq, chunk, loss, dict(config), forward_only)
            tokens = sum(datum.tokens.size for datum in chunk)
            body = proto.encode_forward_backward(request)
            result = await self._apply("forward_backward", body, tokens, _provenance(body, own))
            output = proto.decode_forward_backward_output(result.body)
            outputs += output.outputs
            metrics = reductions.join(metrics, output.metrics)
            self.tokens += tokens
        return ForwardBackwardOutput(outputs, metrics)

    async def optim_step(self, values: AdamW) -> dict[str, float]:
        params = requests.AdamParams(
            learning_rate=values.learning_rate, beta1=values.beta1, beta2=values.beta2, eps=values.eps,
            weight_decay=values.weight_decay, grad_clip_norm=values.grad_clip_norm,
        )  # fmt: skip
        request = requests.OptimStep(model_id=self.run, seq_id=self.seq, adam_params=params)
        result = await self._apply("optim_step", requests.encode(request))
        return msgspec.json.decode(result.body, type=_Stepped).metrics

    async def save_for_sampler(self, name: str) -> str:
        """The checkpoint's path."""
        request = requests.SaveWeightsForSampler(model_id=self.run, seq_id=self.seq, path=name)
        return _path(await self._apply("save_weights_for_sampler", requests.encode(request)))

    async def save(self, name: str) -> str:
        """The checkpoint's path; it includes the optimizer's state."""
        request = requests.SaveWeights(model_id=self.run, seq_id=self.seq, path=name)
        return _path(await self._apply("save_weights", requests.encode(request)))

    async def load(self, path: str) -> None:
        """Load a checkpoint of `save` into the run, with the optimizer's state."""
        request = requests.LoadWeights(model_id=self.run, seq_id=self.seq, path=path, optimizer=True)
        await self._apply("load_weights", requests.encode(request))

    async def _apply(self, kind: Kind, body: bytes, tokens: int = 0, provenance: Provenance | None = None) -> Result:
        await self.go_on(tokens)
        applied = await self.journal.apply(self.run, self.seq, kind, body, provenance)
        self.seq += 1
        self.sent_bytes += len(body) + len(applied.result.body)
        self.device_s += applied.device_s
        if self.began_at is None:
            self.began_at = applied.accepted_at
        return applied.result


class _Stepped(msgspec.Struct):
    metrics: dict[str, float]


class _Saved(msgspec.Struct):
    path: str


def chunks(data: Sequence[Datum]) -> Iterator[list[Datum]]:
    """Cut in order, between datums, and depending on the data alone, so that a repetition makes the same operations."""
    chunk, tokens = list[Datum](), 0
    for datum in data:
        if chunk and (tokens + datum.tokens.size > _TOKENS_MAX or len(chunk) == _DATUMS_MAX):
            yield chunk
            chunk, tokens = [], 0
        chunk.append(datum)
        tokens += datum.tokens.size
    if chunk:
        yield chunk


def _provenance(body: bytes, drawn: Sequence[Drawn]) -> Provenance | None:
    """Of an encoded pass; None for one that only computes."""
    content = fingerprints.of_pass(body)
    if content is None:
        return None
    return Provenance(loss=content.loss, digest=content.digest, sampled=len(drawn), drawn=joined(drawn))


def joined(drawn: Iterable[Drawn]) -> list[Drawn]:
    """Those of the same weights, drawn in the same way, as one."""
    datums: Counter[Drawn] = Counter()
    for each in drawn:
        datums[msgspec.structs.replace(each, datums=0)] += each.datums
    return [msgspec.structs.replace(each, datums=count) for each, count in datums.items()]


def _path(result: Result) -> str:
    return msgspec.json.decode(result.body, type=_Saved).path


def _reason(body: bytes) -> str:
    answer = msgspec.json.decode(body)
    return str(answer.get("error", answer)) if isinstance(answer, dict) else str(answer)
