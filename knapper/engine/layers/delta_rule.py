"""A memory from keys to values in chunks: it decays, and is corrected row by row, by the gated delta rule.

    S_t = exp(g_t) S_{t-1} + k_t beta_t (v_t - exp(g_t) k_t S_{t-1})^T,   o_t = q_t S_t

Source: Gated Delta Networks, arXiv 2412.06464, equations 10 and (in chunks) section 3.3. Within a chunk, with G the sum
of g up to a row, the corrections u of its rows follow from S at its start: (I + A) u = beta (v - exp(G) k S), with
A_tj = beta_t exp(G_t - G_j) k_t k_j for j < t. Without corrections u is beta v: what rows add to the memory, as in
state space duality, arXiv 2405.21060, section 6.

A row has the same bits in a whole chunk and alone, after the rows before it. So every product has the shape that it has
in a chunk, or 8 rows of it: below that libraries take other kernels. Rows of the triangular system are solved in blocks
of 8, first by a product with all blocks before, then one row after another. What is yet to come is an exact zero.

C rows of a chunk, B sequences or chunks, H value heads, G key heads, D elements of a key, E of a value. All float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.models.recurrent import CHUNK_ROWS as ROWS

_BLOCK: Final = 8

Solve = Callable[[Tensor, Tensor], Tensor]


class Rows(NamedTuple):
    """q and k (B, C, G, D), v (B, C, H, E), g and beta (B, C, H)."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


class ChunkState(NamedTuple):
    """S (B, H, D, E) before the chunk, and k (B, G, C, D), u (B, H, C, E) and g (B, H, C) of the rows in it so far."""

    s: Tensor
    k: Tensor
    u: Tensor
    g: Tensor


def outputs(
    rows: Rows, sizes: Sequence[int], before: ChunkState | None, solve: Solve | None
) -> tuple[Tensor, list[ChunkState]]:
    """o (B, C, H, E), and by number the state before the chunks with all their rows in it.

    Chunks come in the order of their numbers, `sizes` of each, and in each the sequences in one order, the longest
    first. `before`: of a single sequence whose first rows are in its state; here their beta is zero. `solve`: None:
    rows add to the memory, and correct nothing.
    """
    rows = _heads_first(rows)
    chunk = _Chunk.of(rows, corrects=solve is not None)
    start, made, states = 0, [], []
    s = rows.v.new_zeros(sizes[0], *rows.v.shape[1:2], rows.k.shape[3], rows.v.shape[3])
    s = s if before is None else before.s
    for number, size in enumerate(sizes):
        here = slice(start, start + size)
        s = s[:size]
        known = before.u if before is not None and number == 0 else None
        o, u = chunk.at(here).through(s, solve, known)
        made.append(o)
        states.append(ChunkState(s, rows.k[here], u, rows.g[here]))
        start += size
        if number + 1 < len(sizes):
            s = folded(states[-1])
    return torch.cat(made).transpose(1, 2), states


@dataclass(frozen=True)
class _Chunk:
    """What of chunks does not depend on S: q and k (B, H, C, D), v (B, H, C, E), beta and exp(G) (B, H, C, 1), the
    system A, if rows correct the memory, and the weights of the outputs (B, H, C, C).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Tensor
    system: Tensor | None
    weights: Tensor

    @classmethod
    def of(cls, rows: Rows, *, corrects: bool) -> "_Chunk":
        heads = rows.v.shape[1]
        sums = rows.g.cumsum(-1)
        later = torch.ones(ROWS, ROWS, dtype=torch.bool, device=sums.device).triu(1)
        between = (sums[..., :, None] - sums[..., None, :]).masked_fill(later, -torch.inf).exp()
        keys = rows.k.transpose(-1, -2)
        beta, system = rows.beta[..., None], None
        if corrects:
            system = (beta * between * _per_head(_matmul(rows.k, keys), heads)).tril(-1)
        qk = _per_head(_matmul(rows.q, keys), heads)
        q, k = (_per_head(x, heads) for x in (rows.q, rows.k))
        return cls(q, k, rows.v, beta, sums.exp()[..., None], system, between * qk)

    def at(self, here: slice) -> "_Chunk":
        q, k, v, beta, decay = (x[here] for x in (self.q, self.k, self.v, self.beta, self.decay))
        return _Chunk(q, k, v, beta, decay, None if self.system is None else self.system[here], self.weights[here])

    def through(self, s: Tensor, solve: Solve | None, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs and corrections of the chunks' rows. `known`: corrections of rows whose beta is zero here."""
        if solve is None or self.system is None:
            u = self.beta * self.v
            u = u if known is None else u + known
        else:
            right = self.beta * (self.v - self.decay * _matmul(self.k, s))
            u = solve(self.system, right if known is None else right + known)
        return self.decay * _matmul(self.q, s) + _matmul(self.weights, u), u


