"""A backward pass from a given gradient: the bits of torch's own, without its half second of imports."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from knapper.engine.layers import gradient


def graph(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A leaf, an output that depends on it twice, and the output's gradient, with every kind of number."""
    generator = torch.Generator().manual_seed(7)
    leaf = torch.randn(5, 3, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(5, 3, generator=generator).to(dtype)
    grad[0] = torch.tensor([0.0, -0.0, float("inf")], dtype=dtype)
    return leaf, leaf.exp() * 3 + leaf.flip(0), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_are_those_of_torch_to_the_last_bit(dtype: torch.dtype) -> None:
    (ours, output, grad), (theirs, same, _) = graph(dtype), graph(dtype)
    gradient.backward(output, grad)
    torch.autograd.backward(same, grad)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad.view(torch.uint8), theirs.grad.view(torch.uint8))


def test_a_gradient_of_another_shape_is_a_defect_of_the_caller() -> None:
    _, output, _ = graph(torch.float32)
    with pytest.raises(AssertionError, match=r"a gradient of \[3\] for \[5, 3\]"):
        gradient.backward(output, torch.ones(3))


def test_a_training_step_imports_nothing_that_only_compilers_need() -> None:
    code = (
        "import sys, tempfile; from pathlib import Path; from tests.engine.tiny import tiny_model; "
        "from benchmarks.check import computed; computed(tiny_model(Path(tempfile.mkdtemp()) / 'model')); "
        "print([name for name in ('sympy', 'mpmath', 'torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip().splitlines()[-1] == "[]"
