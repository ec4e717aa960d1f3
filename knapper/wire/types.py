"""What a request means, once decoded: plain frozen values over numpy arrays, shared by the wire and the engine.

Shapes: T tokens of a datum, K targets a position, P prompt tokens, N sampled tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Datum:
    """`tokens` int32 (T). `inputs`: arrays by name, int64 or float32, shaped as they came, sparse ones dense."""

    tokens: Int32
    inputs: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class ForwardBackward:
    run: str
    seq: int
    data: list[Datum]
    loss: str
    config: dict[str, float | str]
    forward_only: bool


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """`outputs`: for each datum, arrays by name (`logprobs` float32 in the shape of target_tokens).

    Metric keys have the form `name:reduction`.
    """

    outputs: list[dict[str, NDArray[Any]]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class AdamW:
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0  # 0: off


@dataclass(frozen=True)
class SamplingParams:
    max_tokens: int | None = None  # None: up to the model's context
    seed: int | None = None
    stop_strings: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False  # `stop=[]` on the wire
    temperature: float = 1.0  # 0: greedy
    top_k: int = -1  # -1: all
    top_p: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One asample request. `adapter`: the store prefix of an immutable export, or empty for the base model."""

    base_model: str
    adapter: str
    prompt: Int32  # (P)
    params: SamplingParams
    seed: int  # always set: the client's, else the gateway's choice; sample i of the request uses (seed, i)
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0


@dataclass(frozen=True)
class TopK:
    """Row-major, padded with token 0 and logprob -99999.0."""

    tokens: Int32  # (N, k)
    logprobs: Float32  # (N, k)


@dataclass(frozen=True)
class Sequence:
    """`tokens` (N), the stop token or string among them; `logprobs` (N) of the distribution that was sampled from."""

    tokens: Int32
    logprobs: Float32
    stopped: bool  # False: max_tokens or the context's end
    topk: TopK | None = None


@dataclass(frozen=True)
class SampleOutput:
    sequences: list[Sequence]
    prompt_logprobs: Float32 | None = None  # (P), [0] is NaN
    topk_prompt_logprobs: TopK | None = None  # (P, k), row 0 empty
    prompt_cache_hit_tokens: int = 0
    extra: dict[str, float] = field(default_factory=dict)
