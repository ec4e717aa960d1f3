"""Random datums, and what comes back for them.

N positions of a datum, K targets a position.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tinker import types

CE: Final = "cross_entropy"
vocabulary: Final = 260  # tokens 0 to 259 of the tiny model's 268 or so: no special ones
Floats = NDArray[np.float32]


def tokens(rng: np.random.Generator, length: int) -> list[int]:
    found: list[int] = rng.integers(0, vocabulary, length).tolist()
    return found


def prompt(rng: np.random.Generator, length: int) -> types.ModelInput:
    return types.ModelInput.from_ints(tokens(rng, length))


def weighted(text: list[int], weights: list[float] | None = None) -> types.Datum:
    """Next-token prediction over `text`, weight 1 everywhere unless told otherwise."""
    inputs: dict[str, Any] = {
        "target_tokens": text[1:],
        "weights": weights if weights is not None else [1.0] * (len(text) - 1),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(text[:-1]), loss_fn_inputs=inputs)


def batch(rng: np.random.Generator, lengths: tuple[int, ...] = (17, 30, 9)) -> list[types.Datum]:
    """Texts for cross_entropy, weights random and some of them negative."""
    return [weighted(tokens(rng, n + 1), rng.normal(size=n).tolist()) for n in lengths]


def logprobs(output: types.ForwardBackwardOutput) -> list[Floats]:
    """Of each datum, (N) or (N, K)."""
    return [each["logprobs"].to_numpy() for each in output.loss_fn_outputs]


def all_logprobs(output: types.ForwardBackwardOutput) -> Floats:
    """Of every datum, one after another."""
    return np.concatenate([each.ravel() for each in logprobs(output)])


def bits(output: types.ForwardBackwardOutput) -> list[bytes]:
    """The log-probabilities, to be compared bit for bit."""
    return [each.tobytes() for each in logprobs(output)]
