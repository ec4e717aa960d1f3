"""A tensor as its file's header has it, and the error of files that do not have what they must. Loads no torch."""

import re
from dataclasses import dataclass
from pathlib import Path

from knapper.engine.models.linear_shape import Shape
from knapper.errors import UserError


class BrokenModel(UserError):
    """The weight files lack the tensors that config.json promises."""

    code = "broken_model"


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's entry in its file's header. `stored`: its name there; `dtype`: torch's name."""

    path: Path
    stored: str
    shape: Shape
    dtype: str

    @property
    def numbers(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return self.numbers * (int(bits[0]) if bits else 8) // 8  # a boolean takes a byte
