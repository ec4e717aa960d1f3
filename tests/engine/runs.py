"""Runs on tiny models, and requests to train them with: what the tests of training share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch

from knapper.engine.executor import Work
from knapper.engine.models.loader import load
from knapper.engine.training.trainer import Trainer
from knapper.state.journal.records import Spec
from knapper.wire.types import Datum, ForwardBackward
from tests.engine.strange import CONFIGS, strange_model
from tests.engine.tiny import Kind, tiny_model

T = TypeVar("T")
RUN = "ses-00000000000000000000000000000000:train:0"


def done(task: Work[T]) -> T:
    """Run a task to its end."""
    while True:
        try:
            next(task)
        except StopIteration as stop:
            result: T = stop.value
            return result


def tiny_trainer(directory: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Trainer:
    """On a tiny model that now lies in `directory`; `kind` of tiny.Kind or of strange.CONFIGS."""
    if kind in CONFIGS:
        strange_model(directory, kind)
    else:
        tiny_model(directory, kind=cast("Kind", kind))
    return Trainer(load(directory, dtype))


def spec(**changes: Any) -> Spec:
    values: dict[str, Any] = {
        "run": RUN, "tenant": "local", "base_model": "tiny", "rank": 4, "alpha": 8.0, "seed": 7,
        "train_attn": True, "train_mlp": True, "train_unembed": False,
    }  # fmt: skip
    return Spec(**{**values, **changes})


def datum(
    lengths: int, loss: str, rng: np.random.Generator, *, vocabulary: int = 200, columns: int = 0, prompt: int = 0
) -> Datum:
    """Random tokens and the inputs that `loss` needs; the first `prompt` positions have no weight and no advantage."""
    shape = (lengths, columns) if columns else (lengths,)
    trained = np.arange(lengths) >= prompt
    inputs: dict[str, Any] = {"target_tokens": rng.integers(0, vocabulary, shape)}
    if loss == "cross_entropy":
        weights = rng.normal(size=shape)
        inputs["weights"] = (weights * (trained[:, None] if columns else trained)).astype(np.float32)
    else:
        inputs["logprobs"] = (rng.normal(size=shape) * 0.3 - 5.5).astype(np.float32)
        inputs["advantages"] = (rng.normal(size=shape) * trained).astype(np.float32)
    if loss == "gspo":
        inputs["sequence_ratio_mask"] = trained.astype(np.float32)
    return Datum(rng.integers(0, vocabulary, lengths).astype(np.int32), inputs)


def request(
    data: Sequence[Datum],
    loss: str = "cross_entropy",
    config: Mapping[str, float | str] | None = None,
    *,
    forward_only: bool = False,
) -> ForwardBackward:
    return ForwardBackward(RUN, 1, list(data), loss, dict(config or {}), forward_only)
