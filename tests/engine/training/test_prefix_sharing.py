"""Rows that sequences share: one for each different beginning, and every sequence finds its own."""

import numpy as np

from knapper.engine.training.prefix_sharing import Prefixes

SEED = 3


def test_there_is_one_row_for_each_different_beginning() -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(200):
        sequences = [rng.integers(0, 3, rng.integers(1, 9)).astype(np.int32) for _ in range(rng.integers(1, 7))]
        prefixes = Prefixes()
        for sequence in sequences:
            before, expected = len(prefixes), prefixes.new_rows(sequence)
            prefixes.add(sequence)
            assert len(prefixes) == before + expected
        beginnings = {tuple(sequence[: end + 1].tolist()) for sequence in sequences for end in range(len(sequence))}
        assert len(prefixes) == len(beginnings), f"seed {SEED}"
        assert prefixes.total == sum(map(len, sequences))
        places = np.split(prefixes.rows_N, np.cumsum(prefixes.lengths)[:-1])
        for sequence, rows in zip(sequences, places, strict=True):
            np.testing.assert_array_equal(prefixes.tokens_U[rows], sequence)
            np.testing.assert_array_equal(prefixes.positions_U[rows], np.arange(len(sequence)))
        np.testing.assert_array_equal(prefixes.rows_N[prefixes.first_U], np.arange(len(prefixes)))
