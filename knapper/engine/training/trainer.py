"""Training steps of one run: pure functions from (state, request) to (state, result), as generators.

P parameters.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knapper.engine.executor import Work
from knapper.engine.layers.determinism import keeps_bits
from knapper.engine.layers.lora import Layout, Lora, layout
from knapper.engine.memory import ROWS_CPU
from knapper.engine.models.base import Model
from knapper.engine.training import batch, optimizer
from knapper.engine.training.batch import PendingRequest, micro_batches
from knapper.engine.training.optimizer import Moments, is_finite
from knapper.engine.training.validation import check, expect_fit
from knapper.errors import UserError
from knapper.state.journal.records import Spec
from knapper.wire.types import AdamW, ForwardBackward, ForwardBackwardOutput

if TYPE_CHECKING:
    from knapper.engine.ranks.leader import Leader

# Up to this many rows a CPU's pass takes more requests. From 384 on each is no faster. From 128 on little faster, and
# every request waits for the whole pass: so a few runs go one after another, or they would end every step together and
# then all wait for rewards; more runs gain, since those behind them do.
ROWS_SHARED_CPU, ROWS_SHARED_BY_FEW_CPU, FEW = 384, 128, 3
# Of several GPUs each should have some of a request: larger ones compute longer for each gather of the weights, but
# then a request of 16k tokens would keep two of eight busy.
ROWS_SPREAD_GPU = 2048


@dataclass(frozen=True)
class RunState:
    """The whole state of a run. Its tensors are never written to; a step makes new ones.

    `weights_P`, `grads_P` float32 arenas in `layout`. `grads_P`: the sum since the last optimizer step; None: none
    since. It is always finite.
    """

    spec: Spec
    layout: Layout
    weights_P: Tensor
    moments: Moments
    grads_P: Tensor | None = None

    @property
    def scale(self) -> float:
        return self.spec.alpha / self.spec.rank

    def lora(self) -> Lora:
        """The current adapter for a forward pass; views of the arena."""
        return self.layout.lora(self.weights_P, self.scale)


class Trainer:
    """Trains adapters of many runs on one frozen base model; keeps no run's state."""

    def __init__(
        self,
        decoder: Model,
        rows_max: int = ROWS_CPU,
        datum_rows_max: int | None = None,
        ranks: "Leader | None" = None,
    ) -> None:
        """`rows_max` of a micro-batch bounds memory and how long others wait; a longer datum goes alone, up to
        `datum_rows_max` tokens. Both are of the process's account of memory. `ranks`: over which passes are spread.
        """
        self.decoder, self.rows_max, self._datum_rows_max, self._ranks = decoder, rows_max, datum_rows_max, ranks

    @property
    def lanes(self) -> int:
        """Micro-batches of one request that a pass may have."""
        return 1 if self._ranks is None else self._ranks.lanes

    def compute(self, lanes: Sequence[Sequence[tuple[RunState, PendingRequest]]]) -> Work[None]:
        """`batch.compute` of each lane, all at once. Raises MemoryShortage if a rank lacks memory."""
        if self._ranks is not None:
            return self._ranks.compute(self.decoder, lanes)
        (lane,) = lanes
        return batch.compute(self.decoder, [request for _, request in lane])

    @property
    def batch_rows(self) -> int:
        """Rows that a micro-batch is cut at, whatever the number of ranks: a gradient's bits depend on it."""
        spread_on_gpus = self._ranks is not None and self.decoder.device.type != "cpu"
        return min(self.rows_max, ROWS_SPREAD_GPU) if spread_on_gpus else self.rows_max

    def rows_shared(self, waiting: int) -> int:
        """Rows up to which a pass takes more requests while `waiting` wait."""
        if self.decoder.device.type != "cpu":
            return self.rows_max
        return min(self.rows_max, ROWS_SHARED_BY_FEW_CPU if waiting <= FEW else ROWS_SHARED_CPU)

    def layout(self, spec: Spec) -> Layout:
        """Raises InvalidField for a spec that cannot be trained on this model."""
        return layout(self.decoder.config, spec)

    def create(self, spec: Spec) -> RunState:
        """A new run before its first step. Raises InvalidField."""
        run_layout = self.layout(spec)
        return self.begin(spec, run_layout.initial(spec.seed))

    def begin(self, spec: Spec, weights_P: Tensor, moments: Moments | None = None) -> RunState:
        """A run with these weights; without moments they and the step count are zero."""
        run_layout = self.layout(spec)
        weights_P = weights_P.to(self.decoder.device)
        if moments is None:
            moments = Moments(torch.zeros_like(weights_P), torch.zeros_like(weights_P), 0)
        else:
            moments = Moments(moments.m_P.to(self.decoder.device), moments.v_P.to(self.decoder.device), moments.step)
        return RunState(spec, run_layout, weights_P, moments)

    def open(self, state: RunState, request: ForwardBackward) -> PendingRequest:
        """The request in micro-batches, cut by its own size only, so that its bits are its own. Raises UserError."""
        loss, config = check(request, self.decoder.config)
        expect_fit(request, self._datum_rows_max)
        images = [
            self.decoder.placed(datum.images, f"datum {index}: model_input") for index, datum in enumerate(request.data)
        ]
        sums_P = None if request.forward_only else torch.zeros_like(state.weights_P)
        batches = deque(micro_batches(request.data, self.batch_rows, images))
        lora = leaves(self.decoder, state.layout, state.weights_P, state.scale, sums_P)
        return PendingRequest(lora, loss, config, sums_P, batches, request.data)

    def close(self, state: RunState, pending: PendingRequest) -> tuple[RunState, ForwardBackwardOutput]:
        """The state after the finished request. Raises its UserError."""
        output = pending.output()
        return (state if pending.sums_P is None else replace(state, grads_P=_added(state, pending.sums_P))), output

    def forward_backward(
        self, state: RunState, request: ForwardBackward
    ) -> Work[tuple[RunState, ForwardBackwardOutput]]:
        """Adds the gradient of each datum's loss to the pending ones; forward_only leaves them unchanged.

        Yields after each layer. Losses and gradients are sums, never means. Raises UserError for a wrong request or a
        non-finite loss or gradient; `state` is unchanged then. `TrainingScheduler` computes the same for several runs
        at once.
        """
        pending = self.open(state, request)
        while not pending.done:
            yield from self.compute([[(state, pending)]])
        return self.close(state, pending)

    def optim_step(self, state: RunState, values: AdamW) -> Work[tuple[RunState, dict[str, float]]]:
        """One AdamW step with the pending gradients, which it uses up. (state, metrics)

        Without pending gradients the gradient is zero: moments decay, the weights move by their momentum, the step
        counts.
        """
        yield from ()
        grads_P = torch.zeros_like(state.weights_P) if state.grads_P is None else state.grads_P
        weights_P, moments, metrics = optimizer.step(state.weights_P, grads_P, state.moments, values)
        return replace(state, weights_P=weights_P, moments=moments, grads_P=None), metrics


