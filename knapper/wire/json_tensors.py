"""Arrays in JSON requests, dense or in CSR: flat lists of numbers with a shape, to numpy."""

import math
from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta

from knapper import limits
from knapper.errors import InvalidField, TooLarge
from knapper.wire import tensors
from knapper.wire.types import Cells

Index = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class TensorData(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`sparse_crow_indices` and `sparse_col_indices` make it a CSR array: `data` holds only the listed cells."""

    data: list[Whole | float]
    dtype: Literal["int64", "float32"]
    shape: Annotated[list[Index], Meta(max_length=2)] | None = None
    sparse_crow_indices: list[Index] | None = None
    sparse_col_indices: list[Index] | None = None

    def array(self, field: str) -> tensors.Array:
        """The dense array, int64 or float32; cells that are not listed are 0. Raises InvalidField, TooLarge."""
        flat = self._values(field)
        if self.shape is not None and len(self.shape) == 2 and self.shape[1] > limits.target_columns_max:
            allowed = f"allowed: at most {limits.target_columns_max} columns"
            raise TooLarge(f"{field}.shape is {self.shape}: K is {self.shape[1]}; {allowed}")
        if self.sparse_crow_indices is not None or self.sparse_col_indices is not None:
            return tensors.dense(flat, *self._csr(field), self._matrix(field), field)
        if self.shape is None:
            return flat
        self._check_size(flat, field)
        return flat.reshape(self.shape)

    def cells(self, field: str) -> Cells:
        """A matrix of token ids, in the layout of the request. Raises InvalidField."""
        if self.dtype != "int64":
            raise InvalidField(f"{field}.dtype", self.dtype, "int64: they are token ids")
        flat, shape = self._values(field), self._matrix(field)
        if self.sparse_crow_indices is None and self.sparse_col_indices is None:
            self._check_size(flat, field)
            return Cells(flat, shape)
        starts, columns = self._csr(field)
        tensors.check_csr(flat, starts, columns, shape, field)
        return Cells(flat, shape, starts, columns)

    def _values(self, field: str) -> tensors.Array:
        if self.dtype == "float32":
            return np.array(self.data, dtype=np.float32)
        for i, value in enumerate(self.data):
            if isinstance(value, float):
                raise InvalidField(f"{field}.data[{i}]", value, "a whole number, as dtype is int64")
        return np.array(self.data, dtype=np.int64)

    def _matrix(self, field: str) -> tuple[int, int]:
        if self.shape is None or len(self.shape) != 2:
            raise InvalidField(f"{field}.shape", self.shape, "(N, K)")
        return self.shape[0], self.shape[1]

    def _check_size(self, flat: tensors.Array, field: str) -> None:
        if math.prod(self.shape or []) != flat.size:
            raise InvalidField(f"{field}.shape", self.shape, f"a shape of the {flat.size} values that were sent")

    def _csr(self, field: str) -> tuple[tensors.Array, tensors.Array]:
        if self.sparse_crow_indices is None or self.sparse_col_indices is None:
            raise InvalidField(f"{field}.sparse_crow_indices and sparse_col_indices", "one of them", "both, or neither")
        return np.array(self.sparse_crow_indices, dtype=np.int64), np.array(self.sparse_col_indices, dtype=np.int64)
