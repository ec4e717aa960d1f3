"""A frozen linear, packed or not: right values and gradients, and bits that depend on nothing but the row."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.weights import load
from tests.engine.tiny import tiny_model

SHAPES = [  # SmolLM2-135M's linears and head, and tiny and odd ones
    (960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576), (192, 64), (300, 64), (40, 24), (23, 6),
]  # fmt: skip


# Where the CPU has no bfloat16 products they are emulated, and one of the head takes half a minute. The head costs as
# much as all the others: it is tried in one dtype on each number of threads.
EMULATED = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
CASES = [
    pytest.param(
        *shape, dtype, threads, marks=[pytest.mark.long] if slow else [], id=f"{shape[0]}-{shape[1]}-{name}-{threads}"
    )
    for shape in SHAPES
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    for threads in (1, 2)
    for alone in [(name, threads) in (("float32", 1), ("bfloat16", 2))]
    for slow in [shape[0] > 10_000 and (not alone or (EMULATED and name == "bfloat16"))]
]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cancelling(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and W whose products are nothing but the rounding of their sums: bfloat16 hides most of other differences."""
    halves = (random(count, inputs // 2, seed=seed) for seed, count in enumerate((rows, outputs)))
    x_NI, w_OI = (torch.cat([half, sign * half], dim=1).to(dtype) for half, sign in zip(halves, (1, -1), strict=True))
    return x_NI, w_OI


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("outputs", "inputs", "dtype", "threads_count"), CASES)
def test_a_row_has_the_same_bits_among_any_others(
    outputs: int, inputs: int, dtype: torch.dtype, threads_count: int
) -> None:
    torch.set_num_threads(threads_count)
    x_NI, w_OI = cancelling(300, outputs, inputs, dtype)
    linear = FrozenLinear([w_OI], dtype, random(outputs, seed=1).to(dtype))
    whole = linear(x_NI)
    for start, stop in ((0, 1), (17, 18), (3, 10), (0, 8), (20, 36), (41, 105), (1, 250)):
        assert torch.equal(linear(x_NI[start:stop]), whole[start:stop]), (start, stop)
    if inputs < 16:
        return  # narrower than any model: MKL may have no way then, and that is said
    grads_NO, _ = cancelling(300, 1, outputs - outputs % 2, dtype)
    grads_NO = torch.nn.functional.pad(grads_NO, (0, outputs % 2))
    back = linear.back([grads_NO])
    for start, stop in ((0, 1), (3, 10), (20, 36), (41, 105), (1, 250)):
        assert torch.equal(linear.back([grads_NO[start:stop]]), back[start:stop]), (start, stop)
    assert linear.exactness.broken == []


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_packed_in_float32_a_row_has_the_same_bits_on_any_threads(outputs: int, inputs: int) -> None:
    linear = FrozenLinear([random(outputs, inputs)], torch.float32, random(outputs, seed=1))
    x_NI = random(300, inputs, seed=2)
    torch.set_num_threads(1)
    alone = linear(x_NI)
    torch.set_num_threads(2)
    assert torch.equal(linear(x_NI), alone)


def test_on_a_cpu_a_model_is_packed_in_every_dtype_that_its_kernels_take(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    for dtype, packed in ((torch.float32, True), (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported())):
        weights = load(tmp_path, ModelConfig.read(tmp_path), dtype)
        linears = [each for layer in weights.layers for each in layer.linears if isinstance(each, FrozenLinear)]
        assert {each.packed for each in (*linears, weights.head)} == {packed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_those_of_the_stacked_weight(dtype: torch.dtype, pack: bool, biased: bool) -> None:
    parts = [random(rows, 48, seed=rows).to(dtype) for rows in (64, 16, 16)]
    bias = random(96, seed=5).to(dtype) if biased else None
    linear = FrozenLinear(parts, dtype, bias, pack=pack)
    x_NI, grad_NO = random(20, 48, seed=6).to(dtype).requires_grad_(), random(20, 96, seed=7).to(dtype)
    wanted = F.linear(x_NI, torch.cat(parts), bias)
    (wanted_grad,) = torch.autograd.grad(wanted, x_NI, grad_NO)
    close = {torch.float32: 1e-4, torch.bfloat16: 0.0, torch.float64: 0.0}[dtype]
    assert linear.widths == (64, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(linear(x_NI), wanted, rtol=0, atol=close)
        found_grad = linear.back(grad_NO.split(linear.widths, dim=1))
    torch.testing.assert_close(found_grad, wanted_grad, rtol=0, atol=close)


def test_a_file_in_bfloat16_is_computed_in_float32_as_if_it_had_been_converted() -> None:
    parts = [random(64, 32).bfloat16(), random(32, 32, seed=1).bfloat16()]
    linear, converted = FrozenLinear(parts, torch.float32), FrozenLinear([one.float() for one in parts], torch.float32)
    x_NI, grads = random(20, 32, seed=2), random(20, 96, seed=3).split([64, 32], dim=1)
    assert torch.equal(linear(x_NI), converted(x_NI))
    assert torch.equal(linear.back(grads), converted.back(grads))
    head = FrozenLinear(parts[:1], torch.float32)
    assert torch.equal(head.rows(torch.tensor([5, 2])), parts[0][[5, 2]].float())
    assert linear.nbytes == 96 * 32 * 4
