"""Batch-invariant products: a row has the same bits however many rows there are. Probed on this CPU.

Libraries choose a kernel, and with it the order of additions, by the CPU, the shape and the number of rows. So every
product of the model and of its adapters is tried once at its real shape, with several row layouts; it uses the first in
which no row's bits depend on other rows. The last layouts are blocks of a fixed number of rows, which leave a kernel
nothing to choose; larger blocks that give the same bits are used beside them. Training, prefill and decoding use the
same layout.

The search ignores time, so that it ends alike on every start: replayed bits depend on it. It takes seconds, so what it
found may be kept (`LayoutChoices`) for later processes on an equal CPU.
docs/decisions/0013-exactness-is-probed.md has the measurements. N rows, M rows of one adapter, I inputs, O outputs, R
rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Final, Protocol

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers.determinism import keeps_bits
from knapper.engine.models.layer import AttentionLayout

log = structlog.get_logger()

Product = Callable[[Tensor], Tensor]
Make = Callable[[Tensor], Product]


@dataclass(frozen=True)
class RowLayout:
    """How rows enter a product: padded with zero rows up to `least`, or up to whole blocks of `block`.

    Each block is a product of its own. `larger`: the other sizes of a block, ascending, in which a row has the bits
    that it has in one of `block` rows. `alone`: adapters that decode together have products of their own, as in
    training, in place of one batch. The output of padding is never read. Rows are aligned to vector registers: of
    unaligned rows, which a view may have, some kernels add the first numbers in another order.
    """

    least: int = 1
    block: int = 0  # all rows at once
    larger: tuple[int, ...] = ()
    alone: bool = False

    def rows(self, count: int) -> int:
        """`count` with padding."""
        return sum(_cover((self.block, *self.larger), count)) if self.block else max(count, self.least)

    def padded(self, x_N: Tensor) -> Tensor:
        """`x_N` with padding; the same tensor if none is missing."""
        added = self.rows(len(x_N)) - len(x_N)
        if added:
            return torch.cat([x_N, x_N.new_zeros(added, *x_N.shape[1:])])
        return x_N if self == UNCHANGED or x_N.data_ptr() % _ALIGNMENT == 0 else x_N.clone()

    def __call__(self, product: Product, x_NI: Tensor) -> Tensor:
        """product(x_NI) (N, O)."""
        padded = self.padded(x_NI)
        if not self.block:
            return product(padded)[: len(x_NI)]
        sizes = _cover((self.block, *self.larger), len(x_NI))
        if len(sizes) == 1:
            return product(padded)[: len(x_NI)]
        return torch.cat([product(block) for block in padded.split(list(sizes))])[: len(x_NI)]

    def __str__(self) -> str:
        sizes = " or ".join(map(str, (self.block, *self.larger)))
        rows = f"blocks of {sizes} rows" if self.block else f"{self.least} rows at least"
        return f"{rows}, an adapter at a time" if self.alone else rows


@lru_cache(maxsize=4096)
def _cover(sizes: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The cheapest blocks, large ones first, that hold `count` rows."""
    if count <= 0:
        return ()
    if count > 2 * sizes[-1]:
        whole = count // sizes[-1] - 1
        return (sizes[-1],) * whole + _cover(sizes, count - whole * sizes[-1])
    covers = [(size, *_cover(sizes, count - size)) for size in sizes]
    _, fewest = min((_cost(cover), cover) for cover in covers)
    return tuple(sorted(fewest, reverse=True))


def _cost(cover: Sequence[int]) -> int:
    return sum(cover) + _CALL_ROWS * len(cover)


def _typical_cost(layout: RowLayout) -> float:
    sizes = (layout.block, *layout.larger)
    return sum(_cost(_cover(sizes, count)) / (count + _CALL_ROWS) for count in _COUNTS_TYPICAL)


