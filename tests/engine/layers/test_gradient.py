"""A backward pass from a given gradient: the bits of torch's own, without its half second of imports."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from knapper.engine.layers import gradient
from tests.engine.tiny import tiny_model


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


STEP = """
import sys
from pathlib import Path
import numpy as np
from knapper.engine.models.loader import load
from knapper.engine.training.trainer import Trainer
from knapper.state.journal.records import Spec
from knapper.wire.types import Datum, ForwardBackward

spec = Spec(
    run="r", tenant="t", base_model="", rank=4, alpha=8.0, seed=1, train_attn=True, train_mlp=True, train_unembed=True
)
inputs = {"target_tokens": np.arange(1, 9, dtype=np.int64), "weights": np.ones(8, np.float32)}
request = ForwardBackward("r", 1, [Datum(np.arange(8, dtype=np.int32), inputs)], "cross_entropy", {}, False)
trainer = Trainer(load(Path(sys.argv[1])))
work = trainer.forward_backward(trainer.create(spec), request)
try:
    while True:
        next(work)
except StopIteration as end:
    assert end.value[0].grads_P.abs().sum() > 0
print([name for name in ("sympy", "mpmath", "torch._dynamo", "torch._inductor", "transformers") if name in sys.modules])
"""


def test_a_training_step_imports_nothing_that_only_compilers_need(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STEP, str(tiny_model(tmp_path / "model"))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.stdout.strip().splitlines()[-1:] == ["[]"], ran.stderr