def leaves(model: Model, run_layout: Layout, weights_P: Tensor, scale: float, sums_P: Tensor | None) -> Lora:
    """The adapter in an arena as leaves whose gradients add into the arena `sums_P`; plain views without one."""
    lora = run_layout.lora(weights_P, scale)
    if sums_P is not None:
        sums = run_layout.lora(sums_P, scale)
        for tensors, grads in ((lora.a, sums.a), (lora.b, sums.b)):
            for target in tensors:
                tensors[target] = tensors[target].detach().requires_grad_()
                tensors[target].grad = grads[target]
    if not keeps_bits(model.device) and model.dtype != torch.float32:
        lora = replace(lora, rounded=run_layout.rounded(weights_P, scale, model.dtype))
    return lora


def _added(state: RunState, sums_P: Tensor) -> Tensor:
    """Pending gradients plus this request's. Raises UserError, naming a target module, for a non-finite one."""
    total_P = sums_P if state.grads_P is None else state.grads_P + sums_P
    if not is_finite(total_P):
        matrix_name = next(
            f"{target.name} ({'AB'[part]})"
            for target, *matrices in state.layout.matrices(total_P)
            for part, matrix in enumerate(matrices)
            if not is_finite(matrix)
        )
        raise UserError(
            f"the gradient of {matrix_name} is not finite; this request added nothing to the pending gradients. "
            "Look for huge weights or advantages"
        )
    return total_P
