"""What a pass asks of a GPU, counted as torch dispatches it: kernels, copies, waits, float32 products, bytes held.

The meta device stands for the card. What lies below torch's Python is stubbed as a driver would do it: page-locked
memory is memory with a note on it, and a copy to the host gives numbers.
"""

import math
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import knapper

_ROOT: Final = str(Path(knapper.__file__).parent) + "/"
_GRAIN: Final = 512  # bytes: what torch's allocator rounds up to
_aten: Final = torch.ops.aten
_WITHOUT_KERNEL: Final = {
    "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided",
    "aten::lift_fresh", "aten::_unsafe_view", "aten::_reshape_alias", "prim::device", "aten::set_",
}  # fmt: skip
_UNDIVIDED: Final = {"aten::is_pinned", "aten::_pin_memory", "prim::device"}
_BY_VALUE: Final = {  # the host must know values to know a shape
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::equal", "aten::is_nonzero",
}  # fmt: skip


@dataclass
class Counts:
    """`kernels` by operator; `copies`: from page-locked memory. The others by the line of the engine that asks.

    `peak`: bytes of the card's tensors that were alive at once.
    """

    peak: int = 0
    copies: int = 0
    flops: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    mixed: Counter[str] = field(default_factory=Counter)
    pageable: Counter[str] = field(default_factory=Counter)
    float32_flops: Counter[str] = field(default_factory=Counter)

    @cached_property
    def launches(self) -> int:
        return self.kernels.total()


class Meter(TorchDispatchMode):
    """`held`: bytes of the card's tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the library has no types here
        self.held = 0
        self.counts = Counts()
        self._storages: dict[int, tuple[int, Any]] = {}
        self._pinned: set[int] = set()

    def begin(self) -> Counts:
        """Count anew. What is alive stays held."""
        self.counts = Counts(peak=self.held)
        return self.counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):  # inference mode does not take them apart before this
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name
        if name == "aten::is_pinned":
            return id(args[0].untyped_storage()) in self._pinned
        if name == "aten::_pin_memory":
            return self._pin(args[0])
        if name == "aten::_local_scalar_dense" and args[0].is_meta:
            self.counts.waits[f"item at {_line()}"] += 1
            return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1
        if func in (_aten._to_copy.default, _aten.copy_.default):
            to_host = self._copied(func, args, kwargs)
            if to_host is not None:
                return to_host
        outputs = func(*args, **kwargs)
        made = list(_tensors(outputs if isinstance(outputs, tuple | list) else (outputs,)))
        inputs = list(_tensors((*args, *kwargs.values())))
        if any(one.is_meta for one in (*inputs, *made)):
            self._hold(made)
            if not func.is_view and name not in _WITHOUT_KERNEL:
                self._count(func, name, inputs, (args, kwargs, outputs))
        return outputs

    def _pin(self, host: Tensor) -> Tensor:
        pinned = host.clone()
        storage = pinned.untyped_storage()
        self._pinned.add(id(storage))
        weakref.finalize(storage, self._pinned.discard, id(storage))
        return pinned

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Count a copy between host and card. Numbers, if it is to the host."""
        in_place = func is _aten.copy_.default
        source = args[1] if in_place else args[0]
        target = args[0].device if in_place else kwargs.get("device") or source.device
        if source.is_meta and target.type == "cpu":
            self.counts.waits[f"copy to the host at {_line()}"] += 1
            host = torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            return args[0].copy_(host) if in_place else host
        if not source.is_meta and target.type == "meta" and not (in_place and source.dim() == 0):
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            if non_blocking and id(source.untyped_storage()) in self._pinned:
                self.counts.copies += 1
            else:
                self.counts.pageable[_line()] += 1
        return None

    def _count(self, func: Any, name: str, inputs: list[Tensor], call: tuple[Any, Any, Any]) -> None:
        counts = self.counts
        counts.kernels[name.removeprefix("aten::")] += 1
        copies = name in ("aten::_to_copy", "aten::copy_")
        if not copies and any(not one.is_meta and one.dim() > 0 for one in inputs):
            counts.mixed[f"{name} at {_line()}"] += 1
        by_mask = name.startswith("aten::index") and any(one.dtype == torch.bool for one in inputs[1:])
        if name in _BY_VALUE or by_mask:
            counts.waits[f"{name} at {_line()}"] += 1
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            args, kwargs, outputs = call
            flops = formula(*args, **kwargs, out_val=outputs)
            counts.flops += flops
            if inputs[0].dtype == torch.float32:
                counts.float32_flops[_line()] += flops

    def _hold(self, made: list[Tensor]) -> None:
        for one in made:
            if not one.is_meta:
                continue
            storage = one.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if not size or key in self._storages:
                continue
            size = math.ceil(size / _GRAIN) * _GRAIN
            self._storages[key] = (size, weakref.ref(storage, partial(self._free, key)))
            self.held += size
            self.counts.peak = max(self.counts.peak, self.held)

    def _free(self, key: int, _: object) -> None:
        size, _ = self._storages.pop(key)
        self.held -= size


class MadeOnHost(TorchFunctionMode):
    """Counts tensors of the card that are made of Python's numbers: the meta device makes them without a copy."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], Tensor)
        on_card = made and torch.device(kwargs.get("device") or "cpu").type == "meta"
        on_card = on_card or (func is Tensor.new_tensor and args[0].is_meta)
        on_card = on_card or (func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta and _lists(args[1]))
        if on_card:
            self._meter.counts.pageable[_line()] += 1
        return func(*args, **kwargs)


def _lists(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(one, list) for one in index))


@cache
def _is_composite(func: Any) -> bool:
    return func.name() not in _UNDIVIDED and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _line() -> str:
    """The line of the engine nearest to torch that runs now."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_ROOT) and not path.endswith("transfer.py"):
            return f"{path.removeprefix(_ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of the engine"