UNCHANGED: Final = RowLayout()
# In the order of the search, the cheapest first. A model's matrices are read from memory anyway, so that padding costs
# a decoding step little; smaller blocks would cost a training step more.
MODEL_LAYOUTS: Final = (
    UNCHANGED,
    RowLayout(2),
    RowLayout(8),
    RowLayout(16),
    RowLayout(block=64),
    RowLayout(block=128),
    RowLayout(block=256),
)
BACKWARD_LAYOUTS: Final = (RowLayout(8), *MODEL_LAYOUTS[3:])
ADAPTER_LAYOUTS: Final = (
    RowLayout(8),
    RowLayout(16),
    RowLayout(block=16),
    RowLayout(block=32),
    RowLayout(block=64),
    RowLayout(block=128),
)
# Tried where none of these keeps the bits. The kernels of Intel's AVX2 take six rows, so these are whole sixes for each
# of two or four threads; and batches of adapters are computed by other kernels there.
_SIXES: Final = (RowLayout(block=48), RowLayout(block=96), RowLayout(block=192))
_SIXES_ALONE: Final = (*_SIXES, *(RowLayout(block=size, alone=True) for size in (48, 96, 192, 64, 128)))
# Of a GPU, whose kernel follows from the number of rows: small blocks would leave most of it idle in training.
GPU_LAYOUTS: Final = (UNCHANGED, RowLayout(block=256), RowLayout(block=128), RowLayout(block=64))

_LARGER: Final = (96, 128, 192, 256, 384, 512, 768, 1024)  # sizes of blocks that are tried beside one that is found
_CALL_ROWS: Final = 96  # a product's own costs, as rows: 64 to 120 of AMX's, 576 x 576 to 576 x 3,072
_COUNTS_TYPICAL: Final = (
    1,
    32,
    128,
    256,
    512,
    1016,
)  # of passes: by the cost of their blocks one block's size is taken
_ALIGNMENT: Final = 64  # bytes of an AVX-512 register; torch's own tensors are aligned so
_COUNTS: Final = (1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 48, 64, 65, 96, 130, 257)  # below and above where kernels change
_COUNTS_DENSE: Final = 16  # rows of each thread: up to so many every count is tried
_COUNTS_LARGE: Final = (1, 2, 8, 9, 12, 17, 33, 130)  # for a matrix with more elements than:
_LARGE: Final = 1 << 22
_ROWS_MAX: Final = 1024  # of a pass
_ELEMENTS_MAX: Final = 1 << 24  # of a probe at a time
_PROBE_ELEMENTS_MAX: Final = 1 << 26  # of a matrix; a larger one is probed with fewer outputs


@dataclass(frozen=True)
class LayoutChoice:
    """The end of one search: the layout that is used, and whether it keeps the bits."""

    layout: RowLayout
    invariant: bool


class LayoutChoices(Protocol):
    """LayoutChoices of earlier processes, on this very model, CPU, libraries and number of threads."""

    def get(self, product: str) -> LayoutChoice | None: ...

    def add(self, product: str, choice: LayoutChoice) -> None:
        """Keep it for later processes. Returns at once."""


