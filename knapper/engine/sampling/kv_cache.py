"""The cache of the sequences that decode: keys and values in pages, within a number of positions.

A sequence takes a page when it grows into it, and nothing before. Used pages lie without gaps: the last one moves into
a page that becomes free. What is computed of a page depends on its own sequence, wherever it lies
(`paged_attention`).

Pages and states never take more than `positions_max` together. Spare ones, which keep the memory from growing for every
page, are freed before anything is refused.

A layer has keys and values, or a state of fixed size, which counts as positions too.

T tokens, G key/value heads, D head elements, C = PAGE.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from knapper.engine.layers import delta_rule, paged_attention
from knapper.engine.layers.delta_rule import ChunkState
from knapper.engine.layers.paged_attention import PAGE, PageTable
from knapper.engine.layers.recurrence import State
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.recurrent import CHUNK_ROWS, Chunked
from knapper.engine.sampling.decode_attention import Attention
from knapper.engine.sampling.places import Places
from knapper.engine.transfer import to_device

STATE_DTYPE: Final = torch.float32


def whole_pages(length: int) -> int:
    """Positions that the pages of `length` tokens have."""
    return length + -length % PAGE


def context_positions(config: ModelConfig) -> int:
    """Positions of a sequence that fills the context."""
    return whole_pages(config.context)


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """`dtype` of the stored keys and values."""
    return 2 * math.prod(config.kv_shape) * dtype.itemsize


def state_positions(config: ModelConfig, dtype: torch.dtype) -> int:
    """Positions whose keys and values take as much as a sequence's states."""
    return -(-config.state_numbers * STATE_DTYPE.itemsize // bytes_per_token(config, dtype))


@dataclass(eq=False)
class Slot:
    """One sequence. `length` of its tokens have keys and values, in `pages`, in order. `folded`: the last whole chunk
    of the delta rule that is in its memory ends there. `lost`: a failure left that half done. `shift`: what the
    position of its next token is beyond `length`, as an image's tokens share positions.
    """

    length: int
    pages: list[int] = field(default_factory=list)
    folded: int = 0
    lost: bool = False
    shift: int = 0


class Cache:
    """The decoding sequences. `rows` is the order in which a step takes their tokens and gives their results."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, positions_max: int | None = None
    ) -> None:
        """`positions_max` of all sequences together; None: unlimited."""
        states = [mixer.state_shapes for mixer in config.recurrent]
        layers, kv_heads, head_dim = config.kv_shape
        self._chunked_layers = [layer for layer, mixer in enumerate(config.recurrent) if isinstance(mixer, Chunked)]
        self._extra = state_positions(config, dtype)
        self._device = device
        self.pages = Places(layers * [2 * [(kv_heads, PAGE, head_dim)]], dtype, device)
        self.states = Places(states, STATE_DTYPE, device)  # one place a sequence, in the order of `rows`
        self.rows: list[Slot] = []
        self._owners: list[tuple[Slot, int]] = []  # by used page: whose it is, and which of them
        self._positions_max = positions_max
        most = context_positions(config) if positions_max is None else max(0, positions_max - self._extra)
        self.longest = min(context_positions(config), most - most % PAGE)

    @property
    def tokens(self) -> int:
        """Positions that the sequences occupy."""
        return self.pages.used * PAGE + self.states.used * self._extra

    @property
    def allocated(self) -> int:
        """Positions with memory, spare ones included."""
        return self.pages.size * PAGE + self.states.size * self._extra

    def positions(self, length: int) -> int:
        """Positions that a sequence of `length` tokens occupies."""
        return whole_pages(length) + self._extra

    @torch.inference_mode()
    def add(
        self, kv: Sequence[Sequence[Tensor]] | Tensor, length: int, states: Sequence[State] = (), shift: int = 0
    ) -> Slot:
        """A sequence whose first `length` tokens have the keys and values `kv`, by layer two of (length or more, G, D),
        and left `states`, by layer without attention. `shift`: see `Slot`.
        """
        count = whole_pages(length) // PAGE
        self._grow(count, 1)
        place, first = len(self.rows), self.pages.used
        for layer, layer_kv in enumerate(kv):
            for pages, tokens_TGD in zip(self.pages.all_of(layer), layer_kv, strict=True):
                pages[first : first + count] = paged_attention.paged(tokens_TGD[:length])
        for layer, state in enumerate(states):
            for place_of, part in zip(self.states.all_of(layer), state, strict=True):
                place_of[place] = part
        slot = Slot(length, folded=length, shift=shift)
        self.rows.append(slot)
        self.states.used += 1
        self._take(slot, count)
        return slot

    @torch.inference_mode()
    def remove(self, slot: Slot) -> None:
        while slot.pages:
            self._give_back(slot.pages.pop())
        place = self.rows.index(slot)
        self.states.fill_gap(place)
        self.rows[place] = self.rows[-1]
        self.rows.pop()
        if not self.rows:
            self._trim()

    @torch.inference_mode()
    def reserve(self) -> None:
        """Reserve one more token in every sequence.

        If a fold lacks memory, its sequences have lost their states (`roll_back` then returns False); the others are as
        they were.
        """
        full = [slot for slot in self.rows if slot.length == len(slot.pages) * PAGE]
        if full:
            self._grow(len(full), 0)
            # The values of keys that are masked count nothing, but 0 * NaN would still be NaN.
            self.pages.zero(self.pages.used, self.pages.used + len(full))
            for slot in full:
                self._take(slot, 1)
        if self._chunked_layers:
            self._fold()

    def _fold(self) -> None:
        """The chunks that became full go into their sequences' memories."""
        full = [
            row for row, slot in enumerate(self.rows) if slot.length % CHUNK_ROWS == 0 and slot.folded < slot.length
        ]
        if not full:
            return
        try:
            places = to_device(full, self._device)
            for layer in self._chunked_layers:
                delta_rule.fold_(ChunkState(*self.states.layer(layer)[1:]), places)
        except BaseException:
            for row in full:
                self.rows[row].lost = True
            raise
        for row in full:
            self.rows[row].folded = self.rows[row].length

    @torch.inference_mode()
    def extend(self) -> Attention:
        """Make every sequence one token longer; returns the attention with which a step fills that token in."""
        assert all(slot.length < len(slot.pages) * PAGE for slot in self.rows), "reserve() goes before a step"
        table = PageTable.of([slot.length for slot in self.rows], [slot.pages for slot in self.rows], self._device)
        for slot in self.rows:
            slot.length += 1
        return Attention(self.pages, self.states, table)

    def shifted(self, lengths_N: Tensor) -> Tensor:
        """The positions of the sequences' next tokens, by their lengths."""
        shifts = [slot.shift for slot in self.rows]
        return lengths_N + to_device(shifts, self._device) if any(shifts) else lengths_N

    @staticmethod
    def roll_back(slot: Slot, length: int) -> bool:
        """Set the sequence back to `length` tokens after a failed step. False: its states are lost."""
        if slot.lost:
            return False
        assert length <= slot.length <= length + 1, f"{slot.length} tokens are kept of a text of {length}"
        slot.length = length  # the step's leftovers are masked, and the next step overwrites them
        return True

    def _take(self, slot: Slot, count: int) -> None:
        """The next spare pages are the sequence's last."""
        for page in range(self.pages.used, self.pages.used + count):
            self._owners.append((slot, len(slot.pages)))
            slot.pages.append(page)
        self.pages.used += count

    def _give_back(self, page: int) -> None:
        self.pages.fill_gap(page)
        slot, number = self._owners.pop()
        if page < len(self._owners):
            self._owners[page] = slot, number
            slot.pages[number] = page

    def _grow(self, pages: int, states: int) -> None:
        """Make sure of so many spare pages and states. Where there is no room, spare ones of the other kind go."""
        of_pages = max(0, pages - self.pages.spare) * PAGE
        if self._room() < of_pages + max(0, states - self.states.spare) * self._extra:
            self._trim()
            of_pages = pages * PAGE
        self.states.grow(states, self.states.size + max(0, self._room() - of_pages) // max(1, self._extra))
        self.pages.grow(pages, self.pages.size + self._room() // PAGE)

    def _room(self) -> int:
        """Positions without memory."""
        most = self._positions_max
        return max(0, most - self.allocated) if most is not None else 2 * self.allocated

    def _trim(self) -> None:
        """Free what is spare."""
        for places in (self.pages, self.states):
            if places.spare:
                places.resize(places.used)
