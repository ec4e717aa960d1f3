"""Which instruction sets this machine has, and in which of them models were computed, in which dtype: the last lines.

Every model that a test makes is noted as it is made, in this process or in a server's log; nothing is listed by hand.
oneDNN takes the newest set that the CPU has and ONEDNN_MAX_CPU_ISA allows, so a run tries one of them, unless a test
starts processes of its own with another: those it notes itself.
"""

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Final

VARIABLES: Final = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
DTYPES: Final = ("float32", "bfloat16")
# Oldest first: the name; torch's, in torch.cpu.get_capabilities(); what ONEDNN_MAX_CPU_ISA may be for no more than it.
SETS: Final = (
    ("avx2", "avx2", ("AVX2", "AVX2_VNNI", "AVX2_VNNI_2")),
    ("avx512", "avx512_f", ("AVX512_CORE", "AVX512_CORE_VNNI")),
    ("avx512_bf16", "avx512_bf16", ("AVX512_CORE_BF16", "AVX512_CORE_FP16")),
    ("amx_bf16", "amx_bf16", ("AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16", "AVX10_1_512_AMX", "AVX10_1_512_AMX_FP16")),
)
LOADED: Final = re.compile(r"engine: loaded model=.* device='(?P<device>\w+) .*? dtype='(?P<dtype>\w+)'")
Tried = tuple[str, str]  # the dtype, and in what

_tried: set[Tried] = set()


@dataclass
class Seen:
    """What one process knows, or all of a run."""

    cpu: str = ""
    sets: list[str] = field(default_factory=list)
    devices: list[str] = field(default_factory=list)  # besides the CPU
    tried: set[Tried] = field(default_factory=set)

    def sent(self) -> dict[str, Any]:
        """As xdist carries it."""
        return {"cpu": self.cpu, "sets": self.sets, "devices": self.devices, "tried": sorted(map(list, self.tried))}

    def add(self, sent: Mapping[str, Any]) -> None:
        self.cpu, self.sets, self.devices = sent["cpu"] or self.cpu, sent["sets"] or self.sets, sent["devices"]
        self.tried |= {(dtype, where) for dtype, where in sent["tried"]}


def note(dtype: str, device: str = "cpu", environment: Mapping[str, str] = os.environ) -> None:
    """A model of this dtype was made, by a process with these variables."""
    import torch

    where = device if device != "cpu" else newest(usable(torch.cpu.get_capabilities(), environment))
    _tried.add((dtype.removeprefix("torch."), where))


def note_log(log: str) -> None:
    """What an engine with this process's variables says that it loaded."""
    for loaded in LOADED.finditer(log):
        note(loaded["dtype"], loaded["device"])


def watch() -> None:
    """From now on every model that is made is noted. Nothing, in a process that has no engine."""
    for module, name in (
        ("knapper.engine.models.decoder", "Decoder"),
        ("knapper.engine.models.transformers", "TransformersModel"),
    ):
        made = getattr(sys.modules.get(module), name, None)
        if made is not None and not hasattr(made.__init__, "__wrapped__"):
            made.__init__ = _noting(made.__init__)


def _noting(made: Callable[..., None]) -> Callable[..., None]:
    @wraps(made)
    def noting(self: Any, *given: Any, **named: Any) -> None:
        made(self, *given, **named)
        note(str(self.dtype), self.device.type)

    return noting


def seen() -> Seen:
    """By this process; nothing of a machine that it never asked."""
    if (torch := sys.modules.get("torch")) is None:
        return Seen()
    able = torch.cpu.get_capabilities()
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return Seen(
        cpu=str(able.get("cpu_name") or platform.machine()),
        sets=usable(able, {}),
        devices=[device for device, here in there.items() if here],
        tried=set(_tried),
    )


def usable(able: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """Those that the CPU has and oneDNN may use, oldest first."""
    has = [name for name, torchs, _ in SETS if able.get(torchs)]
    limit = environment.get("ONEDNN_MAX_CPU_ISA", "").upper()
    for at, (_, _, limits) in enumerate(SETS):
        if limit in limits:
            return [name for name in has if name in [each[0] for each in SETS[: at + 1]]]
    return has


def newest(sets: list[str]) -> str:
    return sets[-1] if sets else platform.machine()


def lines(run: Seen, environment: Mapping[str, str]) -> Iterable[str]:
    """The last lines of a run."""
    if not run.cpu:
        yield "no test that ran computes with a model"
        return
    yield f"this machine: {run.cpu}: {', '.join(run.sets) or 'none that oneDNN tells apart'}"
    if given := [f"{name}={environment[name]}" for name in VARIABLES if environment.get(name)]:
        yield f"set: {', '.join(given)}"
    yield "tried: " + (", ".join(f"{dtype} in {where}" for dtype, where in sorted(run.tried)) or "nothing")
    for name, _, limits in SETS:
        missing = [dtype for dtype in DTYPES if (dtype, name) not in run.tried]
        if missing and name not in run.sets:
            yield f"not tried here: {' and '.join(missing)} in {name}: this CPU has none"
        elif missing:
            yield f"not tried: {' and '.join(missing)} in {name}: ONEDNN_MAX_CPU_ISA={limits[0]} does"
    for device in ("cuda", "mps"):
        if device not in run.devices:
            yield f"not tried here: {device}: torch finds no such device"
        elif not any(where == device for _, where in run.tried):
            yield f"not tried: {device}: no test that ran computes on it"
