"""A frozen linear: x W^T + b, and its gradient in x.

On a CPU in float32 W is packed once, as oneDNN's kernels read it: products of a few rows take 0.6 to 0.8 of the time.
A packed product adds in another order than F.linear, so training, prefill and decoding must all use it; a row then has
the same bits whatever the rows beside it and the number of threads. Other products get more rows for that (`rows`).
W itself is what the gradient is computed with: parts of the model's file, mapped, which a process that only samples
does not touch again.
N rows, I inputs, O outputs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.rows import padded


class FrozenLinear:
    """W (O, I) is `parts` stacked, in the dtype of the model's file; `dtype` computes."""

    def __init__(
        self, parts: Sequence[Tensor], dtype: torch.dtype, bias_O: Tensor | None = None, *, pack: bool = True
    ) -> None:
        """`pack`: a second copy in memory is worth it."""
        packs = (
            pack and parts[0].device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
        )
        self.widths = tuple(len(part) for part in parts)
        self.outputs, self.inputs = sum(self.widths), parts[0].shape[1]
        self.dtype = dtype
        self._bias_O = bias_O
        whole_OI: Tensor = parts[0].to(dtype) if len(parts) == 1 else torch.cat([part.to(dtype) for part in parts])
        self._parts = tuple(parts) if packs else (whole_OI,)
        self._packed: Tensor | None = torch.ops.mkldnn._reorder_linear_weight(whole_OI, None) if packs else None

    @property
    def packed(self) -> bool:
        return self._packed is not None

    @property
    def nbytes(self) -> int:
        """Of W, once, as it computes."""
        return self.outputs * self.inputs * self.dtype.itemsize

    def __call__(self, x_NI: Tensor) -> Tensor:
        """(N, O), a tensor of its own. Not differentiable: `back` is its gradient."""
        if self._packed is None:
            return F.linear(padded(x_NI), self._parts[0], self._bias_O)[: len(x_NI)]
        found_NO: Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, self._packed, self._bias_O, "none", [], "")
        return found_NO

    def back(self, grads: Sequence[Tensor]) -> Tensor:
        """grad W (N, I), of gradients (N, width) by part."""
        if len(self._parts) != len(grads):
            grads = [torch.cat(list(grads), dim=1)]
        first, *rest = zip(map(padded, grads), self._parts, strict=True)
        found_NI = torch.mm(first[0], first[1].to(self.dtype))
        for grad, part in rest:
            found_NI.addmm_(grad, part.to(self.dtype))
        return found_NI[: len(grads[0])]

    def rows(self, outputs_N: Tensor) -> Tensor:
        """W[outputs] (N, I), of a W of one part."""
        (whole_OI,) = self._parts
        return F.embedding(outputs_N, whole_OI).to(self.dtype)
