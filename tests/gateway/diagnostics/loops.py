"""Training loops of a client, as the gateway's monitor sees them: real messages, real losses, and a policy of a few
numbers in place of a model. The clock stands where the loop puts it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from gateway.diagnostics.monitor import Accepted, Monitor
from gateway.lookups import Lookups
from gateway.sample_queue import QueuedSample
from knapper.engine.training import divergence
from knapper.engine.training.losses import LOSSES
from knapper.ids import RunId, SamplerId, Tenant
from knapper.state import layout
from knapper.state.journal import bundles
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.records import Alarm, Commit, Creation, Kind, Result, Spec
from knapper.store.memory import MemoryStore
from knapper.wire import fingerprints, proto, sample_requests
from knapper.wire.types import (
    Datum,
    ForwardBackward,
    ForwardBackwardOutput,
    SampledSequence,
    SampleOutput,
    SamplingParams,
)

TENANT = Tenant("local")
VOCAB, PROMPT, LENGTH = 32, 3, 12
_CONFIG = {"gspo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}}


@dataclass(frozen=True)
class Sampler:
    """Weights that were saved, or the base model."""

    logits: NDArray[np.float64]
    bundle: str = ""


@dataclass
class Bench:
    """A gateway's monitor over a store in memory, and the runs that it watches."""

    seed: int = 0
    now: float = 0.0
    runs: int = 0
    requests: int = 0

    def __post_init__(self) -> None:
        self.store = MemoryStore()
        self.acceptor = Acceptor(self.store, lambda: self.now)
        self.restart()
        self.random = np.random.default_rng(self.seed)
        self.base = self.random.normal(size=VOCAB)

    def restart(self) -> None:
        """Another gateway's monitor, which knows what is in the store."""
        lookups = Lookups(self.store, self.acceptor, lambda: self.now, lambda _: None)
        self.monitor = Monitor(self.store, lookups, lambda: self.now, lambda: self.now, lambda: f"{self.requests:032x}")

    async def run(self, *, metadata: str = "{}", source: str = "", optimizer: bool = False) -> "Loop":
        """A new run; from the weights `source`, if any."""
        self.runs += 1
        run = RunId(f"00000000-0000-4000-8000-{self.runs:012d}:train:0")
        spec = Spec(
            run=run, tenant=TENANT, base_model="tiny/model", rank=4, alpha=32.0, seed=1, train_attn=True,
            train_mlp=True, train_unembed=True, user_metadata_json=metadata,
        )  # fmt: skip
        creation = Creation(spec=spec, source=source, with_optimizer=optimizer)
        loop = Loop(self, run, spec)
        await self.monitor.note_accepted(run, 0, Accepted("create", optimizer=optimizer, source=source))
        await self.acceptor.create(creation, run.encode())
        await loop.commit(0, "application/json", b"{}")
        return loop

    async def draw(
        self, sampler: Sampler, count: int, *, temperature: float = 1.0, took_s: float = 1.0, at: float | None = None
    ) -> list[Datum]:
        """Rollouts of one prompt, as they are trained on. `at`: when they began; now, otherwise."""
        prompt = self.random.integers(0, VOCAB, PROMPT)
        began = self.now if at is None else at
        logprobs = _logprobs(sampler.logits / temperature)
        tokens = self.random.choice(VOCAB, size=(count, LENGTH), p=np.exp(logprobs))
        sequences = [
            SampledSequence(row.astype(np.int32), logprobs[row].astype(np.float32), stopped=True) for row in tokens
        ]
        call = sample_requests.SampleCall(
            base_model="tiny/model", adapter=sampler.bundle, prompt=prompt.tolist(), seed=1, num_samples=count,
            params=SamplingParams(max_tokens=LENGTH, temperature=temperature),
        )  # fmt: skip
        self.requests += 1
        entry = QueuedSample(
            f"s-{self.requests}",
            (SamplerId("x:sample:0"), self.requests),
            TENANT,
            count,
            "",
            sample_requests.encode(call),
        )
        entry.submitted_at, entry.sampler = began, "engine float32"
        self.now = max(self.now, began + took_s)
        self.monitor.note_sample(entry, proto.encode_sample_response(SampleOutput(sequences)))
        await asyncio.sleep(0)
        rewards = self.random.normal(size=count)
        return [_datum(prompt, each, advantage) for each, advantage in zip(sequences, rewards, strict=True)]


