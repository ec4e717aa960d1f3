"""Training steps of one run: pure functions from (state, request) to (state, result), in pieces that other work may go
between.

P parameters, N rows of a micro-batch, T tokens of a datum, K targets a position.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from knapper.engine import optimizer
from knapper.engine.checks import check
from knapper.engine.decoder import Decoder, Segment
from knapper.engine.device import Task
from knapper.engine.head import HeadLora, target_logprobs
from knapper.engine.lora import Layout, Lora, layout
from knapper.engine.losses import Loss
from knapper.engine.optimizer import Moments, is_finite
from knapper.errors import UserError
from knapper.journal.records import Spec
from knapper.wire.types import AdamW, Datum, ForwardBackward, ForwardBackwardOutput

ROWS_MAX = 2048  # of a micro-batch: bounds memory and how long neighbours wait; a longer datum goes alone


@dataclass(frozen=True)
class RunState:
    """Everything that a run is. Its tensors are never written to again; a step makes new ones.

    `weights_P`, `grads_P` float32 arenas in `layout`. `grads_P`: the sum since the last optimizer step; None: nothing
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
        """The adapter as it is, for a forward pass; views of the arena."""
        return self.layout.lora(self.weights_P, self.scale)


class Trainer:
    """Trains adapters of many runs on one frozen base model; keeps nothing of any of them."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def layout(self, spec: Spec) -> Layout:
        """Raises InvalidField for a spec that cannot be trained on this model."""
        return layout(self.decoder.config, spec)

    def create(self, spec: Spec) -> RunState:
        """A new run, before its first step. Raises InvalidField."""
        where = self.layout(spec)
        return self.begin(spec, where.begin(spec.seed))

    def begin(self, spec: Spec, weights_P: Tensor, moments: Moments | None = None) -> RunState:
        """A run with these weights; without moments they are zero and the step count too."""
        where = self.layout(spec)
        weights_P = weights_P.to(self.decoder.device)
        if moments is None:
            moments = Moments(torch.zeros_like(weights_P), torch.zeros_like(weights_P), 0)
        else:
            moments = Moments(moments.m_P.to(self.decoder.device), moments.v_P.to(self.decoder.device), moments.step)
        return RunState(spec, where, weights_P, moments)

    def forward_backward(
        self, state: RunState, request: ForwardBackward
    ) -> Task[tuple[RunState, ForwardBackwardOutput]]:
        """The loss of each datum, and its gradient added to those pending; forward_only leaves these as they are.

        Yields after each micro-batch; how the request is cut depends on the request alone, so that its bits do. Losses
        and gradients are sums, never means. Raises UserError for a request that is wrong, or whose loss or gradient is
        not finite; `state` holds as before then.
        """
        loss, config = check(request, self.decoder.config)
        sums_P = None if request.forward_only else torch.zeros_like(state.weights_P)
        lora = _leaves(state, sums_P)
        outputs: list[dict[str, np.ndarray]] = []
        metrics: dict[str, float] = {}
        for first, batch in _micro_batches(request.data):
            for logprobs, found in self._micro_batch(lora, loss, config, first, batch, sums_P is not None):
                outputs.append({"logprobs": logprobs})
                for name, value in found.items():
                    metrics[name] = metrics.get(name, 0.0) + value
            yield
        output = ForwardBackwardOutput(outputs, metrics)
        return (state if sums_P is None else replace(state, grads_P=_added(state, sums_P))), output

    def optim_step(self, state: RunState, values: AdamW) -> Task[tuple[RunState, dict[str, float]]]:
        """One AdamW step with the pending gradients, which are then used up. (state, metrics)

        With nothing pending the gradient is zero: moments decay, the weights move by what momentum is left, and the
        step counts.
        """
        yield from ()
        grads_P = torch.zeros_like(state.weights_P) if state.grads_P is None else state.grads_P
        weights_P, moments, metrics = optimizer.step(state.weights_P, grads_P, state.moments, values)
        return replace(state, weights_P=weights_P, moments=moments, grads_P=None), metrics

    def _micro_batch(
        self, lora: Lora, loss: Loss, config: dict[str, float], first: int, batch: Sequence[Datum], differentiate: bool
    ) -> list[tuple[np.ndarray, dict[str, float]]]:
        """(log-probabilities, metrics) of each datum. Gradients are added into the adapter's leaves."""
        device = self.decoder.device
        inputs = [{name: torch.from_numpy(a).to(device) for name, a in datum.inputs.items()} for datum in batch]
        targets = [given.pop("target_tokens") for given in inputs]
        with torch.set_grad_enabled(differentiate):
            found = self._logprobs(lora, loss, batch, targets, inputs)
            losses = [loss(p, given, config) for p, given in zip(found, inputs, strict=True)]
            for index, (value, _) in enumerate(losses, first):
                _check_finite(index, loss, float(value.detach()), found[index - first])
            if differentiate:
                torch.stack([value for value, _ in losses]).sum().backward()
        return [
            (p.detach().cpu().numpy(), {name: float(value) for name, value in metrics.items()})
            for p, (_, metrics) in zip(found, losses, strict=True)
        ]

    def _logprobs(
        self,
        lora: Lora,
        loss: Loss,
        batch: Sequence[Datum],
        targets: Sequence[Tensor],
        inputs: Sequence[dict[str, Tensor]],
    ) -> list[Tensor]:
        """Of the targets, for each datum in the shape of its targets."""
        lengths = [len(datum.tokens) for datum in batch]
        tokens_N = torch.from_numpy(np.concatenate([datum.tokens for datum in batch])).long().to(self.decoder.device)
        hidden_NH = self.decoder.hidden(tokens_N, lengths, [Segment(0, len(tokens_N), lora)])
        columns = max(1 if target.dim() == 1 else target.shape[1] for target in targets)
        targets_NK = torch.cat([_widened(target, columns) for target in targets])
        needed = [loss.needs_gradient(given) for given in inputs]
        needed_N = None if needed[0] is None else torch.cat([one for one in needed if one is not None])
        head = HeadLora(lora.a["lm_head"], lora.b["lm_head"], lora.scale) if "lm_head" in lora.a else None
        found_NK = target_logprobs(hidden_NH, self.decoder.head_weight, targets_NK, head, needed_N)
        return [
            rows[:, 0] if target.dim() == 1 else rows[:, : target.shape[1]]
            for rows, target in zip(found_NK.split(lengths), targets, strict=True)
        ]


