"""Arrays on the wire, dense or in CSR, little-endian, to numpy and back.

Int32 is widened to int64 and bfloat16 to float32, as the SDK does. A sparse array becomes dense, up to a limit.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knapper import limits
from knapper.errors import InvalidField, TooLarge
from knapper.wire import descriptor

Array = NDArray[Any]

_DTYPES: dict[int, np.dtype[Any]] = {
    descriptor.FLOAT32: np.dtype("<f4"),
    descriptor.INT64: np.dtype("<i8"),
    descriptor.INT32: np.dtype("<i4"),
    descriptor.BFLOAT16: np.dtype("<u2"),
}
_NUMBERS = {"f4": descriptor.FLOAT32, "i8": descriptor.INT64, "i4": descriptor.INT32}


def number(dtype: np.dtype[Any]) -> int:
    """The DType for an encoded array: float32, int64 or int32. Raises ValueError for another, which is a defect."""
    if dtype.str[1:] not in _NUMBERS:
        raise ValueError(f"cannot send arrays of {dtype}")
    return _NUMBERS[dtype.str[1:]]


def little_endian(array: Array) -> bytes:
    """The array's bytes in row-major order, little-endian."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def elements(data: bytes, dtype: int, field: str) -> Array:
    """A flat array of int64 or float32. Raises InvalidField for an unknown dtype or a length that does not fit it."""
    if dtype not in _DTYPES:
        raise InvalidField(f"{field}.dtype", dtype, "1 (float32), 2 (int64), 3 (int32) or 4 (bfloat16)")
    wire_dtype = _DTYPES[dtype]
    if len(data) % wire_dtype.itemsize:
        raise InvalidField(f"{field}: length in bytes", len(data), f"a multiple of {wire_dtype.itemsize}")
    flat = np.frombuffer(data, dtype=wire_dtype)
    if dtype == descriptor.BFLOAT16:
        return (flat.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return flat.astype(np.float32 if dtype == descriptor.FLOAT32 else np.int64)


def encode(message: Any, array: Array) -> None:
    """Fill the Tensor message with the dense array, of a dtype that `number` knows."""
    message.dense, message.dtype = little_endian(array), number(array.dtype)
    message.shape.extend(array.shape)


def decode(tensor: Any, field: str) -> Array:
    """The Tensor message as an array of one or two dimensions. Raises InvalidField, or TooLarge past the limits."""
    shape = list(tensor.shape)
    if len(shape) > 2 or any(size < 0 for size in shape):
        raise InvalidField(f"{field}.shape", shape, "(N) or (N, K) with sizes of at least 0")
    if len(shape) == 2 and shape[1] > limits.target_columns_max:
        raise TooLarge(
            f"{field}.shape is {shape}: K is {shape[1]}; allowed: at most {limits.target_columns_max} columns"
        )
    encoding = tensor.WhichOneof("encoding")
    if encoding is None:
        raise InvalidField(field, "neither", "dense or sparse_csr values")
    if encoding == "sparse_csr":
        return _dense(tensor.sparse_csr, tensor.dtype, shape, field)
    flat = elements(tensor.dense, tensor.dtype, field)
    if not shape:  # the SDK leaves the shape out of some one-dimensional arrays
        return flat
    if math.prod(shape) != flat.size:
        raise InvalidField(f"{field}.shape", shape, f"a shape of the {flat.size} values that were sent")
    return flat.reshape(shape)


def _dense(csr: Any, dtype: int, shape: list[int], field: str) -> Array:
    """The dense array of a CSR message; cells that it does not list are 0."""
    if len(shape) != 2:
        raise InvalidField(f"{field}.shape", shape, "(N, K), which a sparse array must state")
    return dense(
        elements(csr.values, dtype, field),
        elements(csr.crow_indices, descriptor.INT64, f"{field}.crow_indices"),
        elements(csr.col_indices, descriptor.INT64, f"{field}.col_indices"),
        (shape[0], shape[1]),
        field,
    )


def dense(values: Array, starts: Array, columns_M: Array, shape: tuple[int, int], field: str) -> Array:
    """The dense array; cells that CSR does not list are 0. Raises InvalidField, TooLarge."""
    check_csr(values, starts, columns_M, shape, field)
    rows, columns = shape
    if rows * columns > limits.sparse_cells_max:
        raise TooLarge(f"{field}.shape is {shape}: {rows * columns} cells; allowed: {limits.sparse_cells_max} cells")
    cells = np.zeros(rows * columns, dtype=values.dtype)
    cells[np.repeat(np.arange(rows), np.diff(starts)) * columns + columns_M] = values
    return cells.reshape(rows, columns)


def check_csr(values: Array, starts: Array, columns_M: Array, shape: tuple[int, int], field: str) -> None:
    """Raises InvalidField if the parts of a CSR array contradict each other, or list a cell twice."""
    rows, columns = shape
    if starts.size != rows + 1:
        raise InvalidField(f"{field}.crow_indices: count", starts.size, f"{rows + 1}, one more than the {rows} rows")
    if starts[0] != 0 or starts[-1] != values.size or (np.diff(starts) < 0).any():
        raise InvalidField(f"{field}.crow_indices", starts.tolist(), f"ascending from 0 to the {values.size} values")
    if columns_M.size != values.size:
        raise InvalidField(f"{field}.col_indices: count", columns_M.size, f"{values.size}, one a value")
    if columns_M.size and not 0 <= columns_M.min() <= columns_M.max() < columns:
        raise InvalidField(f"{field}.col_indices", columns_M.tolist(), f"0 to {columns - 1}")
    cells = np.repeat(np.arange(rows), np.diff(starts)) * columns + columns_M
    if np.unique(cells).size != cells.size:
        raise InvalidField(f"{field}.col_indices", columns_M.tolist(), "each column at most once in a row")
