"""The native decoder: one pass of the layers over packed rows, for training, prefill and decoding alike.

They differ in two arguments: how rows attend (`Attend`) and which adapters they use (`Adapt`). What a layer computes
is in `blocks`. Rows of images have features in place of embeddings, and more of them added after the first layers
(DeepStack, arXiv 2406.04334). N rows, M of images among them, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from knapper.engine.images import placed
from knapper.engine.images.placed import PlacedImage
from knapper.engine.layers import checkpointing, rope
from knapper.engine.layers.adapters import Adapt
from knapper.engine.layers.attention import (
    Attend,
    PackedAttention,
    RecordedAttention,
    attention_dtype,
    prefix_attention,
)
from knapper.engine.layers.head import HeadLora, capped_, target_logprobs
from knapper.engine.layers.layerwise import HEAD_PART, Gather, LayerSegment, always_whole
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_grouped import Segment, Segments
from knapper.engine.layers.recurrence import Stops
from knapper.engine.models.blocks import LayerBlock, PassRows
from knapper.engine.models.config import HEAD, ComputedBy, ModelConfig
from knapper.engine.models.decode import NativeDecodeState
from knapper.engine.models.prefill import Past, Prefilled, PrefillPrompt, prefill
from knapper.engine.models.weights import Weights
from knapper.engine.sampling.kv_cache import Cache, bytes_per_token, context_positions, state_positions
from knapper.engine.training.prefix_sharing import Prefixes
from knapper.engine.transfer import to_device
from knapper.wire.types import Image

if TYPE_CHECKING:
    from knapper.engine.images.tower import VisionTower

PlacedImages = Sequence[tuple[int, PlacedImage]]  # with the first row that each has in the pass

__all__ = ["Decoder", "Segment"]


class Decoder:
    """knapper.engine.models.base.Model in layer code of our own."""

    computed_by: Final[ComputedBy] = "native"

    def __init__(self, config: ModelConfig, weights: Weights, tower: "VisionTower | None" = None) -> None:
        """`tower`: computes images; None: prompts have none."""
        self.config = config
        self.architecture = config.model_type
        self.versions: tuple[str, ...] = ()
        self.weights = weights
        self.dtype = weights.embed.dtype
        self.device = weights.embed.device
        self.attention_dtype = attention_dtype(self.dtype, self.device)
        ropes = {mixer.rope for mixer in config.attention if mixer.rope is not None}
        self._frequencies = {each: rope.frequencies(each, self.device) for each in ropes}
        scale = torch.tensor(config.embedding_scale, dtype=self.dtype)  # rounded as Gemma's own code rounds it
        self._tower, axes = tower, config.image_axes
        self._pair_axes = None if axes is None else rope.pair_axes(axes, self.device)
        self._embedding_scale = None if config.embedding_scale == 1.0 else float(scale)
        layer_row = checkpointing.saved_bytes_of_row(config)
        self.passes = checkpointing.on_cpu(0, weights.nbytes, layer_row)  # until there is an account of memory
        self.gather: Gather = always_whole  # of a model in shards `ranks` says it

    @property
    def weights_bytes(self) -> int:
        return self.weights.nbytes + (0 if self._tower is None else self._tower.nbytes)

    @property
    def bytes_per_token(self) -> int:
        return bytes_per_token(self.config, self.attention_dtype)

    @property
    def context_positions(self) -> int:
        return context_positions(self.config) + state_positions(self.config, self.attention_dtype)

    def placed(self, images: Sequence[Image], where: str) -> tuple[PlacedImage, ...]:
        if self._tower is None:
            placed.expect_none(images, where)
            return ()
        return self._tower.placed(images, where)

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
            to_device(placed.joined([group.positions_U for group in groups]), self.device),
            prefix_attention(groups, self.device),
            Segments(segments),
            [(segment.start + row, image) for segment, group in zip(segments, groups, strict=True)
             for row, image in group.images],
        )  # fmt: skip

    def target_logprobs(
        self, hidden_NH: Tensor, targets_NK: Tensor, lora: HeadLora | None, needed_N: NDArray[np.bool_]
    ) -> Tensor:
        with self.gather(HEAD_PART, 1):
            return target_logprobs(hidden_NH, self.weights.head, targets_NK, lora, needed_N, self.config.logits_cap)

    def hidden_with(
        self,
        tokens_N: Tensor,
        positions_N: Tensor,
        attend: Attend,
        segments: Sequence[Segment],
        images: PlacedImages = (),
    ) -> Tensor:
        """`hidden`, for rows with another attention than packed sequences. Positions are (N), or (N, 3) of images."""
        return self._pass(tokens_N, positions_N, attend, Segments(segments), images)

    @torch.inference_mode()
    def hidden_and_kv(
        self,
        tokens_N: Tensor,
        positions_N: Tensor,
        attend: Attend,
        segments: Sequence[Segment],
        images: PlacedImages = (),
    ) -> tuple[Tensor, Tensor, list[list[Stops]]]:
        """`hidden_with`; the rows' keys and values: (layers, 2, N, key/value heads, head_dim); by layer with a
        recurrence, the states of each sequence.
        """
        layers, kv_heads, head_dim = self.config.kv_shape
        shape = (layers, 2, len(tokens_N), kv_heads, head_dim)
        kv = torch.empty(shape, dtype=self.attention_dtype, device=self.device)
        recorded = RecordedAttention(attend, kv)
        return self.hidden_with(tokens_N, positions_N, recorded, segments, images), kv, recorded.states

    def reusable(self, past: Past, tokens: int) -> int:
        return past.reusable(tokens)

    def kept_positions(self, past: Past, tokens: int) -> int:
        """Keys and values of each token, and its states as many as they take of them."""
        return tokens + len(past.states) * state_positions(self.config, self.attention_dtype)

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
        return self._pass(tokens_N, cache.shifted(attend.positions_N), attend, adapt)

    def logits(self, hidden_NH: Tensor, adapt: Adapt) -> Tensor:
        """float32 (N, V), with the adapters' part of the head where they have one."""
        with self.gather(HEAD_PART, 1):
            (logits_NV,) = adapt((HEAD,), hidden_NH, self.weights.head)
        return capped_(logits_NV.float(), self.config.logits_cap)

    def _pass(
        self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, adapt: Adapt, images: PlacedImages = ()
    ) -> Tensor:
        x_NH, segments = self._layer_segments(tokens_N, positions_N, attend, adapt, images)
        for number, segment in enumerate(segments):
            with self.gather(number, 1):
                x_NH = segment(x_NH)
        return x_NH

    def _layer_segments(
        self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, adapt: Adapt, images: PlacedImages
    ) -> tuple[Tensor, list[LayerSegment]]:
        """The embedded rows, and the segments: each layer, then the final norm."""
        rows = tokens_N.shape[0]
        assert rows == positions_N.shape[0], f"{rows} tokens for {positions_N.shape[0]} positions"
        x_NH = self._embedded(tokens_N)
        cos_sin = {
            each: rope.cos_sin(positions_N, table, each, self._pair_axes) for each, table in self._frequencies.items()
        }
        pass_rows = PassRows(attend, adapt, self.attention_dtype, cos_sin)
        layers_saved = self.passes.layers_kept(rows)
        computed = [partial(_layer, layer, pass_rows) for layer in self.weights.layers]
        if images:
            rows_M, features_FMH = self._features(images)
            x_NH = x_NH.index_copy(0, rows_M, features_FMH[0])
            for index, added_MH in enumerate(features_FMH[1:]):
                computed[index] = partial(_layer_with, self.weights.layers[index], pass_rows, rows_M, added_MH)
        layers = [
            partial(checkpointing.checkpointed, layer, keep=index < layers_saved)
            for index, layer in enumerate(computed)
        ]
        return x_NH, [*layers, self._for_head]

    def _features(self, images: PlacedImages) -> tuple[Tensor, Tensor]:
        """The rows (M) of all images, and their features (F, M, H): see `VisionTower.features`."""
        assert self._tower is not None, "without a tower `placed` lets none in"
        rows = [np.arange(row, row + image.tokens) for row, image in images]
        features = [self._tower.features(image) for _, image in images]
        return to_device(np.concatenate(rows), self.device), torch.cat(features, dim=1)

    def _embedded(self, tokens_N: Tensor) -> Tensor:
        x_NH = F.embedding(tokens_N, self.weights.embed)
        return x_NH if self._embedding_scale is None else x_NH * self._embedding_scale

    def _for_head(self, x_NH: Tensor) -> Tensor:
        """The last rows, normed. A scale of the logits multiplies them before the head, whose linear it passes."""
        x_NH, scale = self.weights.norm(x_NH), self.config.logits_scale
        return x_NH if scale == 1.0 else x_NH * scale


def _layer(layer: LayerBlock, rows: PassRows, x_NH: Tensor) -> Tensor:
    return layer(x_NH, rows)


def _layer_with(layer: LayerBlock, rows: PassRows, rows_M: Tensor, added_MH: Tensor, x_NH: Tensor) -> Tensor:
    return layer(x_NH, rows).index_add(0, rows_M, added_MH)


def _positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.cat([torch.arange(length) for length in lengths]), device)
