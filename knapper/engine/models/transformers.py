"""Models of other architectures, computed by transformers.

Adapters enter through hooks on the model's own linears. Sequences are computed one by one, each with its adapter, so
that neighbours change nothing: slower than the native decoder, and held to the same tests. N rows of all sequences, U
distinct rows, T of one sequence, H hidden size, V vocabulary, K targets, R rank.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from knapper.engine.images.placed import PlacedImage, expect_none
from knapper.engine.layers import head
from knapper.engine.layers.adapters import Adapt
from knapper.engine.layers.head import HeadLora
from knapper.engine.layers.layerwise import Gather, LayerSegment, always_whole
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_grouped import Segment, Segments
from knapper.engine.models.config import HEAD, ComputedBy, LoraTarget
from knapper.engine.models.prefill import Prefilled, PrefillPrompt
from knapper.engine.training.prefix_sharing import Prefixes
from knapper.engine.transfer import to_device
from knapper.wire.types import Image


@dataclass(frozen=True)
class TransformersFacts:
    """knapper.engine.models.config.Facts from the model's configuration and modules."""

    architecture: str
    vocab_size: int
    context: int
    eos: tuple[int, ...]
    tied: bool
    lora_targets: tuple[LoraTarget, ...]


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh((W h * scale + bias) / cap); without a cap, W h * scale + bias.

    The scale is applied to the model's rows, before W.
    """

    weight_VH: Tensor
    bias_V: Tensor | None
    scale: float
    cap: float | None

    @cached_property
    def _linear(self) -> FrozenLinear:
        return FrozenLinear([self.weight_VH], self.weight_VH.dtype, self.bias_V, pack=False)

    def logits(self, hidden_NH: Tensor, adapt: Adapt) -> Tensor:
        """float32 (N, V); a row's bits do not depend on how many rows there are."""
        (logits_NV,) = adapt((HEAD,), hidden_NH, self._linear)
        logits_NV = logits_NV.float()
        return logits_NV if self.cap is None else torch.tanh(logits_NV / self.cap) * self.cap

    def logprobs(
        self, hidden_NH: Tensor, targets_NK: Tensor, lora: HeadLora | None, needed_N: NDArray[np.bool_]
    ) -> Tensor:
        """`head.target_logprobs`. With a bias or a cap the gradient recomputes logits, some rows at a time."""
        if self.bias_V is None and self.cap is None:
            return head.target_logprobs(hidden_NH, self._linear, targets_NK, lora, needed_N)
        adapter = None if lora is None else Lora({HEAD: lora.a}, {HEAD: lora.b}, lora.scale)

        def of_rows(hidden_CH: Tensor, targets_CK: Tensor) -> Tensor:
            adapt = Segments([Segment(0, len(hidden_CH), adapter)])
            return self.logits(hidden_CH, adapt).log_softmax(-1).gather(1, targets_CK)

        size = max(head.ROWS_MIN, head.ELEMENTS_MAX // len(self.weight_VH))
        columns_NK = targets_NK.unsqueeze(1) if targets_NK.dim() == 1 else targets_NK
        logprobs = [
            checkpoint(of_rows, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in zip(hidden_NH.split(size), columns_NK.split(size), strict=True)
        ]
        return torch.cat(logprobs).view(targets_NK.shape)


class TransformersModel:
    """knapper.engine.models.base.Model over a causal language model of transformers."""

    computed_by: Final[ComputedBy] = "transformers"

    def __init__(
        self,
        body: nn.Module,
        linears: Mapping[str, nn.Module],
        head: Head,
        config: TransformersFacts,
        versions: tuple[str, ...],
    ) -> None:
        """`body`: the model without its head; `linears`: its linears by target module."""
        self.config: TransformersFacts = config
        self.versions = versions
        self.architecture = config.architecture
        self.bytes_per_token = 0  # set by the trial
        self.context_positions = config.context
        self.gather: Gather = always_whole
        self.device, self.dtype = head.weight_VH.device, head.weight_VH.dtype
        self.head = head
        self.weights_bytes = sum(weight.nbytes for weight in {*body.parameters(), head.weight_VH})  # a tied head once
        self._body = body
        # transformers 5.24 has renamed it.
        self._cache_name = "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"
        self._lora: Lora | None = None
        self.adapted: set[str] = set()  # target modules that a pass has called
        for target, linear in linears.items():
            linear.register_forward_hook(self._hook(target))

    def bound_context(self, context: int) -> None:
        """Serve so many tokens of the context."""
        self.config, self.context_positions = replace(self.config, context=context), context

    def placed(self, images: Sequence[Image], where: str) -> tuple[PlacedImage, ...]:
        expect_none(images, where)
        return ()

    def layer_segments(
        self, groups: Sequence[Prefixes], loras: Sequence[Lora | None]
    ) -> tuple[Tensor, list[LayerSegment]]:
        """One segment: the model's layers are not taken apart."""
        return torch.empty(0, device=self.device), [lambda _: self._groups(groups, loras)]

    def _groups(self, groups: Sequence[Prefixes], loras: Sequence[Lora | None]) -> Tensor:
        """(U, H). Every sequence is computed whole; of shared rows, the first sequence's are taken."""
        group_rows: list[Tensor] = []
        for group, lora in zip(groups, loras, strict=True):
            tokens_N = to_device(group.tokens_U[group.rows_N], self.device)
            rows_NH = torch.cat([self.rows(tokens_T, lora)[0] for tokens_T in tokens_N.split(group.lengths)])
            shared = len(group) < group.total
            group_rows.append(rows_NH[to_device(group.first_U, self.device)] if shared else rows_NH)
        return torch.cat(group_rows)

    def target_logprobs(
        self, hidden_NH: Tensor, targets_NK: Tensor, lora: HeadLora | None, needed_N: NDArray[np.bool_]
    ) -> Tensor:
        return self.head.logprobs(hidden_NH, targets_NK, lora, needed_N)

    def logits(self, hidden_NH: Tensor, adapt: Adapt) -> Tensor:
        return self.head.logits(hidden_NH, adapt)

    def reusable(self, past: Any, tokens: int) -> int:  # noqa: ARG002  the interface of all models
        """None: caches may slide, and then have lost their first tokens."""
        return 0

    def kept_positions(self, past: Any, tokens: int) -> int:  # noqa: ARG002  the interface of all models
        return tokens

    def prefill(self, prompts: Sequence[PrefillPrompt]) -> list[Prefilled]:
        assert not any(prompt.reused for prompt in prompts)
        by_key: dict[tuple[int, bytes, int], Prefilled] = {}
        prefilled: list[Prefilled] = []
        for prompt in prompts:
            key = id(prompt.lora), prompt.tokens_T.tobytes(), prompt.drawn
            if key in by_key:
                prefilled.append(replace(by_key[key], computed=0))
                continue
            tokens_T = to_device(prompt.tokens_T.astype("int64"), self.device)
            with _no_grad():
                rows_TH, past = self._rows_and_cache(tokens_T, prompt)
            by_key[key] = Prefilled(rows_TH, past, len(tokens_T))
            prefilled.append(by_key[key])
        return prefilled

    def _rows_and_cache(self, tokens_T: Tensor, prompt: PrefillPrompt) -> tuple[Tensor, Any]:
        """Rows, and the cache of all tokens. Drawn tokens go one by one: all at once, their last bits would differ."""
        at_once, *drawn = tokens_T.split([len(tokens_T) - prompt.drawn, *[1] * prompt.drawn])
        rows_TH, past = self.rows(at_once, prompt.lora, caches=True)
        drawn_rows = [self.rows(token_1, prompt.lora, past, caches=True)[0] for token_1 in drawn]
        return torch.cat([rows_TH, *drawn_rows]) if drawn_rows else rows_TH, past

    def decode_state(self, positions_max: int) -> "TransformersDecodeState":
        return TransformersDecodeState(self, positions_max)

    def rows(
        self, tokens_T: Tensor, lora: Lora | None, cache: Any = None, *, caches: bool = False
    ) -> tuple[Tensor, Any]:
        """(T, H) for the head; with `caches` also `cache`, extended by the tokens' keys and values."""
        self._lora = lora
        try:
            kept = {self._cache_name: cache}
            out = self._body(input_ids=tokens_T[None], **kept, use_cache=caches, return_dict=True)
        finally:
            self._lora = None
        rows_TH = out.last_hidden_state[0]
        rows_TH = rows_TH if self.head.scale == 1.0 else rows_TH * self.head.scale
        return rows_TH, getattr(out, self._cache_name) if caches else None

    def _hook(self, target: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            self.adapted.add(target)
            lora = self._lora
            if lora is None or target not in lora.a:
                return None
            a_RI, b_OR = lora.a[target], lora.b[target]
            delta = F.linear(F.linear(inputs[0].to(a_RI.dtype), a_RI) * lora.scale, b_OR)
            return (output + delta).to(output.dtype)

        return add


_UNKNOWN: Final = -1  # a cache's length while a pass is growing it


@dataclass(eq=False)
class TransformersSlot:
    cache: Any  # transformers' own, of this sequence alone
    length: int


class TransformersDecodeState:
    """knapper.engine.models.base.DecodeState: one pass for each sequence and token."""

    def __init__(self, model: TransformersModel, positions_max: int) -> None:
        self._model = model
        self.longest = min(model.config.context, positions_max)
        self._slots: list[TransformersSlot] = []

    @property
    def rows(self) -> list[TransformersSlot]:
        return list(self._slots)

    @property
    def tokens(self) -> int:
        return sum(slot.length for slot in self._slots)

    def positions(self, length: int) -> int:
        return length

    def add(self, past: Any, length: int) -> TransformersSlot:
        slot = TransformersSlot(copy.deepcopy(past), length)
        self._slots.append(slot)
        return slot

    def remove(self, slot: TransformersSlot) -> None:
        self._slots.remove(slot)

    def reserve(self) -> None:
        """Nothing to do: caches grow by themselves."""

    def roll_back(self, slot: TransformersSlot, length: int) -> bool:
        """Caches cannot be shortened: some slide."""
        return slot.length == length

    def step(self, tokens_N: Tensor, loras: Sequence[Lora | None]) -> Tensor:
        with _no_grad():
            rows: list[Tensor] = []
            for slot, token_1, lora in zip(self._slots, tokens_N.split(1), loras, strict=True):
                length, slot.length = slot.length, _UNKNOWN
                row_1H, slot.cache = self._model.rows(token_1, lora, slot.cache, caches=True)
                slot.length = length + 1
                rows.append(row_1H)
            adapt = Segments([Segment(row, row + 1, lora) for row, lora in enumerate(loras)])
            return self._model.logits(torch.cat(rows), adapt)


@contextmanager
def _no_grad() -> Iterator[None]:
    """No gradients, but ordinary tensors: a model may keep some, and training cannot use those of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield
