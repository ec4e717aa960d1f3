"""Decoded requests and results: plain frozen values over numpy arrays, shared by the wire and the engine.

Shapes: T tokens of a datum, K targets a position, P prompt tokens, N sampled tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knapper import limits

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Image:
    """An image in a sequence, a file of `format`. It stands for `tokens` positions from `at` on, where the id is 0.

    For error messages, `chunk`: its number among the chunks that were sent; `name`: its place in a request without any.
    """

    at: int
    tokens: int
    chunk: int
    format: str
    data: bytes
    name: str = ""

    def field(self, where: str) -> str:
        """What error messages call it."""
        return self.name or f"{where}.chunks[{self.chunk}]"


@dataclass(frozen=True)
class Datum:
    """`tokens` int32 (T). `inputs`: dense arrays by name, int64 or float32, in the shape of the request."""

    tokens: Int32
    inputs: dict[str, NDArray[Any]]
    images: tuple[Image, ...] = ()


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
    temperature: float = 1.0  # 0: greedy; up to GREEDY_TEMPERATURE_MAX it becomes 0
    top_k: int = -1  # -1: all
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if 0 <= self.temperature <= limits.greedy_temperature_max:
            object.__setattr__(self, "temperature", 0.0)


@dataclass(frozen=True)
class Cells:
    """Cells of a matrix, row by row: all of them, or those in CSR.

    `values` (M); `starts` (rows + 1) and `columns` (M) are CSR's, or None if all cells are there.
    """

    values: NDArray[Any]
    shape: tuple[int, int]
    starts: Int64 | None = None
    columns: Int64 | None = None

    def rows(self) -> Int64:
        """The row of each value (M)."""
        if self.starts is None:
            return np.repeat(np.arange(self.shape[0], dtype=np.int64), self.shape[1])
        return np.repeat(np.arange(self.shape[0], dtype=np.int64), np.diff(self.starts))


@dataclass(frozen=True)
class SampleRequest:
    """One asample request. `adapter`: the store prefix of an immutable export, or empty for the base model."""

    base_model: str
    adapter: str
    prompt: Int32  # (P)
    params: SamplingParams
    seed: int  # the client's, or one that the gateway chose; sample i of the request uses (seed, i)
    num_samples: int = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Cells | None = None  # int64 (P - 1, K): row i scores position i + 1; -1: none
    prompt_alt_tokens_k: int = 0  # draws at each position after the first
    prompt_logprobs_last_n: int | None = None  # of prompt_logprobs and topk_prompt_logprobs; None: all
    tenant: str = ""  # for fair sharing; has no effect on the result
    grammar: str = ""  # that the samples follow, as knapper.wire.grammars makes it; empty: none
    images: tuple[Image, ...] = ()  # of the prompt, in order


@dataclass(frozen=True)
class TopK:
    """Row-major, padded with token 0 and logprob -99999.0."""

    tokens: Int32  # (N, k)
    logprobs: Float32  # (N, k)


@dataclass(frozen=True)
class PromptDraws:
    """Row i: draws with replacement from the distribution of the prompt's token i + 1."""

    tokens: Int64  # (P - 1, k)
    logprobs: Float32  # (P - 1, k), untempered


@dataclass(frozen=True)
class SampledSequence:
    """`tokens` (N), with the stop token or string; `logprobs` (N) under the distribution that was sampled from."""

    tokens: Int32
    logprobs: Float32
    stopped: bool  # False: max_tokens or the end of the context
    topk: TopK | None = None


@dataclass(frozen=True)
class SampleOutput:
    sequences: list[SampledSequence]
    prompt_logprobs: Float32 | None = None  # (P), NaN if there is none, as at 0
    topk_prompt_logprobs: TopK | None = None  # (P, k), empty if there is none, as in row 0
    target_prompt_logprobs: Cells | None = None  # float32, in the request's layout; 0.0 where it has -1
    prompt_draws: PromptDraws | None = None
    prompt_cache_hit_tokens: int = 0
    device_s: float = 0.0  # device seconds of this request; not sent to clients
    extra: dict[str, float] = field(default_factory=dict)