@dataclass
class Loop:
    """One run: its client, and its engine. Its policy moves a little with each step."""

    bench: Bench
    run: RunId
    spec: Spec
    loss: str = "importance_sampling"
    seq: int = 0
    steps: int = 0
    moved: float = 0.003  # how far a step moves the logits
    committed: int = 0
    learning_rate: float = 1e-4
    known: list[float] = field(default_factory=list)  # of each pass, the share of its datums whose sampler is known
    logits: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.logits = self.bench.base.copy()

    def base(self) -> Sampler:
        return Sampler(self.bench.base)

    async def save(self) -> Sampler:
        """save_weights_and_get_sampling_client, to its end."""
        return await self._save("save_weights_for_sampler", {"adapter_model.safetensors": self.logits.tobytes()})

    async def save_state(self) -> Sampler:
        files = {"adapter_model.safetensors": self.logits.tobytes(), "optimizer.safetensors": b"moments"}
        return await self._save("save_weights", files)

    async def _save(self, kind: Kind, files: dict[str, bytes]) -> Sampler:
        seq = await self._accept(kind)
        bundle = layout.export(self.run, seq, 1)
        await bundles.write(self.bench.store, bundle, files, spec=self.spec, seq=seq, epoch=1, step=self.steps)
        await self.commit(seq, "application/json", b"{}")
        return Sampler(self.logits.copy(), bundle)

    async def load(self, weights: Sampler, step: int, *, optimizer: bool) -> None:
        seq = await self._accept("load_weights", optimizer=optimizer)
        self.logits, self.steps = weights.logits.copy(), step if optimizer else 0
        await self.commit(seq, "application/json", b"{}", source=weights.bundle)

    async def forward_backward(self, data: list[Datum], *, fails: bool = False) -> None:
        inputs = [self._inputs(datum) for datum in data]
        loss, config = LOSSES[self.loss], _CONFIG.get(self.loss, {})
        request = ForwardBackward(self.run, self.seq + 1, inputs, self.loss, dict(config), False)
        body = proto.encode_forward_backward(request)
        seq = await self._accept("forward_backward", body)
        if fails:
            await self.commit(seq, "application/json", b'{"error": "no"}', failed=True)
            return
        outputs: list[dict[str, NDArray[Any]]] = []
        sums: dict[str, float] = {}
        for datum in inputs:
            learner = _logprobs(self.logits)[datum.inputs["target_tokens"]].astype(np.float32)
            tensors = {name: torch.from_numpy(a) for name, a in datum.inputs.items() if name != "target_tokens"}
            value = loss(torch.from_numpy(learner), tensors, config)
            outputs.append({"logprobs": learner})
            sums = {name: sums.get(name, 0.0) + float(number) for name, number in value.metrics.items()}
        output = ForwardBackwardOutput(outputs, sums | divergence.metrics(inputs, outputs))
        await self.commit(seq, "application/x-protobuf", proto.encode_forward_backward_output(output))

    def _inputs(self, datum: Datum) -> Datum:
        loss = LOSSES[self.loss]
        inputs = {name: array for name, array in datum.inputs.items() if name in (*loss.required, *loss.optional)}
        if "sequence_ratio_mask" in loss.required:
            inputs["sequence_ratio_mask"] = (datum.inputs["logprobs"] != 0).astype(np.float32)
        return Datum(datum.tokens, inputs)

    async def optim_step(self) -> list[Alarm]:
        """One step. The alarms that it raised, as they are stored."""
        seq = await self._accept("optim_step")
        self.steps += 1
        self.logits = self.logits + self.moved * self.bench.random.normal(size=VOCAB)
        values = {"optimizer_steps": float(self.steps), "learning_rate": self.learning_rate}
        await self.commit(seq, "application/json", msgspec.json.encode({"metrics": values}))
        return [alarm for alarm in await self.bench.monitor.alarms.newest(self.run) if alarm.seq == seq]

    async def step(self, data: list[Datum]) -> list[Alarm]:
        await self.forward_backward(data)
        return await self.optim_step()

    async def _accept(self, kind: Kind, body: bytes | None = None, *, optimizer: bool = False) -> int:
        self.seq += 1
        content = None if body is None else fingerprints.of_pass(body)
        provenance = await self.bench.monitor.trace(TENANT, self.run, content)
        if provenance is not None and provenance.sampled:
            self.known.append(sum(drawn.datums for drawn in provenance.drawn) / provenance.sampled)
        await self.bench.monitor.note_accepted(self.run, self.seq, Accepted(kind, provenance, optimizer))
        return self.seq

    async def commit(
        self, seq: int, content_type: Any, body: bytes, *, failed: bool = False, source: str = "", took_s: float = 0.5
    ) -> None:
        self.bench.now += took_s
        result = Result(seq=seq, sha256=b"", content_type=content_type, body=body, failed=failed, source=source)
        self.committed += 1
        self.bench.monitor.note_committed(self.run, Commit(epoch=1, results=[result], committed_at=self.bench.now))
        await self.bench.monitor.idle()


def _logprobs(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _datum(prompt: NDArray[Any], drawn: SampledSequence, advantage: float) -> Datum:
    """As tinker-cookbook assembles it: zeros before the completion."""
    whole = np.concatenate([prompt, drawn.tokens])
    zeros = np.zeros(len(prompt) - 1, np.float32)
    inputs = {
        "target_tokens": whole[1:].astype(np.int64),
        "logprobs": np.concatenate([zeros, drawn.logprobs]),
        "advantages": np.concatenate([zeros, np.full(len(drawn.tokens), advantage, np.float32)]),
    }
    return Datum(whole[:-1].astype(np.int32), inputs)


def told(story: Callable[[Bench], Any], seed: int = 0) -> Any:
    """The result of a story on a bench of its own, whose monitor works."""

    async def main() -> Any:
        bench = Bench(seed)
        working = asyncio.create_task(bench.monitor.work())
        try:
            return await story(bench)
        finally:
            working.cancel()

    return asyncio.run(main())
