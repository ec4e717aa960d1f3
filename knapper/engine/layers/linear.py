"""A frozen linear: x W^T + b, and its gradient in x. A row's bits do not depend on other rows (`Exactness`).

On a CPU W is packed once in the layout of oneDNN's kernels: products of a few rows take 0.4 to 0.8 of the time. A
packed product adds in another order than F.linear, so training, prefill and decoding must all use it. The gradient uses
W itself: parts of the model's file, mapped, which a process that only samples does not touch again.

On a CPU the inner size is padded with zeros to whole registers. Unpadded, AMX multiplies in bfloat16 the memory behind
a row, where a zero does not remove a neighbour's NaN; and in float32 a row's bits depend on its address. N rows, I
inputs, O outputs.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers.batch_invariance import BACKWARD_LAYOUTS, MODEL_LAYOUTS, Exactness, Product, RowLayout

_REGISTER_BYTES: Final = 64  # of AVX-512, and of a row of AMX's tiles


class FrozenLinear:
    """W (O, I) is `parts` stacked, in the dtype of the model's file; it computes in `dtype`."""

    _form = ""  # in the names under which layouts are kept: products of another form may add in another order

    def __init__(
        self,
        parts: Sequence[Tensor],
        dtype: torch.dtype,
        bias_O: Tensor | None = None,
        *,
        pack: bool = True,
        adapted: bool = True,
        exactness: Exactness | None = None,
    ) -> None:
        """`pack`: keep a packed copy in memory. `adapted`: adapters may enter it. `exactness`: the model's; None: one
        of its own.
        """
        self.exactness = exactness or Exactness()
        self.widths = tuple(len(part) for part in parts)
        self.outputs, self.inputs = sum(self.widths), parts[0].shape[1]
        self.dtype = dtype
        device = parts[0].device
        self._multiple = _REGISTER_BYTES // dtype.itemsize if device.type == "cpu" else 1
        self.packed = pack and device.type == "cpu" and _packs(dtype)
        whole_OI = _stacked(parts, dtype)
        self._parts = tuple(parts) if self.packed else (whole_OI,)
        self._product = self._make(whole_OI, bias_O)
        if adapted:
            self.exactness.add(self.inputs, self.widths)

        def probe(whole_OI: Tensor) -> Product:  # a bias of zeros rounds no difference away
            return self._make(whole_OI, None if bias_O is None else bias_O.new_zeros(len(whole_OI)))

        name = f"forward{self._form}"
        self._layout = self.exactness.product(name, MODEL_LAYOUTS, probe, self.inputs, self.outputs, self._like)

    @property
    def nbytes(self) -> int:
        """Bytes of W, once, in `dtype`."""
        return self.outputs * self.inputs * self.dtype.itemsize

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(N, O), a tensor of its own. Not differentiable: `back` is its gradient."""
        return self._layout(self._product, x_NI)

    def back(self, grads: Sequence[Tensor]) -> Tensor:
        """grad W (N, I), of gradients (N, width) by part."""
        grad_NO = grads[0] if len(grads) == 1 else torch.cat(list(grads), dim=1)
        return self._layout_back(self._product_back, grad_NO)

    def rows(self, outputs_N: Tensor) -> Tensor:
        """W[outputs] (N, I), of a W of one part."""
        (whole_OI,) = self._parts
        return F.embedding(outputs_N, whole_OI).to(self.dtype)

    @property
    def _like(self) -> Tensor:
        return self._parts[0].new_empty(0, dtype=self.dtype)

    def _make(self, whole_OI: Tensor, bias_O: Tensor | None) -> Product:
        """x -> x W^T + b."""
        padded_OI = self._padded(whole_OI, 1)
        if not self.packed:
            return lambda x_NI: F.linear(self._padded(x_NI, 1), padded_OI, bias_O)
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(padded_OI, None)

        def product(x_NI: Tensor) -> Tensor:
            y_NO: Tensor = torch.ops.mkldnn._linear_pointwise(self._padded(x_NI, 1), packed, bias_O, "none", [], "")
            return y_NO

        return product

    # Made when training first needs it: a process that only samples has neither its memory nor its probes.

    @cached_property
    def _layout_back(self) -> RowLayout:
        def make(w_IO: Tensor) -> Product:
            return self._make_back(w_IO.T.contiguous().split(self._widths_back))

        name = f"backward{self._form}"
        return self.exactness.product(name, BACKWARD_LAYOUTS, make, self.outputs, self.inputs, self._like)

    @cached_property
    def _product_back(self) -> Product:
        if self.dtype == torch.bfloat16:  # a file of float32 would be converted in every product
            return self._make_back([_stacked(self._parts, self.dtype)])
        return self._make_back(self._parts)

    @property
    def _widths_back(self) -> tuple[int, ...]:
        """bfloat16 would round the sum after each part: there the parts are one."""
        return self.widths if len(self._parts) > 1 and self.dtype != torch.bfloat16 else (self.outputs,)

    def _make_back(self, parts: Sequence[Tensor]) -> Product:
        """g -> g W."""
        padded = [self._padded(part, 0) for part in parts]

        def product(grad_NO: Tensor) -> Tensor:
            grads = grad_NO.split([len(part) for part in parts], dim=1)
            first, *others = zip((self._padded(grad, 1) for grad in grads), padded, strict=True)
            grad_NI = torch.mm(first[0], first[1].to(self.dtype))
            for grad, part in others:
                grad_NI.addmm_(grad, part.to(self.dtype))
            return grad_NI

        return product

    def _padded(self, matrix: Tensor, dim: int) -> Tensor:
        """Padded with zeros along the inner dimension, up to whole registers; the same tensor if none is missing."""
        missing = -matrix.shape[dim] % self._multiple
        return matrix if missing == 0 else F.pad(matrix, (0, 0) * (1 - dim) + (0, missing))


def _stacked(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return parts[0].to(dtype) if len(parts) == 1 else torch.cat([part.to(dtype) for part in parts])


def _packs(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
