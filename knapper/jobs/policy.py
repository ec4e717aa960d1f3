"""A step of policy gradient on sampled tokens, whoever sampled them. T tokens of a sequence."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knapper.jobs.run_client import RunClient
from knapper.jobs.spec import LossName
from knapper.state.journal.records import Drawn
from knapper.wire.types import AdamW, Datum, Float32, Int32

Metrics = dict[str, float]


def datum(
    tokens_T: Int32, sampled_T: NDArray[np.bool_], logprobs_T: Float32, advantage: float, *, masked: bool
) -> Datum:
    """Each token predicts the next one; only sampled ones, never the first, have an advantage. `masked`: for gspo."""
    inputs: dict[str, Any] = {
        "target_tokens": tokens_T[1:].astype(np.int64),
        "logprobs": logprobs_T[1:].astype(np.float32),
        "advantages": sampled_T[1:] * np.float32(advantage),
    }
    if masked:
        inputs["sequence_ratio_mask"] = sampled_T[1:].astype(np.float32)
    return Datum(tokens_T[:-1], inputs)


async def step(
    client: RunClient, data: Sequence[Datum], loss: LossName, values: AdamW, drawn: Sequence[Drawn] = ()
) -> tuple[Metrics, Metrics]:
    """One forward_backward and one optimizer step. Return (metrics of the step, those of the pass as they came)."""
    thresholds = {"clip_low_threshold": loss.clip_low_threshold, "clip_high_threshold": loss.clip_high_threshold}
    config = {name: value for name, value in thresholds.items() if value is not None}
    output = await client.forward_backward(data, loss.name, config, drawn=drawn)
    stepped = await client.optim_step(values)
    counted = max(output.metrics.get("tokens:sum", 0.0), 1.0)
    metrics = {
        "loss/mean": output.metrics["loss:sum"],
        "kl/mean": output.metrics.get("kl:sum", 0.0) / counted,
        "ratio/mean": output.metrics.get("ratio:sum", 0.0) / counted,
        "learning_rate": values.learning_rate,
        "grad_norm": stepped["grad_norm"],
    }
    return metrics, output.metrics
