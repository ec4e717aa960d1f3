"""The KV cache of the sequences that decode: pools of equal capacity, within a number of positions.

A sequence lies in the pool for its own length and attends over the pool's whole capacity: the shape of its attention,
and so its bits, depend on its own length and never on other sequences.

The pools never take more than `positions_max`. Spare slots, which keep pools from growing for every sequence, are freed
before anything is refused. A pool grows, and a sequence moves to the next pool, one layer at a time, so that only one
layer of a pool is in memory twice.

N rows, H heads, G key/value heads, D head elements, C capacity, Q queries a key/value head.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from knapper.engine.layers import batch_invariant_attention
from knapper.engine.layers.determinism import keeps_bits
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.layer import ScoreRule
from knapper.engine.transfer import to_device

capacity_min = batch_invariant_attention.KEYS
_NOWHERE: Final = -1  # the length of a sequence that lost its slot


def capacity_for(length: int) -> int:
    """Positions that a sequence of `length` tokens occupies: 64, 128, 192, 256, 384, 512, 768, 1024...

    From 128 on each step adds at most half: little is wasted, and a growing sequence is copied only a few times.
    """
    capacity = capacity_min
    while capacity < length:
        step = max(capacity_min, 1 << (capacity.bit_length() - 2))
        capacity += step
    return capacity


def context_positions(config: ModelConfig) -> int:
    """Positions of a sequence that fills the context: the last capacity ends there."""
    return config.context + -config.context % capacity_min


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """`dtype` of the stored keys and values."""
    return 2 * math.prod(config.kv_shape) * dtype.itemsize


@dataclass(eq=False)
class Slot:
    """One sequence. `length` of its tokens have keys and values."""

    length: int
    pool: "Pool"
    index: int


@dataclass(frozen=True)
class Shape:
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class Pool:
    """Sequences of one capacity, without gaps: the last sequence moves into a slot that becomes free.

    `size`: allocated slots in every layer, used and spare.
    """

    def __init__(self, capacity: int, shape: Shape) -> None:
        self.capacity = capacity
        self.slots: list[Slot] = []
        self.size = 0
        self._shape = shape
        self._layers = [self._buffer(0) for _ in range(shape.layers)]  # each (2, size, G, C, D)

    @property
    def spare(self) -> int:
        return self.size - len(self.slots)

    def resize(self, size: int) -> None:
        """Allocate `size` slots. After a failure there are as many as before, or fewer if fewer were requested."""
        for _ in self.resizing(size, len(self.slots)):
            pass

    def resizing(self, size: int, used: int) -> Iterator[None]:
        """The same as a generator, one layer a step, in order; the first `used` sequences stay."""
        self.size = min(self.size, size)
        for index in range(len(self._layers)):
            resized = self._buffer(size)
            resized[:, :used] = self._layers[index][:, :used]
            self._layers[index] = resized
            if index == len(self._layers) - 1:
                self.size = size
            yield

    def add(self, kv: Sequence[Tensor] | Tensor, length: int) -> Slot:
        """By layer, keys and values `kv` (2, at least `length` positions, G, D). Needs a spare slot."""
        for layer, layer_kv in enumerate(kv):
            self.put(layer, len(self.slots), layer_kv, length)
        return self.append(Slot(length, self, 0))

    def put(self, layer: int, index: int, layer_kv: Tensor, length: int) -> None:
        slot_kv = self._layers[layer][:, index]
        slot_kv[:, :, :length] = layer_kv[:, :length].transpose(1, 2)
        # The previous sequence's values are masked, but 0 * NaN would still be NaN.
        slot_kv[:, :, length:] = 0

    def append(self, slot: Slot) -> Slot:
        """Record the sequence whose keys and values are in the first spare slot."""
        slot.pool, slot.index = self, len(self.slots)
        self.slots.append(slot)
        return slot

    def remove(self, slot: Slot) -> None:
        for layer in range(self._shape.layers):
            self.fill_gap(layer, slot.index)
        self.detach(slot)

    def fill_gap(self, layer: int, index: int) -> None:
        """Move the last sequence into the slot."""
        last = len(self.slots) - 1
        if index != last:
            self._layers[layer][:, index] = self._layers[layer][:, last]

    def detach(self, slot: Slot) -> None:
        last = self.slots.pop()
        if last is not slot:
            self.slots[slot.index] = last
            last.index = slot.index

    def read(self, layer: int, slot: Slot) -> Tensor:
        """(2, length, G, D), a view."""
        return self._layers[layer][:, slot.index, :, : slot.length].transpose(1, 2)

    def layer(self, index: int) -> Tensor:
        """Keys and values (2, N, G, C, D) of the sequences."""
        return self._layers[index][:, : len(self.slots)]

    def free(self) -> None:
        """Free the memory, even if a reference to one of the sequences is left."""
        self._layers.clear()

    def _buffer(self, size: int) -> Tensor:
        shape = self._shape
        sizes = (2, size, shape.kv_heads, self.capacity, shape.head_dim)
        return torch.empty(sizes, dtype=shape.dtype, device=shape.device)


class Cache:
    """The decoding sequences. `rows` is the order in which a step takes their tokens and gives their results."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, positions_max: int | None = None
    ) -> None:
        """`positions_max` of all sequences together; None: unlimited."""
        self._shape = Shape(*config.kv_shape, dtype, device)
        self._pools: dict[int, Pool] = {}
        self._positions_max = positions_max
        context = context_positions(config)
        # The largest capacity: neither the context nor the memory need end at a capacity of `capacity_for`.
        self.longest = context if positions_max is None else min(context, positions_max - positions_max % capacity_min)

    @property
    def rows(self) -> list[Slot]:
        return [slot for capacity in sorted(self._pools) for slot in self._pools[capacity].slots]

    @property
    def tokens(self) -> int:
        """Positions that the sequences occupy."""
        return sum(capacity * len(pool.slots) for capacity, pool in self._pools.items())

    @property
    def allocated(self) -> int:
        """Positions with memory, spare slots included."""
        return sum(capacity * pool.size for capacity, pool in self._pools.items())

    def positions(self, length: int) -> int:
        """Positions that a sequence of `length` tokens occupies; above `longest` for one that does not fit."""
        capacity = capacity_for(length)
        return min(capacity, self.longest) if length <= self.longest else capacity

    @torch.inference_mode()
    def add(self, kv: Sequence[Tensor] | Tensor, length: int) -> Slot:
        """A sequence whose first `length` tokens have the keys and values `kv`, by layer (2, length or more, G, D)."""
        pool = self._pool(self.positions(length))
        try:
            if not pool.spare:
                pool.resize(self._grown_size(pool))
            return pool.add(kv, length)
        finally:
            self._drop_if_empty(pool)

    @torch.inference_mode()
    def remove(self, slot: Slot) -> None:
        if slot.length == _NOWHERE:
            return
        slot.pool.remove(slot)
        self._drop_if_empty(slot.pool)

    @torch.inference_mode()
    def reserve(self) -> None:
        """Reserve one more token in every sequence. This may change the order of `rows`; a step uses the new order.

        If a move lacks memory, that sequence has lost its slot (`roll_back` then returns False); the others keep
        theirs.
        """
        for slot in self.rows:
            if slot.length == slot.pool.capacity:
                self._move(slot)

    @torch.inference_mode()
    def extend(self) -> "Attention":
        """Make every sequence one token longer; returns the attention with which a step fills that token in."""
        assert not any(slot.length == slot.pool.capacity for slot in self.rows), "settle() goes before a step"
        pools = [self._pools[capacity] for capacity in sorted(self._pools)]
        parts = []
        for pool in pools:
            at_N = to_device([slot.length for slot in pool.slots], self._shape.device)
            rows_N = torch.arange(len(pool.slots), device=self._shape.device)
            parts.append(PoolPart(pool, rows_N, at_N, self._shape.dtype))
        attention = Attention(parts)
        for slot in self.rows:
            slot.length += 1
        return attention

    @staticmethod
    def roll_back(slot: Slot, length: int) -> bool:
        """Set the sequence back to `length` tokens after a failed step. False: it has lost its slot."""
        if slot.length == _NOWHERE:
            return False
        assert length <= slot.length <= length + 1, f"{slot.length} tokens are kept of a text of {length}"
        slot.length = length  # the step's leftovers are masked, and the next step overwrites them
        return True

    def _pool(self, capacity: int) -> Pool:
        return self._pools.setdefault(capacity, Pool(capacity, self._shape))

    def _drop_if_empty(self, pool: Pool) -> None:
        if not pool.slots:
            self._pools.pop(pool.capacity, None)
            pool.free()

    def _available(self, wanted: int) -> int:
        """Positions without memory: `wanted`, by freeing spare slots if need be; else all that there are."""
        if self._positions_max is None:
            return wanted
        for pool in list(self._pools.values()):
            if self._positions_max - self.allocated >= wanted:
                break
            if pool.spare:
                pool.resize(len(pool.slots))
        return self._positions_max - self.allocated

    def _grown_size(self, pool: Pool) -> int:
        """Slots for one more sequence, and half as many again for later ones as far as memory allows."""
        here = len(pool.slots)
        return here + max(1, min(max(2, here // 2), self._available(pool.capacity) // pool.capacity))

    def _move(self, slot: Slot) -> None:
        """Move to the next capacity's pool, layer by layer; if memory for both lacks, the old slot is freed first.

        The caller holds `slot`, which gets the new location.
        """
        old, new = slot.pool, self._pool(self.positions(slot.length + 1))
        index, moved = len(new.slots), 0
        widening = None if new.spare else new.resizing(self._grown_size(new), index)
        tight = widening is not None and self._available(new.capacity) < new.capacity
        narrowing = old.resizing(len(old.slots) - 1, len(old.slots) - 1) if tight else None
        try:
            for layer in range(self._shape.layers):
                if widening is not None:
                    next(widening)
                new.put(layer, index, old.read(layer, slot), slot.length)
                old.fill_gap(layer, slot.index)
                moved += 1
                if narrowing is not None:
                    next(narrowing)
        except BaseException:
            if moved:  # neither pool has all layers of it
                for layer in range(moved, self._shape.layers):
                    old.fill_gap(layer, slot.index)
                old.detach(slot)
                slot.length = _NOWHERE
            raise
        else:
            old.detach(slot)
            new.append(slot)
        finally:
            self._drop_if_empty(old)
            self._drop_if_empty(new)


@dataclass(frozen=True)
class PoolPart:
    pool: Pool
    rows_N: Tensor
    at_N: Tensor  # the position that this step fills
    dtype: torch.dtype
    _biases: dict[int | None, Tensor] = field(default_factory=dict)

    def bias_N11C(self, window: int | None) -> Tensor:
        """-inf past the position, and before its window; made once for all layers of a window."""
        if window not in self._biases:
            key_C = torch.arange(self.pool.capacity, device=self.at_N.device)
            masked = key_C > self.at_N[:, None]
            if window is not None:
                masked |= key_C <= self.at_N[:, None] - window
            zeros = torch.zeros(masked.shape, dtype=self.dtype, device=self.at_N.device)
            self._biases[window] = zeros.masked_fill_(masked, -torch.inf)[:, None, None, :]
        return self._biases[window]


class Attention:
    """One new token a sequence: stores its key and value, then attends over the sequence's own past."""

    def __init__(self, parts: list[PoolPart]) -> None:
        self._parts = parts
        self._sizes = [len(part.pool.slots) for part in parts]
        self.positions_N = torch.cat([part.at_N for part in parts])

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, *, scores: ScoreRule) -> Tensor:
        rows, _, head_dim = q_NHD.shape
        q_NGQD = q_NHD.reshape(rows, k_NGD.shape[1], -1, head_dim)
        if len(self._parts) == 1:
            return self._part(layer, self._parts[0], scores, q_NGQD, k_NGD, v_NGD).reshape(rows, -1)
        split = (x.split(self._sizes) for x in (q_NGQD, k_NGD, v_NGD))
        outputs = [self._part(layer, part, scores, *qkv) for part, *qkv in zip(self._parts, *split, strict=True)]
        return torch.cat(outputs).reshape(rows, -1)

    @staticmethod
    def _part(layer: int, part: PoolPart, scores: ScoreRule, q_NGQD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        keys, values = part.pool.layer(layer)
        keys[part.rows_N, :, part.at_N] = k_NGD
        values[part.rows_N, :, part.at_N] = v_NGD
        bias_N11C = part.bias_N11C(scores.window)
        if keeps_bits(q_NGQD.device):  # bit-equal to training
            return batch_invariant_attention.decoded(q_NGQD, keys, values, bias_N11C, scores)
        products = torch.matmul(q_NGQD * scores.scale, keys.transpose(-1, -2))
        capped = products if scores.cap is None else torch.tanh(products.float() / scores.cap) * scores.cap
        return torch.matmul(capped.add_(bias_N11C).softmax(-1).to(values.dtype), values)
