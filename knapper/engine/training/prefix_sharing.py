"""Prefix sharing: rows that several sequences have in common are computed once.

A causal model's row depends on the tokens up to it and on no later one. So sequences with a common prefix have common
rows: the samples of a group share their prompt, the turns of a conversation all earlier ones. Rows of an image are
common where the image is.

N rows of all sequences, one after another; U distinct rows.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from knapper.engine.images import placed
from knapper.engine.images.placed import PlacedImage

_Ints = NDArray[np.int64]


class Prefixes:
    """A prefix tree of sequences. Two rows are one if the tokens up to and including them are the same."""

    def __init__(self) -> None:
        self._children: dict[tuple[int, int], int] = {}  # (row before, content) -> row
        self._tokens: list[int] = []
        self._positions: list[_Ints] = []  # of the rows that each sequence added
        self._first: list[int] = []  # the first of the N rows that each of the U stands for
        self._rows: list[_Ints] = []
        self.lengths: list[int] = []
        self.images: list[tuple[int, PlacedImage]] = []  # with the first row that each has among the U

    def __len__(self) -> int:
        """Rows to compute."""
        return len(self._tokens)

    @property
    def total(self) -> int:
        """Rows of all sequences."""
        return sum(self.lengths)

    def new_rows(self, tokens_T: NDArray[np.int32], images: Sequence[PlacedImage] = ()) -> int:
        """Rows that `add` would add."""
        return len(tokens_T) - len(self._walk(placed.content_keys(tokens_T.tolist(), images)))

    def add(self, tokens_T: NDArray[np.int32], images: Sequence[PlacedImage] = ()) -> None:
        tokens = tokens_T.tolist()
        keys = placed.content_keys(tokens, images)
        path = self._walk(keys)
        start, known, before = self.total, len(path), len(self._tokens)
        row = path[-1] if path else -1
        for position in range(known, len(tokens)):
            previous, row = row, len(self._tokens)
            self._children[previous, keys[position]] = row
            self._tokens.append(tokens[position])
            self._first.append(start + position)
            path.append(row)
        self._positions.append(placed.positions(len(tokens), images)[known:])
        self.images += [(before + image.at - known, image) for image in images if image.at >= known]
        self._rows.append(np.array(path, dtype=np.int64))
        self.lengths.append(len(tokens))

    def _walk(self, keys: list[int]) -> list[int]:
        """The existing rows of the longest prefix in the tree."""
        path: list[int] = []
        row = -1
        for key in keys:
            next_row = self._children.get((row, key))
            if next_row is None:
                break
            path.append(next_row)
            row = next_row
        return path

    @property
    def tokens_U(self) -> _Ints:
        return np.array(self._tokens, dtype=np.int64)

    @property
    def positions_U(self) -> _Ints:
        """(U), or with images (U, 3): see `placed.positions`."""
        return placed.joined(self._positions)

    @property
    def first_U(self) -> _Ints:
        """For each computed row, the first of the N rows that it stands for."""
        return np.array(self._first, dtype=np.int64)

    @property
    def rows_N(self) -> _Ints:
        """For each row of each sequence, its computed row."""
        return np.concatenate(self._rows)
