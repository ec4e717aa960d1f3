"""What the machine has: the peaks that shares are of, as this card reaches them; and the engine's start by stage."""

import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.figures import Figure
from benchmarks.gpu.rig import Rig, texts
from knapper.observability import metrics


def described(device: torch.device) -> dict[str, object]:
    """For the header of the results."""
    cuda = device.type == "cuda"
    return {
        "card": torch.cuda.get_device_name(device) if cuda else "none: the CPU",
        "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1) if cuda else None,
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "peft", "triton", "numpy")},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def start(rig: Rig) -> Iterator[Figure]:
    """The engine's start by stage, then the first pass and the first step, whose kernels are loaded then."""
    before_s = metrics.process_age_s() or 0.0
    rig.prepare()  # its model's directory is made before, and counts for nothing
    began = time.perf_counter()
    with rig.peak() as peak:
        engine = rig.engine
        whole_s = time.perf_counter() - began
        note = f"{engine.account.described()}; {peak()}"
    stages = metrics.stages()
    yield _stage("Python, imports, and the card's first use", before_s)
    yield _stage("weights to the device, and the account of memory", stages.get("weights", 0.0), _source(rig))
    yield _stage("the whole engine", whole_s, note)
    state, data = rig.state(), texts(rig.sizes.packed[:1], 0)
    for name in ("the first training step", "the same again"):
        yield _stage(name, rig.seconds(lambda: rig.step([state], [data])))


def _source(rig: Rig) -> str:
    return "" if rig.sizes.stored else "from a file that is all hole: no disk is read"


def _stage(name: str, took_s: float, note: str = "") -> Figure:
    return Figure("cold start", name, took_s, None, "s", note=note)


def peaks(rig: Rig) -> Iterator[Figure]:
    """A large matrix product, a copy within the card, and one to it from page-locked memory; all of random numbers."""
    device, width = rig.device_now, rig.sizes.product
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    took_s = rig.median_s(lambda: [torch.mm(a, b) for _ in range(10)]) / 10
    yield Figure("peaks", f"a product of {width:,} by {width:,}, {dtype}", 2e-12 * width**3 / took_s, None, "TFLOP/s")
    source = torch.randn(width, width // 2, 8, device=device, dtype=dtype)
    took_s = rig.median_s(lambda: [source.clone() for _ in range(10)]) / 10
    yield Figure("peaks", "a copy within the card, read and written", 2e-9 * source.nbytes / took_s, None, "GB/s")
    host = torch.randn(width, width)
    host = host.pin_memory() if device.type == "cuda" else host
    took_s = rig.median_s(lambda: host.to(device, copy=True))
    yield Figure("peaks", "a copy to the card, from page-locked memory", 1e-9 * host.nbytes / took_s, None, "GB/s")
