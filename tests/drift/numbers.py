"""What the engine of this environment computes, and how fast: `python -m tests.drift.numbers MODELS FILE`.

Three steps of a run on a tiny model of each family, in both dtypes: the log-probabilities that each step returns. The
models are made by the first environment that comes, so that all compute with the same weights. N tokens.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from knapper.engine.models.loader import load
from knapper.engine.training.trainer import Trainer
from knapper.wire.types import AdamW
from tests.engine.runs import datum, done, request, spec
from tests.engine.strange import NATIVE, strange_model

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS: Final = 3
TOLERANCES: Final = {"float32": 1e-4, "bfloat16": 0.3}  # of tiny models, whose weights make much of rounding


def computed(model: Path, dtype: torch.dtype) -> NDArray[np.float32]:
    """Log-probabilities (steps x N) of one text, trained on by a new adapter."""
    trainer = Trainer(load(model, dtype))
    state, asked = trainer.create(spec()), request([datum(70, "cross_entropy", np.random.default_rng(1))])
    found = []
    for _ in range(STEPS):
        state, output = done(trainer.forward_backward(state, asked))
        found.append(output.outputs[0]["logprobs"])
        state, _ = done(trainer.optim_step(state, AdamW(learning_rate=1e-2)))
    return np.concatenate(found).astype(np.float32)


def differences(ours: Path, newest: Path) -> list[str]:
    """A line for each family and dtype that computes something else: rounding, or more."""
    lines = []
    with np.load(ours) as before, np.load(newest) as after:
        for name in sorted(set(before.files) | set(after.files)):
            if name not in before.files or name not in after.files:
                lines.append(f"not computed in both: {name}")
            elif not np.array_equal(before[name], after[name]):
                largest = float(np.abs(before[name] - after[name]).max())
                rounding = largest <= TOLERANCES[name.split()[-1]]
                lines.append(f"{'other last bits' if rounding else 'OTHER NUMBERS'}: {name}, by {largest:.1e}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.drift.numbers", description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, seconds = {}, 0.0
    for kind in NATIVE:
        model = options.models / kind
        if not model.is_dir():
            strange_model(model, kind)
        for name, dtype in DTYPES.items():
            start = time.perf_counter()
            found[f"{kind} {name}"] = computed(model, dtype)
            seconds += time.perf_counter() - start
    np.savez(options.file, allow_pickle=False, **found)
    print(json.dumps({"seconds": round(seconds, 2)}))


if __name__ == "__main__":
    main()
