"""The cache of the sequences that decode: pools of equal capacity, within a number of positions.

A sequence lies in the pool for its own length and attends over the pool's whole capacity: the shape of its attention,
and so its bits, depend on its own length and never on other sequences.

The pools never take more than `positions_max`. Spare slots, which keep pools from growing for every sequence, are freed
before anything is refused. A pool grows, and a sequence moves to the next pool, one layer at a time, so that only one
layer of a pool is in memory twice.

A layer has keys and values, or a state of fixed size, which counts as positions too.

N rows, H heads, G key/value heads, D head elements, C capacity, Q queries a key/value head.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from knapper.engine.layers import batch_invariant_attention, delta_rule
from knapper.engine.layers.delta_rule import ChunkState
from knapper.engine.layers.recurrence import State
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.layer import CHUNK_ROWS, GatedDelta
from knapper.engine.sampling.decode_attention import Attention, PoolPart
from knapper.engine.transfer import to_device

capacity_min = batch_invariant_attention.KEYS
STATE_DTYPE: Final = torch.float32
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


def state_positions(config: ModelConfig, dtype: torch.dtype) -> int:
    """Positions whose keys and values take as much as a sequence's states."""
    return -(-config.state_numbers * STATE_DTYPE.itemsize // bytes_per_token(config, dtype))


@dataclass(eq=False)
class Slot:
    """One sequence. `length` of its tokens have keys and values. `folded`: the last whole chunk of the delta rule that
    is in its memory ends there. `lost`: a failure left that half done.
    """

    length: int
    pool: "Pool"
    index: int
    folded: int = 0
    lost: bool = False


@dataclass(frozen=True)
class Shape:
    """`attention`: layers with keys and values. `states`: by layer without, its tensors' shapes. `extra`: positions
    that the states of a sequence count as.
    """

    attention: int
    kv_heads: int
    head_dim: int
    states: tuple[tuple[tuple[int, ...], ...], ...]
    extra: int
    dtype: torch.dtype
    device: torch.device

    @property
    def layers(self) -> int:
        return self.attention + len(self.states)


class Pool:
    """Sequences of one capacity, without gaps: the last sequence moves into a slot that becomes free.

    `size`: allocated slots in every layer, used and spare. Layers with attention come first.
    """

    def __init__(self, capacity: int, shape: Shape) -> None:
        self.capacity = capacity
        self.slots: list[Slot] = []
        self.size = 0
        self._shape = shape
        # Of a layer with attention one (2, size, G, C, D); of another its state's tensors, each (1, size, ...).
        self._layers = [self._buffers(layer, 0) for layer in range(shape.layers)]

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
            self._layers[index] = self._resized(index, size, used)
            if index == len(self._layers) - 1:
                self.size = size
            yield

    def _resized(self, layer: int, size: int, used: int) -> State:
        resized = self._buffers(layer, size)
        for new, old in zip(resized, self._layers[layer], strict=True):
            new[:, :used] = old[:, :used]
        return resized

    def add(self, past: Sequence[State], length: int) -> Slot:
        """By layer, keys and values (2, at least `length` positions, G, D), or a state. Needs a spare slot."""
        for layer, layer_past in enumerate(past):
            self.put(layer, len(self.slots), layer_past, length)
        return self.append(Slot(length, self, 0, folded=length))

    def put(self, layer: int, index: int, past: State, length: int) -> None:
        if layer >= self._shape.attention:
            for buffer, part in zip(self._layers[layer], past, strict=True):
                buffer[0, index] = part
            return
        (slot_kv,) = (buffer[:, index] for buffer in self._layers[layer])
        (layer_kv,) = past
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
            for buffer in self._layers[layer]:
                buffer[:, index] = buffer[:, last]

    def detach(self, slot: Slot) -> None:
        last = self.slots.pop()
        if last is not slot:
            self.slots[slot.index] = last
            last.index = slot.index

    def read(self, layer: int, slot: Slot) -> State:
        """Keys and values (2, length, G, D), or a state; views."""
        if layer >= self._shape.attention:
            return tuple(buffer[0, slot.index] for buffer in self._layers[layer])
        (buffer,) = self._layers[layer]
        return (buffer[:, slot.index, :, : slot.length].transpose(1, 2),)

    def layer(self, index: int) -> Tensor:
        """Keys and values (2, N, G, C, D) of the sequences, in a layer with attention."""
        return self._layers[index][0][:, : len(self.slots)]

    def states(self, index: int) -> State:
        """Tensors (N, ...) of the sequences, in a layer without, by its number among those."""
        return tuple(buffer[0, : len(self.slots)] for buffer in self._layers[self._shape.attention + index])

    @property
    def cost(self) -> int:
        """Positions that a slot takes."""
        return self.capacity + self._shape.extra

    def free(self) -> None:
        """Free the memory, even if a reference to one of the sequences is left."""
        self._layers.clear()

    def _buffers(self, layer: int, size: int) -> State:
        shape = self._shape
        if layer >= shape.attention:
            parts = shape.states[layer - shape.attention]
            return tuple(torch.empty((1, size, *part), dtype=STATE_DTYPE, device=shape.device) for part in parts)
        sizes = (2, size, shape.kv_heads, self.capacity, shape.head_dim)
        return (torch.empty(sizes, dtype=shape.dtype, device=shape.device),)


class Cache:
    """The decoding sequences. `rows` is the order in which a step takes their tokens and gives their results."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, positions_max: int | None = None
    ) -> None:
        """`positions_max` of all sequences together; None: unlimited."""
        states = tuple(mixer.state_shapes for mixer in config.recurrent)
        self._delta_layers = [layer for layer, mixer in enumerate(config.recurrent) if isinstance(mixer, GatedDelta)]
        extra = state_positions(config, dtype)
        self._shape = Shape(*config.kv_shape, states, extra, dtype, device)
        self._pools: dict[int, Pool] = {}
        self._positions_max = positions_max
        context = context_positions(config)
        most = context if positions_max is None else max(0, positions_max - extra)
        # The largest capacity: neither the context nor the memory need end at a capacity of `capacity_for`.
        self.longest = min(context, most - most % capacity_min)

    @property
    def rows(self) -> list[Slot]:
        return [slot for capacity in sorted(self._pools) for slot in self._pools[capacity].slots]

    @property
    def tokens(self) -> int:
        """Positions that the sequences occupy."""
        return sum(pool.cost * len(pool.slots) for pool in self._pools.values())

    @property
    def allocated(self) -> int:
        """Positions with memory, spare slots included."""
        return sum(pool.cost * pool.size for pool in self._pools.values())

    def positions(self, length: int) -> int:
        """Positions that a sequence of `length` tokens occupies; more than there are for one that does not fit."""
        return self._capacity(length) + self._shape.extra

    def _capacity(self, length: int) -> int:
        capacity = capacity_for(length)
        return min(capacity, self.longest) if length <= self.longest else capacity

    @torch.inference_mode()
    def add(self, kv: Sequence[Tensor] | Tensor, length: int, states: Sequence[State] = ()) -> Slot:
        """A sequence whose first `length` tokens have the keys and values `kv`, by layer (2, length or more, G, D), and
        left `states`, by layer without attention.
        """
        pool = self._pool(self._capacity(length))
        try:
            if not pool.spare:
                pool.resize(self._grown_size(pool))
            return pool.add([*((layer_kv,) for layer_kv in kv), *states], length)
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

        If a move or a fold lacks memory, its sequences have lost their slots (`roll_back` then returns False); the
        others keep theirs.
        """
        for slot in self.rows:
            if slot.length == slot.pool.capacity:
                self._move(slot)
        if self._delta_layers:
            for pool in self._pools.values():
                self._fold(pool)

    def _fold(self, pool: Pool) -> None:
        """The chunks of the delta rule that became full go into their sequences' memories."""
        full = [slot for slot in pool.slots if slot.length % CHUNK_ROWS == 0 and slot.folded < slot.length]
        if not full:
            return
        try:
            places = to_device([slot.index for slot in full], self._shape.device)
            for layer in self._delta_layers:
                delta_rule.fold_(ChunkState(*pool.states(layer)[1:]), places)
        except BaseException:
            for slot in full:
                slot.lost = True
            raise
        for slot in full:
            slot.folded = slot.length

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
        if slot.length == _NOWHERE or slot.lost:
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
        return here + max(1, min(max(2, here // 2), self._available(pool.cost) // pool.cost))

    def _move(self, slot: Slot) -> None:
        """Move to the next capacity's pool, layer by layer; if memory for both lacks, the old slot is freed first.

        The caller holds `slot`, which gets the new location.
        """
        old, new = slot.pool, self._pool(self._capacity(slot.length + 1))
        index, moved = len(new.slots), 0
        widening = None if new.spare else new.resizing(self._grown_size(new), index)
        tight = widening is not None and self._available(new.cost) < new.cost
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
