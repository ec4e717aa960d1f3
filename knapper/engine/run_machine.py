"""The journal's state machine over training: an operation in, the next state and the answer out."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import msgspec

from knapper.engine import checkpoint_format, hardware
from knapper.engine.executor import Executor, Work, timed
from knapper.engine.out_of_memory import MemoryShortage
from knapper.engine.training.scheduler import TrainingScheduler
from knapper.engine.training.trainer import RunState, Trainer
from knapper.errors import Corrupt
from knapper.state.journal.machine import Files, Outcome
from knapper.state.journal.records import Operation, Spec
from knapper.wire import proto, requests

T = TypeVar("T")


class TrainingMachine:
    """knapper.state.journal.machine.Machine over a trainer. `clock`, in seconds, only measures costs."""

    def __init__(self, trainer: Trainer, device: Executor, clock: Callable[[], float]) -> None:
        self._trainer = trainer
        self.device = device
        self._clock = clock
        self.scheduler = TrainingScheduler(trainer, device, clock)

    async def create(self, spec: Spec, source: Files | None, with_optimizer: bool) -> RunState:
        """Raises InvalidField for a spec that cannot be trained, or a checkpoint of another form than the spec's."""
        if source is None:
            return await self._run(lambda: _once(lambda: self._trainer.create(spec)), spec)
        return await self._run(lambda: _once(lambda: self._load(spec, source, with_optimizer)), spec)

    async def apply(self, state: RunState, operation: Operation, source: Files | None) -> Outcome[RunState]:
        """Raises UserError for a user's mistake, OutOfMemory if memory is lacking; the state is unchanged then."""
        if operation.kind == "forward_backward":
            future = self.scheduler.submit(state, lambda: proto.decode_forward_backward(operation.body()))
            state, output, cost_s = future.result() if future.done() else await asyncio.wrap_future(future)
            return Outcome(state, "application/x-protobuf", proto.encode_forward_backward_output(output), cost_s=cost_s)
        outcome, cost_s = await self._run(lambda: timed(self._apply(state, operation, source), self._clock), state.spec)
        return replace(outcome, cost_s=cost_s)

    async def serialize(self, state: RunState) -> Files:
        return await self._run(lambda: _once(lambda: checkpoint_format.freeze(state)), state.spec)

    def serialized_bytes(self, state: RunState) -> int:
        return checkpoint_format.frozen_bytes(state)

    async def restore(self, spec: Spec, files: Files) -> RunState:
        return await self._run(lambda: _once(lambda: self._restore(spec, files)), spec)

    async def _run(self, begin: Callable[[], Work[T]], spec: Spec) -> T:
        """Run a task; if it lacks memory, release all caches and run it once more.

        Raises OutOfMemory if memory is lacking then too.
        """
        shortage = MemoryShortage(None)
        for _ in range(2):
            try:
                return await self.device.run(begin(), spec.run)
            except Exception as error:
                if (shortage_now := MemoryShortage.of(error)) is None:
                    raise
                shortage = shortage_now
            hardware.release(self._trainer.decoder.device)
        subject = f"what an operation of {spec.run} needs, an adapter of rank {spec.rank},"
        raise shortage.error(
            subject, self._trainer.decoder.device, "Train one of a lower rank, or when fewer others train"
        )

    def _apply(self, state: RunState, operation: Operation, source: Files | None) -> Work[Outcome[RunState]]:
        match operation.kind:
            case "optim_step":
                values = requests.decode(operation.body(), requests.OptimStep).adamw()
                state, metrics = yield from self._trainer.optim_step(state, values)
                return _answer(state, {"metrics": metrics})
            case "load_weights":
                request = requests.decode(operation.body(), requests.LoadWeights)
                if source is None:
                    raise Corrupt(f"the files of {request.path} were not handed to the load")
                yield
                state = self._load(state.spec, source, request.optimizer)
                return _answer(state, {"path": request.path, "model_id": operation.run, "type": "load_weights"})
            case "save_weights" | "save_weights_for_sampler" | "save_weights_external":
                yield
                files = checkpoint_format.export(state, with_optimizer=operation.kind == "save_weights")
                return Outcome(state, "application/json", b"", export=files, step=state.moments.step)
            case _:
                raise Corrupt(f"operation {operation.seq} of {operation.run} is of kind {operation.kind}")

    def _load(self, spec: Spec, files: Files, with_optimizer: bool) -> RunState:
        """The run of a checkpoint: no pending gradients; without the optimizer, zero moments and zero steps."""
        layout = self._trainer.layout(spec)
        return self._trainer.begin(spec, *checkpoint_format.read(files, spec, layout, with_optimizer=with_optimizer))

    def _restore(self, spec: Spec, files: Files) -> RunState:
        weights_P, moments, grads_P = checkpoint_format.thaw(files, self._trainer.layout(spec))
        state = self._trainer.begin(spec, weights_P, moments)
        return state if grads_P is None else replace(state, grads_P=grads_P.to(state.weights_P.device))


def _answer(state: RunState, body: object) -> Outcome[RunState]:
    return Outcome(state, "application/json", msgspec.json.encode(body))


def _once(function: Callable[[], T]) -> Work[T]:
    """A task of one step."""
    yield from ()
    return function()
