"""Memory for parts of sequences, of one shape in each layer: pages of keys and values, or states."""

from collections.abc import Sequence
from typing import Final

import torch

from knapper.engine.layers.recurrence import State

_SPARE_PART: Final = 8  # 1 / this of the used places is allocated besides, where there is room: for later ones


class Places:
    """In each layer some tensors of `size` places; the first `used` are used, the others spare.

    It grows and shrinks a layer at a time, so that only one layer is in memory twice.
    """

    def __init__(self, shapes: Sequence[Sequence[tuple[int, ...]]], dtype: torch.dtype, device: torch.device) -> None:
        """`shapes`: by layer, of one place in each of its tensors."""
        self.used = self.size = 0
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self._layers = [self._empty(layer, 0) for layer in range(len(shapes))]

    @property
    def spare(self) -> int:
        return self.size - self.used

    def layer(self, index: int) -> State:
        """The layer's tensors, of the used places."""
        return tuple(tensor[: self.used] for tensor in self._layers[index])

    def all_of(self, index: int) -> State:
        """The same, spare places included."""
        return self._layers[index]

    def grow(self, count: int, room: int) -> None:
        """Make sure of `count` spare places; of `room` places in all, those that are not needed are for later."""
        if self.spare < count:
            needed = self.used + count
            self.resize(max(needed, min(needed + needed // _SPARE_PART, room)))

    def resize(self, size: int) -> None:
        """After a failure there are as many as before, or fewer if fewer were requested."""
        self.size = min(self.size, size)
        for index in range(len(self._layers)):
            self._layers[index] = self._resized(index, size)
        self.size = size

    def zero(self, start: int, stop: int) -> None:
        for tensors in self._layers:
            for tensor in tensors:
                tensor[start:stop].zero_()

    def fill_gap(self, index: int) -> None:
        """The last used place's content moves to `index`, which is free; the last one then is spare."""
        last = self.used - 1
        if index != last:
            for tensors in self._layers:
                for tensor in tensors:
                    tensor[index] = tensor[last]
        self.used = last

    def _resized(self, layer: int, size: int) -> State:
        resized = self._empty(layer, size)
        for tensor, before in zip(resized, self._layers[layer], strict=True):
            tensor[: self.used] = before[: self.used]
        return resized

    def _empty(self, layer: int, size: int) -> State:
        return tuple(
            torch.empty((size, *shape), dtype=self._dtype, device=self._device) for shape in self._shapes[layer]
        )