def folded(state: ChunkState) -> Tensor:
    """S after a chunk with all its rows."""
    sums = state.g.cumsum(-1)
    weights = (sums[..., -1:] - sums).exp()[..., None]
    keys = _per_head(state.k, state.u.shape[1]).transpose(-1, -2)
    return sums.exp()[..., -1:, None] * state.s + _matmul(keys, weights * state.u)


def step(rows: Rows, state: ChunkState, at_B: Tensor, *, corrects: bool) -> Tensor:
    """A row for each of B sequences, at place `at_B` of its text: o (B, H, E). The state becomes that with the row.

    q and k (B, G, D), v (B, H, E), g and beta (B, H). `corrects`: as `solve` of `outputs`. The same step
    again, after a failure, gives the same. Before the first row of a chunk the one before must be folded.
    """
    q, k, v, g, beta = rows
    of_B, place_B = torch.arange(len(at_B), device=at_B.device), at_B % ROWS
    heads = v.shape[1]
    state.k[of_B, :, place_B] = k
    state.g[of_B, :, place_B] = g
    sums = state.g.cumsum(-1)
    row_C = torch.arange(ROWS, device=at_B.device)
    later = row_C > place_B[:, None]
    between = (sums[of_B, :, place_B][..., None] - sums).masked_fill(later[:, None], -torch.inf).exp()
    decay = sums.exp()[of_B, :, place_B][..., None]
    few = _few(torch.stack([k, q], dim=2))  # (B, G, 8, D)
    kk, qk = _per_head(_matmul(few, state.k.transpose(-1, -2))[:, :, :2], heads).unbind(2)
    ks, qs = _matmul(_per_head(few, heads), state.s)[:, :, :2].unbind(2)
    beta = beta[..., None]
    if corrects:
        system = (beta * between * kk).masked_fill((later | (row_C == place_B[:, None]))[:, None], 0.0)
        u = _solved_row(system, beta * (v - decay * ks), state.u, place_B)
    else:
        u = beta * v
    state.u[of_B, :, place_B] = u
    # Rows of the chunk before may still be there; their weight is zero.
    return decay * qs + _matmul(_few((between * qk)[:, :, None]), state.u)[:, :, 0]


def fold_(state: ChunkState, full_B: Tensor) -> None:
    """S becomes that after the chunk, in the sequences `full_B`, whose chunk has all its rows."""
    state.s[full_B] = folded(ChunkState(*(part[full_B] for part in state)))


def substituted(system: Tensor, right: Tensor) -> Tensor:
    """u of (I + A) u = r, by forward substitution; `system` (B, H, C, C) is strictly lower triangular."""
    shape = right.shape
    system, right = system.flatten(0, 1), right.flatten(0, 1)
    u = torch.zeros_like(right)
    for start in range(0, ROWS, _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = right[:, rows] - torch.bmm(system[:, rows].contiguous(), u)
        within = system[:, rows, rows]
        for solved in range(_BLOCK - 1):
            after = slice(solved + 1, _BLOCK)
            block[:, after] -= within[:, after, solved, None] * block[:, solved, None]
        u[:, rows] = block
    return u.view(shape)


def triangular(system: Tensor, right: Tensor) -> Tensor:
    """As `substituted`, in the library's own order, and differentiable."""
    solved: Tensor = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return solved


def _solved_row(system: Tensor, right: Tensor, u: Tensor, place_B: Tensor) -> Tensor:
    """A row of `substituted`: of A (B, H, C), of r (B, H, E), after the rows of `u` (B, H, C, E)."""
    of_B, first_B = torch.arange(len(place_B), device=place_B.device), place_B - place_B % _BLOCK
    row_C = torch.arange(ROWS, device=place_B.device)
    earlier = system.masked_fill((row_C >= first_B[:, None])[:, None], 0.0)
    row = right - _matmul(_few(earlier[:, :, None]), u)[:, :, 0]
    for solved in range(_BLOCK - 1):
        at_B = first_B + solved
        row = row - system[of_B, :, at_B][..., None] * u[of_B, :, at_B]
    return row


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    products = torch.bmm(x.flatten(0, 1), y.flatten(0, 1))
    return products.view(*x.shape[:2], *products.shape[1:])


def _few(x: Tensor) -> Tensor:
    """With rows of zeros up to 8."""
    return F.pad(x, (0, 0, 0, _BLOCK - x.shape[-2]))


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Of key heads (dimension 1) as of value heads: several of these share one."""
    times = heads // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def _heads_first(rows: Rows) -> Rows:
    q, k, v = (x.transpose(1, 2).contiguous() for x in (rows.q, rows.k, rows.v))
    g, beta = (x.transpose(1, 2).contiguous() for x in (rows.g, rows.beta))
    return Rows(q, k, v, g, beta)
