"""A safetensors file written piece by piece: its header first, then each tensor's bytes in turn.

The format's own library takes all tensors at once, which is the memory that this saves.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knapper.store import files


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written. `dtype`: as the format names it, such as BF16."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def write(path: Path, entries: Iterable[TensorEntry], pieces: Iterator[Tensor], metadata: Mapping[str, str]) -> None:
    """The file, durable and whole, or none. `pieces`: the tensors' rows, in the order of the entries.

    What is written before the end stands beside it, under another name.
    """
    part = path.with_name(f".{path.name}.part")
    promised = 0
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype, "shape": entry.shape, "data_offsets": [promised, promised + entry.nbytes],
        }  # fmt: skip
        promised += entry.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with files.create(part) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for piece in pieces:
            file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
        written = file.tell() - 8 - len(encoded)
        assert written == promised, f"{path.name}: {written} bytes of tensors, and its header promises {promised}"
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
