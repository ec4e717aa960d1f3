"""Keys and values of the sequences that decode, in pools of equal capacity.

A sequence lies in the pool of its own length's capacity and attends over all of it: the shape of its attention, and
so its bits, depend on its own length and never on who else is there.
N rows, H heads, G key/value heads, D head elements, C capacity, Q queries a key/value head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from knapper.engine import rowwise
from knapper.engine.config import ModelConfig

capacity_min = rowwise.KEYS


def capacity_for(length: int) -> int:
    """Positions that a sequence of `length` tokens occupies: 64, 128, 192, 256, 384, 512, 768, 1024...

    From 128 on at most half more each time: little is wasted, and a growing sequence is copied only a few times.
    """
    capacity = capacity_min
    while capacity < length:
        step = max(capacity_min, 1 << (capacity.bit_length() - 2))
        capacity += step
    return capacity


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    return config.layers * 2 * config.kv_heads * config.head_dim * dtype.itemsize


@dataclass(eq=False)
class Slot:
    """One sequence. `length` tokens of it have keys and values."""

    length: int
    pool: "Pool"
    index: int


class Pool:
    """Sequences of one capacity, without holes: the last one moves into a place that becomes free."""

    def __init__(self, capacity: int, shape: "Shape") -> None:
        self.capacity = capacity
        self.slots: list[Slot] = []
        self._shape = shape
        self._kv = self._allocated(0)

    def add(self, kv: Tensor, length: int) -> Slot:
        """`kv` (layers, 2, at least `length` positions, G, D)."""
        index = len(self.slots)
        if index == self._kv.shape[2]:
            grown = self._allocated(index + max(2, index // 2))
            grown[:, :, :index] = self._kv
            self._kv = grown
        place = self._kv[:, :, index]
        place[:, :, :, :length] = kv[:, :, :length].transpose(2, 3)
        # What an earlier sequence left is masked, but 0 * NaN would still be NaN.
        place[:, :, :, length:] = 0
        slot = Slot(length, self, index)
        self.slots.append(slot)
        return slot

    def remove(self, slot: Slot) -> None:
        last = self.slots.pop()
        if last is not slot:
            self._kv[:, :, slot.index] = self._kv[:, :, last.index]
            self.slots[slot.index] = last
            last.index = slot.index

    def read(self, slot: Slot) -> Tensor:
        """(layers, 2, length, G, D), a view."""
        return self._kv[:, :, slot.index, :, : slot.length].transpose(2, 3)

    def layer(self, index: int) -> Tensor:
        """Keys and values (2, N, G, C, D) of the sequences that are here."""
        return self._kv[index, :, : len(self.slots)]

    def _allocated(self, slots: int) -> Tensor:
        shape = self._shape
        size = (shape.layers, 2, slots, shape.kv_heads, self.capacity, shape.head_dim)
        return torch.zeros(size, dtype=shape.dtype, device=shape.device)


@dataclass(frozen=True)
class Shape:
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class Cache:
    """The decoding sequences. `rows` is the order in which a step takes their tokens and gives their results."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._shape = Shape(config.layers, config.kv_heads, config.head_dim, dtype, device)
        self._pools: dict[int, Pool] = {}

    @property
    def rows(self) -> list[Slot]:
        return [slot for capacity in sorted(self._pools) for slot in self._pools[capacity].slots]

    @property
    def tokens(self) -> int:
        """Positions that the sequences occupy."""
        return sum(capacity * len(pool.slots) for capacity, pool in self._pools.items())

    @torch.inference_mode()
    def add(self, kv: Tensor, length: int) -> Slot:
        """A sequence whose first `length` tokens have the keys and values `kv` (layers, 2, length or more, G, D)."""
        return self._pool(capacity_for(length)).add(kv, length)

    @torch.inference_mode()
    def remove(self, slot: Slot) -> None:
        slot.pool.remove(slot)
        if not slot.pool.slots:
            del self._pools[slot.pool.capacity]

    @torch.inference_mode()
    def settle(self) -> None:
        """Room for one more token in every sequence. This may change the order of `rows`; a step uses the new one."""
        for slot in self.rows:
            if slot.length == slot.pool.capacity:
                self._move(slot)

    @torch.inference_mode()
    def extend(self) -> "Attention":
        """Make every sequence one token longer; the attention through which a step fills that token in."""
        assert not any(slot.length == slot.pool.capacity for slot in self.rows), "settle() goes before a step"
        pools = [self._pools[capacity] for capacity in sorted(self._pools)]
        parts = []
        for pool in pools:
            at_N = torch.tensor([slot.length for slot in pool.slots], device=self._shape.device)
            masked = torch.arange(pool.capacity, device=self._shape.device) > at_N[:, None]
            bias = torch.zeros(masked.shape, dtype=self._shape.dtype, device=self._shape.device).masked_fill_(
                masked, -torch.inf
            )
            rows_N = torch.arange(len(pool.slots), device=self._shape.device)
            parts.append(PoolPart(pool, rows_N, at_N, bias[:, None, None, :]))
            for slot in pool.slots:
                slot.length += 1
        return Attention(parts)

    def _pool(self, capacity: int) -> Pool:
        return self._pools.setdefault(capacity, Pool(capacity, self._shape))

    def _move(self, slot: Slot) -> None:
        pool = slot.pool
        moved = self._pool(capacity_for(slot.length + 1)).add(pool.read(slot), slot.length)
        self.remove(slot)
        # The caller holds `slot`: it takes the new place.
        slot.pool, slot.index = moved.pool, moved.index
        slot.pool.slots[slot.index] = slot


@dataclass(frozen=True)
class PoolPart:
    pool: Pool
    rows_N: Tensor
    at_N: Tensor  # the position that this step fills
    bias_N11C: Tensor  # -inf past it


class Attention:
    """One new token a sequence: its key and value are stored, then it attends over its own past."""

    def __init__(self, parts: list[PoolPart]) -> None:
        self._parts = parts
        self._sizes = [len(part.pool.slots) for part in parts]
        self.positions_N = torch.cat([part.at_N for part in parts])

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        rows, _, head_dim = q_NHD.shape
        q_NGQD = q_NHD.reshape(rows, k_NGD.shape[1], -1, head_dim)
        if len(self._parts) == 1:
            return self._part(layer, self._parts[0], q_NGQD, k_NGD, v_NGD).reshape(rows, -1)
        split = (x.split(self._sizes) for x in (q_NGQD, k_NGD, v_NGD))
        outputs = [self._part(layer, part, *qkv) for part, *qkv in zip(self._parts, *split, strict=True)]
        return torch.cat(outputs).reshape(rows, -1)

    @staticmethod
    def _part(layer: int, part: PoolPart, q_NGQD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        keys, values = part.pool.layer(layer)
        keys[part.rows_N, :, part.at_N] = k_NGD
        values[part.rows_N, :, part.at_N] = v_NGD
        if q_NGQD.device.type == "cpu":
            return rowwise.decoded(q_NGQD, keys, values, part.bias_N11C)  # the bits of training
        scaled = q_NGQD * q_NGQD.shape[-1] ** -0.5
        scores = torch.matmul(scaled, keys.transpose(-1, -2)).add_(part.bias_N11C)
        return torch.matmul(scores.softmax(-1), values)