class Exactness:
    """The row layouts of one model's products, on one number of threads.

    `promised`: False computes as fast as possible, whatever the bits; so does a GPU, unless it keeps them
    (`determinism`). `choices`: what need not be searched for again; without them everything is.
    """

    def __init__(self, *, promised: bool = True, choices: LayoutChoices | None = None) -> None:
        self.promised = promised
        self._choices = choices
        self.broken: list[str] = []  # products without an invariant layout
        self._layouts: dict[tuple[object, ...], RowLayout] = {}
        self._attention: dict[str, AttentionLayout] = {}
        self._linears: set[tuple[int, tuple[int, ...]]] = set()  # (inputs, widths) of the linears with adapters

    @property
    def layouts(self) -> dict[str, str]:
        """The layout of each product that is not unchanged."""
        products = {
            " ".join(map(str, key)): str(layout) for key, layout in self._layouts.items() if layout != UNCHANGED
        }
        return products | {name: str(layout) for name, layout in self._attention.items() if layout != AttentionLayout()}

    def add(self, inputs: int, widths: tuple[int, ...]) -> None:
        """Register a linear that adapters enter."""
        self._linears.add((inputs, widths))

    def product(
        self, name: str, layouts: Sequence[RowLayout], make: Make, inputs: int, outputs: int, like: Tensor
    ) -> RowLayout:
        """The layout for products x w^T, `make` of a matrix w (O, I), with the dtype and device of `like`."""
        if not self.probes(like.device):
            return UNCHANGED
        layouts = layouts if like.device.type == "cpu" else GPU_LAYOUTS
        key = (name, f"{inputs}x{outputs}", _short(like.dtype))
        if key not in self._layouts:

            def search() -> RowLayout | None:
                x_NI, w_OI = _probe_tensors(inputs, min(outputs, max(1, _PROBE_ELEMENTS_MAX // inputs)), like)
                return _found_layout(layouts, make(w_OI), x_NI, outputs)

            self._layouts[key] = self._searched(key, layouts, search)
        return self._layouts[key]

    def adapter(self, rank: int, like: Tensor) -> RowLayout:
        """The layout for every product of an adapter of padded rank `rank`, on any of the linears."""
        if not self.probes(like.device):
            return UNCHANGED
        name = ("adapter of rank", str(rank), _short(like.dtype))
        if name not in self._layouts:
            pairs = [
                (len(widths), inputs, rank, width) for inputs, widths in sorted(self._linears) for width in set(widths)
            ]
            shapes = {(inputs, parts * rank) for parts, inputs, rank, _ in pairs} | {(r, w) for _, _, r, w in pairs}
            layouts = ADAPTER_LAYOUTS if like.device.type == "cpu" else GPU_LAYOUTS
            is_invariant = partial(_adapter_is_invariant, shapes=sorted(shapes), like=like)

            def search() -> RowLayout | None:
                tried = [*layouts, *_SIXES_ALONE] if like.device.type == "cpu" else layouts
                found = next(filter(is_invariant, tried), None)
                if found is None or not found.block or like.device.type != "cpu":
                    return found
                extended = _extended_for_adapters(found, sorted(shapes), like)
                return extended if is_invariant(extended) else found

            self._layouts[name] = self._searched(name, layouts, search)
        return self._layouts[name]

    def attention(
        self,
        name: str,
        layouts: Sequence[AttentionLayout],
        is_invariant: Callable[[AttentionLayout], bool],
        device: torch.device,
    ) -> AttentionLayout:
        """The layout of attention's products. It is kept as a row layout is, by its two numbers."""
        if not self.probes(device):
            return layouts[0]
        if name not in self._attention:
            tried = layouts if device.type == "cpu" else layouts[:1]

            def search() -> LayoutChoice:
                found = next(filter(is_invariant, tried), None)
                layout = found or layouts[0]
                return LayoutChoice(RowLayout(layout.rows, layout.part), found is not None)

            kept = self._found(name, search)
            self._attention[name] = AttentionLayout(kept.least, kept.block)
        return self._attention[name]

    def check(self, name: str, is_invariant: Callable[[], bool]) -> None:
        """Record whether a computation that has one layout only keeps the bits."""
        self._found(name, lambda: LayoutChoice(UNCHANGED, is_invariant()))

    def probes(self, device: torch.device) -> bool:
        """Whether products on the device are tried."""
        return self.promised and device.type in ("cpu", "cuda") and keeps_bits(device)

    def _searched(
        self, name: tuple[object, ...], layouts: Sequence[RowLayout], search: Callable[[], RowLayout | None]
    ) -> RowLayout:
        def choice() -> LayoutChoice:
            with torch.inference_mode():
                found = search()
            return LayoutChoice(found or layouts[0], found is not None)

        product = " ".join(map(str, name))
        layout = self._found(product, choice)
        if layout != layouts[0]:
            log.debug("exact bits", product=product, way=str(layout))
        return layout

    def _found(self, product: str, search: Callable[[], LayoutChoice]) -> RowLayout:
        choice = None if self._choices is None else self._choices.get(product)
        if choice is None:
            choice = search()
            if self._choices is not None:
                self._choices.add(product, choice)
        if not choice.invariant:
            self._break(product)
        return choice.layout

    def _break(self, name: str) -> None:
        self.broken.append(name)
        log.warning(
            "bits are not promised: on this CPU what a row gives depends on how many rows are computed beside it",
            product=name,
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _probe_tensors(inputs: int, outputs: int, like: Tensor, elements_max: int = _ELEMENTS_MAX) -> tuple[Tensor, Tensor]:
    """x (N, I) and w (O, I) whose products are 0, but for the rounding of partial sums.

    So the results show the order of additions and nothing else. With other numbers bfloat16 would round most
    differences away, and show them in one number of ten thousand.
    """
    rows = max(_COUNTS_LARGE[-1] + 1, min(_ROWS_MAX, elements_max // max(inputs, outputs)))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(inputs, generator=generator)
    halves = [torch.rand(count, inputs // 2, generator=generator).sub_(0.5) for count in (rows, outputs)]
    odd = [torch.zeros(count, inputs % 2) for count in (rows, outputs)]
    x_NI, w_OI = (
        torch.cat([half, sign * half, odd_column], dim=1)[:, order].to(like.device, like.dtype)
        for half, odd_column, sign in zip(halves, odd, (1, -1), strict=True)
    )
    return x_NI, w_OI


def _counts() -> list[int]:
    """Numbers of rows to try. A library gives each thread its part of few rows, so all of these may differ."""
    dense = range(1, _COUNTS_DENSE * torch.get_num_threads() + 2)
    return sorted({*_COUNTS, *(count for count in dense if count <= _COUNTS[-1])})


def _found_layout(layouts: Sequence[RowLayout], product: Product, x_NI: Tensor, outputs: int) -> RowLayout | None:
    """The first layout that keeps the bits; among blocks, on a CPU, the one whose larger ones make it the cheapest."""
    is_invariant = partial(_is_invariant, product=product, x_NI=x_NI, outputs=outputs)
    found = next(filter(is_invariant, layouts), None)
    if x_NI.device.type != "cpu":
        return found
    if found is None:
        return next(filter(is_invariant, _SIXES), None)
    if not found.block:
        return found
    others = filter(is_invariant, layouts[layouts.index(found) + 1 :])
    extended = [_extended(layout, product, x_NI) for layout in (found, *others)]
    return min(filter(is_invariant, extended), key=_typical_cost, default=found)


def _extended(layout: RowLayout, product: Product, x_NI: Tensor, sizes: Sequence[int] = _LARGER) -> RowLayout:
    """With the larger blocks, of these sizes, in which rows have the bits that they have in its own."""
    whole = layout(product, x_NI)

    def alike(size: int) -> bool:
        parts = ((rows[:size], rows[-size:]) for rows in (x_NI, whole))
        return all(torch.equal(product(x.clone()), y) for x, y in zip(*parts, strict=True))

    return replace(layout, larger=tuple(size for size in sizes if layout.block < size <= len(x_NI) and alike(size)))


def _extended_for_adapters(layout: RowLayout, shapes: Sequence[tuple[int, int]], like: Tensor) -> RowLayout:
    """With larger blocks for training and prefill; a decoding step has few rows of an adapter."""
    extended = replace(layout, larger=_LARGER)
    for inputs, outputs in shapes:
        x_NI, w_OI = _probe_tensors(inputs, outputs, like, _PROBE_ELEMENTS_MAX)
        extended = _extended(layout, partial(F.linear, weight=w_OI), x_NI, extended.larger)
    return extended


def _is_invariant(layout: RowLayout, product: Product, x_NI: Tensor, outputs: int) -> bool:
    """Whether some rows, anywhere, have the bits that they have among all."""
    whole = layout(product, x_NI)
    for count in _COUNTS_LARGE if x_NI.shape[1] * outputs > _LARGE else _counts():
        start = (7 * count) % max(1, len(whole) - count)
        if count < len(whole) and not torch.equal(
            layout(product, x_NI[start : start + count]), whole[start : start + count]
        ):
            return False
    return True


def adapters_product(layout: RowLayout, x_XMI: Tensor, w_XOI: Tensor) -> Tensor:
    """x w^T (X, M, O): blocks of rows, each with its own matrix."""
    if layout.alone:
        return torch.stack([F.linear(x_MI, w_OI) for x_MI, w_OI in zip(x_XMI, w_XOI, strict=True)])
    return torch.bmm(x_XMI, w_XOI.transpose(1, 2))


def _adapter_is_invariant(layout: RowLayout, shapes: Sequence[tuple[int, int]], like: Tensor) -> bool:
    """As training computes it (`F.linear`), and as decoding does: several adapters in one batch."""
    for inputs, outputs in shapes:
        x_NI, w_OI = _probe_tensors(inputs, outputs, like, _LARGE)

        def linear(x_NI: Tensor, w_OI: Tensor = w_OI) -> Tensor:
            return F.linear(x_NI, w_OI)

        if not _is_invariant(layout, linear, x_NI, outputs):
            return False
        whole = layout(linear, x_NI)
        for adapters, count in ((1, 1), (3, 1), (2, 9), (1, 64)):
            batch = x_NI[: adapters * count].view(adapters, count, inputs)
            padded = torch.stack([layout.padded(rows) for rows in batch])
            blocks = padded.view(-1, layout.block or padded.shape[1], inputs)
            products = adapters_product(layout, blocks, w_OI.expand(len(blocks), -1, -1))
            products = products.view(adapters, -1, outputs)[:, :count]
            if not torch.equal(products.reshape(-1, outputs), whole[: adapters * count]):
                return False
    return True
