"""Memories that are taken up in chunks are those of the formulas, row by row; their states go on with the same bits.

N rows, H value heads, D elements of a key, E of a value.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers import chunked, delta_rule, gated_delta, state_space
from knapper.engine.layers.chunked import ChunkedRecurrence
from knapper.engine.layers.delta_rule import ChunkState
from knapper.engine.layers.gated_delta import GatedDeltaRecurrence
from knapper.engine.layers.recurrence import STOP, Convolution, PackedRows
from knapper.engine.layers.state_space import StateSpaceRecurrence
from knapper.engine.models.recurrent import CHUNK_ROWS, GatedDelta, Mamba2

MAMBA = Mamba2(heads=4, groups=2, head_dim=32, state_dim=16, taps=3, time_step_min=0.3, biased=True)
DELTA = GatedDelta(2, 4, 16, 32, 3)
LENGTHS = (70, 3, 131, CHUNK_ROWS)


def recurrence_of(kind: str) -> tuple[ChunkedRecurrence, int]:
    """With random weights; and how many numbers a row has."""
    draw = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    facts = MAMBA if kind == "Mamba 2" else DELTA
    convolution = Convolution(random(3, facts.conv_width), random(facts.conv_width) if facts is MAMBA else None)
    decay_H, bias_H = random(4).abs(), random(4)
    if isinstance(facts, Mamba2):
        return StateSpaceRecurrence(convolution, facts, decay_H, bias_H, random(4)), facts.conv_width + 4
    return GatedDeltaRecurrence(convolution, facts, decay_H, bias_H), facts.conv_width + 8


def rows_of(numbers: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(length, numbers, generator=torch.Generator().manual_seed(seed))


def by_row(recurrence: ChunkedRecurrence, x_NX: Tensor) -> Tensor:
    """Of one sequence, from the formulas, in float64."""
    width = recurrence.convolution.weight_KX.shape[1]
    weight_KX, bias_X = recurrence.convolution.weight_KX.double(), recurrence.convolution.bias_X
    before = F.pad(x_NX[:, :width].double(), (0, 0, len(weight_KX) - 1, 0))
    convolved = torch.stack([(before[at : at + len(weight_KX)] * weight_KX).sum(0) for at in range(len(x_NX))])
    convolved, more = convolved if bias_X is None else convolved + bias_X.double(), x_NX[:, width:].double()
    made = recurrence.rows(convolved, more)
    heads = made.v.shape[1] // made.k.shape[1]
    q_NHD, k_NHD = (part.repeat_interleave(heads, 1) for part in (made.q, made.k))
    s_HDE = torch.zeros(*q_NHD.shape[1:], made.v.shape[2], dtype=torch.float64)
    outputs = []
    for q, k, v, g, beta in zip(q_NHD, k_NHD, made.v, made.g, made.beta, strict=True):
        s_HDE = s_HDE * g.exp()[:, None, None]
        new = v - torch.einsum("hd,hde->he", k, s_HDE) if recurrence.corrects else v
        s_HDE = s_HDE + k[:, :, None] * (beta[:, None] * new)[:, None]
        outputs.append(torch.einsum("hd,hde->he", q, s_HDE))
    return recurrence.finished(torch.stack(outputs), made)


def test_rows_of_mamba_2_are_those_of_its_formula() -> None:
    """dt is softplus(dt + bias), at least time_step_min; decays are exp(-decay dt); values come first, then keys."""
    recurrence, numbers = recurrence_of("Mamba 2")
    assert isinstance(recurrence, StateSpaceRecurrence)
    x_NX = rows_of(numbers, 9)
    convolved, dt = x_NX[:, :-4], x_NX[:, -4:]
    found = recurrence.rows(convolved, dt)
    active = F.silu(convolved)
    torch.testing.assert_close(found.v, active[:, :128].view(9, 4, 32))
    torch.testing.assert_close(found.k, active[:, 128:160].view(9, 2, 16))
    torch.testing.assert_close(found.q, active[:, 160:].view(9, 2, 16))
    steps = torch.maximum(F.softplus(dt + recurrence.bias_H), torch.tensor(0.3))
    assert 0 < int((steps == 0.3).sum()) < steps.numel()
    torch.testing.assert_close(found.beta, steps)
    torch.testing.assert_close(found.g, -recurrence.decay_H * steps)
    o_NHE = torch.randn(9, 4, 32)
    expected = o_NHE + recurrence.skip_H[None, :, None] * found.v
    torch.testing.assert_close(recurrence.finished(o_NHE, found), expected.flatten(1))


@pytest.mark.parametrize("kind", ["Mamba 2", "delta"])
def test_packed_rows_and_their_gradient_are_those_of_the_formula_row_by_row(kind: str) -> None:
    recurrence, numbers = recurrence_of(kind)
    x_NX = rows_of(numbers, sum(LENGTHS)).requires_grad_()
    y_NY, kept = recurrence.packed(x_NX, PackedRows(LENGTHS), keeps=False)
    assert kept == []
    weights = torch.randn(y_NY.shape, generator=torch.Generator().manual_seed(4))
    (gradient,) = torch.autograd.grad((y_NY * weights).sum(), x_NX)
    expected = torch.cat([by_row(recurrence, part) for part in x_NX.split(LENGTHS)])
    (wanted,) = torch.autograd.grad((expected * weights).sum(), x_NX)
    torch.testing.assert_close(y_NY.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["Mamba 2", "delta"])
def test_every_state_that_is_kept_goes_on_with_the_bits_of_one_pass(kind: str) -> None:
    recurrence, numbers = recurrence_of(kind)
    texts = [rows_of(numbers, length, seed) for seed, length in enumerate(LENGTHS)]
    with torch.no_grad():
        _, kept = recurrence.packed(torch.cat(texts), PackedRows(LENGTHS), keeps=True)
        assert [sorted(stops) for stops in kept] == [[STOP, 70], [3], [STOP, 2 * STOP, 131], [CHUNK_ROWS]]
        for text, stops in zip(texts, kept, strict=True):
            longer = torch.cat([text, rows_of(numbers, 40, seed=9)])
            whole, _ = recurrence.packed(longer, PackedRows([len(longer)]), keeps=False)
            for stop, state in stops.items():
                rest = PackedRows([len(longer) - stop], stop, state)
                found, [again] = recurrence.packed(longer[stop:], rest, keeps=True)
                assert torch.equal(found, whole[stop:])
                assert sorted(again) == [at for at in (STOP, 2 * STOP) if stop < at < len(longer)] + [len(longer)]
                decoded: Any = tuple(part[None].clone() for part in state)
                for at in range(stop, len(longer)):
                    if at > stop and at % CHUNK_ROWS == 0:
                        delta_rule.fold_(ChunkState(*decoded[1:]), torch.tensor([0]))
                    assert torch.equal(recurrence.step(longer[at, None], decoded, torch.tensor([at]))[0], whole[at])
                more, last = rows_of(numbers, 2, seed=8), PackedRows([2], len(longer), again[len(longer)])
                after, _ = recurrence.packed(more, last, keeps=False)
                assert torch.equal(after, recurrence.packed(torch.cat([longer, more]), PackedRows(
                    [len(longer) + 2]), keeps=False)[0][-2:])  # fmt: skip


@pytest.mark.parametrize("kind", ["Mamba 2", "delta"])
def test_states_are_kept_unless_a_gradient_is_wanted(kind: str) -> None:
    recurrence, numbers = recurrence_of(kind)
    x_NX = rows_of(numbers, 5)
    assert recurrence.packed(x_NX, PackedRows([5]), keeps=True)[1], "of rows without a gradient"
    with torch.no_grad():
        assert recurrence.packed(x_NX.clone().requires_grad_(), PackedRows([5]), keeps=True)[1]
    assert recurrence.packed(x_NX.clone().requires_grad_(), PackedRows([5]), keeps=True)[1] == []


class _Crooked(StateSpaceRecurrence):
    """What it gives depends on how many rows there are."""

    def finished(self, o_NHE: Tensor, rows: Any) -> Tensor:
        return super().finished(o_NHE, rows) + float(len(o_NHE) > 1)


def test_a_device_on_which_bits_depend_on_neighbours_is_found_out() -> None:
    cpu = torch.device("cpu")
    assert state_space.is_invariant(MAMBA, cpu)
    assert gated_delta.is_invariant(DELTA, cpu)
    crooked = _Crooked(**vars(state_space._drawn(MAMBA, cpu)))
    assert not chunked.is_invariant(crooked, MAMBA.heads, cpu)
