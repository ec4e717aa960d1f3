"""The native decoder: one pass of the layers over packed rows, for training, prefill and decoding alike.

They differ in two arguments: how rows attend (`Attend`) and which adapters they use (`Adapt`). N rows, H hidden size, V
vocabulary. Sources: the block of Llama, arXiv 2302.13971 (pre-norm, RMS norm, SwiGLU of arXiv 2002.05202, rotary
positions), with grouped queries of arXiv 2305.13245 and the q/k norm of Qwen3, arXiv 2505.09388.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from knapper.engine.layers import checkpointing, rope
from knapper.engine.layers.adapters import FUSED, Adapt
from knapper.engine.layers.attention import (
    Attend,
    PackedAttention,
    RecordedAttention,
    attention_dtype,
    prefix_attention,
)
from knapper.engine.layers.head import HeadLora, target_logprobs
from knapper.engine.layers.layerwise import LayerSegment
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_grouped import Segment, Segments
from knapper.engine.models.config import HEAD, ComputedBy, ModelConfig
from knapper.engine.models.decode import NativeDecodeState
from knapper.engine.models.prefill import Prefilled, PrefillPrompt, prefill
from knapper.engine.models.weights import LayerWeights, Weights
from knapper.engine.sampling.kv_cache import Cache, bytes_per_token, context_positions
from knapper.engine.training.prefix_sharing import Prefixes
from knapper.engine.transfer import to_device

__all__ = ["Decoder", "Segment"]


class Decoder:
    """knapper.engine.models.base.Model in layer code of our own."""

    computed_by: Final[ComputedBy] = "native"
    continues: Final = True

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.architecture = config.model_type
        self.versions: tuple[str, ...] = ()
        self.weights = weights
        self.dtype = weights.embed.dtype
        self.device = weights.embed.device
        self.attention_dtype = attention_dtype(self.dtype, self.device)
        self._frequencies = rope.frequencies(config, self.device)
        self.passes = checkpointing.on_cpu(config, weights.nbytes)  # of a GPU the account of memory says it

    @property
    def weights_bytes(self) -> int:
        return self.weights.nbytes

    @property
    def bytes_per_token(self) -> int:
        return bytes_per_token(self.config, self.attention_dtype)

    @property
    def context_positions(self) -> int:
        return context_positions(self.config)

    def hidden(self, tokens_N: Tensor, lengths: Sequence[int], segments: Sequence[Segment]) -> Tensor:
        """Rows (N, H) after the final norm, for sequences packed one after another, each from position 0.

        `tokens_N` int64, `lengths` sum to N. Differentiable in the segments' adapters. A row's bits depend on its own
        sequence and adapter only.
        """
        return self.hidden_with(tokens_N, _positions(lengths, self.device), PackedAttention(lengths), segments)

    def layer_segments(
        self, groups: Sequence[Prefixes], loras: Sequence[Lora | None]
    ) -> tuple[Tensor, list[LayerSegment]]:
        """To (U, H), a segment for each layer: rows that the groups share are computed once."""

        def on_device(arrays: Sequence[np.ndarray]) -> Tensor:
            return to_device(np.concatenate(arrays), self.device)

        rows = [len(group) for group in groups]
        segments: list[Segment] = []
        for count, lora in zip(rows, loras, strict=True):
            start = segments[-1].stop if segments else 0
            segments.append(Segment(start, start + count, lora))
        return self._layer_segments(
            on_device([group.tokens_U for group in groups]),
            on_device([group.positions_U for group in groups]),
            prefix_attention(groups, self.device),
            Segments(segments),
        )

    def target_logprobs(
        self, hidden_NH: Tensor, targets_NK: Tensor, lora: HeadLora | None, needed_N: NDArray[np.bool_]
    ) -> Tensor:
        return target_logprobs(hidden_NH, self.weights.head, targets_NK, lora, needed_N)

    def hidden_with(self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, segments: Sequence[Segment]) -> Tensor:
        """`hidden`, for rows with another attention than packed sequences."""
        return self._pass(tokens_N, positions_N, attend, Segments(segments))

    @torch.inference_mode()
    def hidden_and_kv(
        self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, segments: Sequence[Segment]
    ) -> tuple[Tensor, Tensor]:
        """`hidden_with`, and the rows' keys and values: (layers, 2, N, key/value heads, head_dim)."""
        config = self.config
        shape = (config.layers, 2, tokens_N.shape[0], config.kv_heads, config.head_dim)
        kv = torch.empty(shape, dtype=self.attention_dtype, device=self.device)
        return self.hidden_with(tokens_N, positions_N, RecordedAttention(attend, kv), segments), kv

    def prefill(self, prompts: Sequence[PrefillPrompt]) -> list[Prefilled]:
        return prefill(self, prompts)

    def decode_state(self, positions_max: int) -> NativeDecodeState:
        return NativeDecodeState(self, positions_max)

    @torch.inference_mode()
    def step(self, tokens_N: Tensor, cache: Cache, adapt: Adapt) -> Tensor:
        """One token for every sequence of the cache, in the order of `cache.rows`: rows (N, H) after the final norm.

        The sequences are one token longer afterwards.
        """
        attend = cache.extend()
        return self._pass(tokens_N, attend.positions_N, attend, adapt)

    def logits(self, hidden_NH: Tensor, adapt: Adapt) -> Tensor:
        """float32 (N, V), with the adapters' part of the head where they have one."""
        (logits_NV,) = adapt((HEAD,), hidden_NH, self.weights.head)
        return logits_NV.float()

    def _pass(self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, adapt: Adapt) -> Tensor:
        x_NH, segments = self._layer_segments(tokens_N, positions_N, attend, adapt)
        for segment in segments:
            x_NH = segment(x_NH)
        return x_NH

    def _layer_segments(
        self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, adapt: Adapt
    ) -> tuple[Tensor, list[LayerSegment]]:
        """The embedded rows, and the segments: each layer, then the final norm."""
        rows = tokens_N.shape[0]
        assert rows == positions_N.shape[0], f"{rows} tokens for {positions_N.shape[0]} positions"
        x_NH = F.embedding(tokens_N, self.weights.embed)
        cos_sin = rope.cos_sin(positions_N, self._frequencies)
        layers_saved = self.passes.layers_kept(rows)
        layers = [
            partial(
                checkpointing.checkpointed,
                partial(self._layer, index, cos_sin, attend, adapt),
                keep=index < layers_saved,
            )
            for index in range(len(self.weights.layers))
        ]
        return x_NH, [*layers, lambda x_NH: self._norm(x_NH, self.weights.norm)]

    def _layer(self, index: int, cos_sin: tuple[Tensor, Tensor], attend: Attend, adapt: Adapt, x_NH: Tensor) -> Tensor:
        layer = self.weights.layers[index]
        x_NH = x_NH + self._attention(index, layer, self._norm(x_NH, layer.input_norm), cos_sin, attend, adapt)
        return x_NH + self._mlp(index, layer, self._norm(x_NH, layer.post_norm), adapt)

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x_NH: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        attend: Attend,
        adapt: Adapt,
    ) -> Tensor:
        q, k, v = self._linear(index, "qkv", x_NH, layer.qkv, adapt)
        q, k, v = (x.unflatten(1, (-1, self.config.head_dim)) for x in (q, k, v))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        if index not in self.config.without_positions:
            q, k = (rope.rotated(x, cos_sin) for x in (q, k))
        o = attend(index, *(x.to(self.attention_dtype) for x in (q, k, v))).to(x_NH.dtype)
        return self._linear(index, "o", o, layer.o, adapt)[0]

    def _mlp(self, index: int, layer: LayerWeights, x_NH: Tensor, adapt: Adapt) -> Tensor:
        gate, up = self._linear(index, "gate_up", x_NH, layer.gate_up, adapt)
        return self._linear(index, "down", F.silu(gate) * up, layer.down, adapt)[0]

    def _linear(self, index: int, name: str, x: Tensor, linear: FrozenLinear, adapt: Adapt) -> tuple[Tensor, ...]:
        return adapt([f"layers.{index}.{linear_name}" for linear_name in FUSED[name]], x, linear)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x / sqrt(mean(x^2) + eps), in float32, then scaled in the base's dtype.

        Source: RMS norm, arXiv 1910.07467, equation 4; dtypes as transformers' LlamaRMSNorm.
        """
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_eps)).to(x.dtype) * weight


def _positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.cat([torch.arange(length) for length in lengths]), device)
