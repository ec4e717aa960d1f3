"""Direct preference optimisation by the gradient of its loss: no loss of its own is needed in the engine.

With l the summed log-probability of a completion under the adapter, r the same under the untouched one, and

    z = beta * ((l_chosen - r_chosen) - (l_rejected - r_rejected)),  loss = -log(sigmoid(z))

(arXiv 2305.18290, equation 7), the loss's derivative by l_chosen is -beta * sigmoid(-z), and by l_rejected the opposite
(section 4 there). cross_entropy with weight w on a token has the derivative -w by its log-probability: so weights
beta * sigmoid(-z) on the chosen completion's tokens, and their negatives on the rejected one's, give the same gradient.
"""

import math
from dataclasses import dataclass

import numpy as np

from knapper.jobs.tokenized_rows import Example
from knapper.wire.types import Float32


@dataclass(frozen=True)
class Preference:
    """The preference for one pair. `weight`: of each token of the chosen completion."""

    loss: float
    margin: float
    weight: float

    @property
    def right(self) -> bool:
        """Whether the adapter prefers the chosen one, relative to the untouched adapter."""
        return self.margin > 0


def preference(beta: float, chosen: tuple[float, float], rejected: tuple[float, float]) -> Preference:
    """`chosen` and `rejected`: (l, r) each."""
    z = beta * ((chosen[0] - chosen[1]) - (rejected[0] - rejected[1]))
    loss = math.log1p(math.exp(-abs(z))) + max(-z, 0.0)
    weight = beta / (1.0 + math.exp(z)) if z < 0 else beta * math.exp(-z) / (1.0 + math.exp(-z))
    return Preference(loss, z, weight)


def summed(example: Example, logprobs: Float32) -> float:
    """The log-probability of what the example's loss counts; `logprobs`: of its tokens after the first."""
    return float(logprobs.astype(np.float64)[example.counts_T[1:]].sum())