def _leaves(state: RunState, sums_P: Tensor | None) -> Lora:
    """The adapter as leaves whose gradients are added straight into the arena `sums_P`; plain views without one."""
    lora = state.lora()
    if sums_P is None:
        return lora
    sums = state.layout.lora(sums_P, state.scale)
    for tensors, grads in ((lora.a, sums.a), (lora.b, sums.b)):
        for site in tensors:
            tensors[site] = tensors[site].detach().requires_grad_()
            tensors[site].grad = grads[site]
    return lora


def _micro_batches(data: Sequence[Datum]) -> Iterator[tuple[int, list[Datum]]]:
    """(index of the first, datums) in order, cut between datums: each has at most ROWS_MAX rows, or is one datum."""
    first, batch, rows = 0, list[Datum](), 0
    for index, datum in enumerate(data):
        if batch and rows + len(datum.tokens) > ROWS_MAX:
            yield first, batch
            first, batch, rows = index, [], 0
        batch.append(datum)
        rows += len(datum.tokens)
    yield first, batch


def _widened(target: Tensor, columns: int) -> Tensor:
    """(T, columns), int64; added columns are token 0, computed and never read."""
    target_TK = (target.unsqueeze(1) if target.dim() == 1 else target).long()
    return torch.nn.functional.pad(target_TK, (0, columns - target_TK.shape[1]))


def _check_finite(index: int, loss: Loss, value: float, logprobs: Tensor) -> None:
    if math.isfinite(value):
        return
    if not bool(torch.isfinite(logprobs).all()):
        raise UserError(
            f"datum {index}: the model's log-probabilities are not finite: the adapter's weights have grown too large; "
            "nothing was changed. Load an earlier state and lower learning_rate"
        )
    raise UserError(
        f"datum {index}: the loss {loss.name} is {value}; nothing was changed. The model's log-probabilities "
        "are finite, so look for huge weights or advantages, or for `logprobs` far below the model's own: "
        "the ratio is exp of the difference"
    )


def _added(state: RunState, sums_P: Tensor) -> Tensor:
    """Pending gradients with this request's. Raises UserError, naming a site, when one is not finite."""
    total_P = sums_P if state.grads_P is None else state.grads_P + sums_P
    if not is_finite(total_P):
        wrong = next(
            f"{site.name} ({'AB'[part]})"
            for site, *matrices in state.layout.matrices(total_P)
            for part, matrix in enumerate(matrices)
            if not is_finite(matrix)
        )
        raise UserError(
            f"the gradient of {wrong} is not finite; this request added nothing to the pending gradients. "
            "Look for huge weights or advantages"
        )
    return total_P
