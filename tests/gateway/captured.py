"""A captured turn as the gateway keeps it, for tests of what is done with those that there are."""

import numpy as np

from knapper.state.captures import CapturedSequence, CapturedTurn
from knapper.state.journal.records import Drawn
from tests.gateway.running import MODEL


def captured_turn(prompt: list[int] | None = None, answer: list[int] | None = None, retry: int = 0) -> CapturedTurn:
    """Log-probabilities are -0.5, -1.5, ..."""
    tokens = answer if answer is not None else [4, 5]
    logprobs = np.arange(len(tokens), dtype="<f4") * -1 - 0.5
    sequence = CapturedSequence(tokens=np.array(tokens, "<i4").tobytes(), logprobs=logprobs.tobytes(), stopped=True)
    drawn = Drawn(run="", seq=0, step=0, digest="", sampler="engine float32", datums=1)
    return CapturedTurn(
        model=MODEL.name, base_model=MODEL.name, prompt=np.array(prompt or [1, 2, 3], "<i4").tobytes(),
        sequences=[sequence], drawn=drawn, retry=retry, at=0.0,
    )  # fmt: skip
