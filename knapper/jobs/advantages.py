"""Advantages of the rollouts of one prompt, from their rewards. G rollouts of a group."""

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
_EQUAL = 1e-8  # a spread below this is rounding: all rollouts are alike


def group_normalised(rewards_G: Float64) -> Float64:
    """(r - mean) / std, over the group (GRPO: arXiv 2402.03300, section 4.1.2); zeros where all are alike."""
    spread = float(rewards_G.std())
    return np.zeros_like(rewards_G) if spread < _EQUAL else (rewards_G - rewards_G.mean()) / spread


def group_centred(rewards_G: Float64) -> Float64:
    """r - mean: a prompt whose rollouts differ little does not count more (Dr. GRPO: arXiv 2503.20783, section 3)."""
    return np.zeros_like(rewards_G) if float(rewards_G.std()) < _EQUAL else rewards_G - rewards_G.mean()


FORMULAS = {"group_normalised": group_normalised, "group_centred": group_centred}
