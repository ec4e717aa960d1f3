"""Each kernel of the engine beside its reference on the CPU: the largest difference, relative to the largest result."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.figures import Figure
from benchmarks.gpu.rig import Rig
from knapper.engine.layers import lora_on_gpu, varlen_attention
from knapper.engine.layers.varlen_attention import VarlenAttention, VarlenReference
from knapper.engine.models.blocks import RmsNorm
from knapper.engine.models.layer import ScoreRule

_SECTION = "kernels against their references"
_NEARNESS = 0.03  # of bfloat16
_LENGTHS = [5, 64, 200, 1, 129]


def measure(rig: Rig) -> Iterator[Figure]:
    """Raises AssertionError for a kernel that computes something else."""
    device = rig.device_now
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    yield from _attention(device, dtype)
    yield from _grouped(device)
    yield from _norm(device, dtype)


def _attention(device: torch.device, dtype: torch.dtype) -> Iterator[Figure]:
    """Forward and backward, a window, and the rest of a text after a cached beginning."""
    cases = (
        ("packed", _LENGTHS, None),
        ("a window of 40", _LENGTHS, 40),
        ("after 100 cached", [n + 100 for n in _LENGTHS], None),
    )
    for name, keys, window in cases:
        q, k, v = (_random(sum(lengths), heads, 64) for lengths, heads in ((_LENGTHS, 8), (keys, 2), (keys, 2)))
        scores = ScoreRule(0.125, window)
        ours = [x.to(device, dtype).requires_grad_(keys == _LENGTHS) for x in (q, k, v)]
        theirs = [x.to(dtype).float().requires_grad_(keys == _LENGTHS) for x in (q, k, v)]
        kernel = VarlenAttention if varlen_attention.computes(ours[0], scores) else VarlenReference
        found = kernel(_LENGTHS, keys)(ours[0], ours[1], ours[2], scores)
        true = VarlenReference(_LENGTHS, keys)(theirs[0], theirs[1], theirs[2], scores)
        gaps = [_gap(found, true)]
        if keys == _LENGTHS:
            weight = _random(*true.shape)
            for output, to in ((found, device), (true, "cpu")):
                (output * weight.to(to, output.dtype)).sum().backward()
            gaps += [_gap(x.grad, y.grad) for x, y in zip(ours, theirs, strict=True)]
        yield _figure(f"attention, {name} ({kernel.__name__})", max(gaps))


def _grouped(device: torch.device) -> Iterator[Figure]:
    if not lora_on_gpu.groups(device):
        yield Figure(
            _SECTION, "grouped products of adapters", 0.0, None, "", note="not on this card: one after another"
        )
        return
    ends = torch.tensor([100, 100, 180, 399], dtype=torch.int32)
    x, g, w = (_random(*shape).to(torch.bfloat16) for shape in ((399, 256), (399, 64), (4, 256, 64)))
    on = [each.to(device) for each in (x, g, w, ends)]
    yield _figure(
        "grouped products, rows", _gap(lora_on_gpu.rows(on[0], on[2], on[3]), lora_on_gpu.rows_reference(x, w, ends))
    )
    yield _figure(
        "grouped products, sums", _gap(lora_on_gpu.sums(on[1], on[0], on[3]), lora_on_gpu.sums_reference(g, x, ends))
    )


def _norm(device: torch.device, dtype: torch.dtype) -> Iterator[Figure]:
    x, weight = _random(50, 256).to(dtype), _random(256).to(dtype)
    found, true = RmsNorm(weight.to(device), 1e-6)(x.to(device)), RmsNorm(weight, 1e-6)(x)
    yield _figure("RMS norm", _gap(found, true))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _gap(found: Tensor | None, true: Tensor | None) -> float:
    assert found is not None
    assert true is not None
    return float((found.detach().float().cpu() - true.detach().float()).abs().max() / true.detach().float().abs().max())


def _figure(name: str, gap: float) -> Figure:
    assert gap < _NEARNESS, f"{name}: {gap:.3g} of the largest result away from the reference"
    return Figure(_SECTION, name, gap, None, "", goal=f"< {_NEARNESS:g}")
