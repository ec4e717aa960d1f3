"""The native decoder's decode batch: keys and values of its sequences, and their adapters stacked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knapper.engine.layers.adapters import Adapt
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_gathered import GatheredLora, Stack
from knapper.engine.layers.lora_grouped import base
from knapper.engine.models.prefill import Past
from knapper.engine.sampling.kv_cache import Cache, Slot

if TYPE_CHECKING:
    from knapper.engine.models.decoder import Decoder


class NativeDecodeState:
    """knapper.engine.models.base.DecodeState: all sequences in one pass a step."""

    def __init__(self, decoder: "Decoder", positions_max: int) -> None:
        self._decoder = decoder
        self._cache = Cache(decoder.config, decoder.attention_dtype, decoder.device, positions_max)
        self._stack: Stack | None = None

    @property
    def rows(self) -> list[Slot]:
        return self._cache.rows

    @property
    def tokens(self) -> int:
        return self._cache.tokens

    @property
    def longest(self) -> int:
        return self._cache.longest

    def positions(self, length: int) -> int:
        return self._cache.positions(length)

    def add(self, past: Past, length: int) -> Slot:
        return self._cache.add(past.kv, length, past.states.get(length, ()), past.shift)

    def remove(self, slot: Slot) -> None:
        self._cache.remove(slot)

    def reserve(self) -> None:
        self._cache.reserve()

    def roll_back(self, slot: Slot, length: int) -> bool:
        return self._cache.roll_back(slot, length)

    @torch.inference_mode()
    def step(self, tokens_N: Tensor, loras: Sequence[Lora | None]) -> Tensor:
        adapt = self._adapt(loras)
        return self._decoder.logits(self._decoder.step(tokens_N, self._cache, adapt), adapt)

    def _adapt(self, loras: Sequence[Lora | None]) -> Adapt:
        used = {id(lora): lora for lora in loras if lora is not None}
        if not used:
            self._stack = None
            return base
        stacked = set() if self._stack is None else {id(lora) for lora in self._stack.loras}
        # Stacking costs about a step, an unused adapter in the stack a little of each: restack at half.
        if self._stack is None or not used.keys() <= stacked or 2 * len(used) < len(stacked):
            self._stack = Stack(list(used.values()))
        return GatheredLora(self._stack, loras, self._decoder.device)
