"""A frozen linear whose matrix is whole only while its layer is gathered. O outputs, I inputs."""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers.batch_invariance import Exactness, Product
from knapper.engine.layers.linear import FrozenLinear


class ShardedLinear(FrozenLinear):
    """`whole_OI`: W while it is gathered; without rows otherwise. It is never packed: a copy would be whole."""

    _form = " of shards"

    def __init__(
        self,
        parts: Sequence[Tensor],
        dtype: torch.dtype,
        bias_O: Tensor | None = None,
        *,
        pack: bool = False,
        adapted: bool = True,
        exactness: Exactness | None = None,
    ) -> None:
        assert not pack, "a packed copy would be whole on every rank"
        super().__init__(parts, dtype, bias_O, pack=False, adapted=adapted, exactness=exactness)
        (self.whole_OI,) = self._parts
        self._parts = (self.whole_OI.new_empty(0, self.inputs),)
        self._bias_O = bias_O
        self._product = self._forward

    def rows(self, outputs_N: Tensor) -> Tensor:
        return F.embedding(outputs_N, self.whole_OI).to(self.dtype)

    def _forward(self, x_NI: Tensor) -> Tensor:
        return F.linear(self._padded(x_NI, 1), self._padded(self.whole_OI, 1), self._bias_O)

    @cached_property
    def _product_back(self) -> Product:
        def product(grad_NO: Tensor) -> Tensor:
            return torch.mm(self._padded(grad_NO, 1), self._padded(self.whole_OI, 0))

        return product

    @property
    def _widths_back(self) -> tuple[int, ...]:
        return (self.outputs,)
