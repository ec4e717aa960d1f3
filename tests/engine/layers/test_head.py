"""Log-probabilities of chosen tokens and their gradients equal those of log_softmax over all logits."""

import pytest
import torch
from torch import Tensor

from knapper.engine.layers import head
from knapper.engine.layers.head import HeadLora, logits, target_logprobs
from knapper.engine.layers.linear import FrozenLinear

ROWS, HIDDEN, VOCABULARY, RANK = 37, 6, 23, 3


def draw(columns: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, HeadLora]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    shape = (ROWS, columns) if columns else (ROWS,)
    targets = torch.randint(VOCABULARY, shape, generator=generator)
    lora = HeadLora(normal(RANK, HIDDEN).requires_grad_(), normal(VOCABULARY, RANK).requires_grad_(), 0.7)
    return normal(ROWS, HIDDEN).requires_grad_(), normal(VOCABULARY, HIDDEN), targets, lora


def frozen(head_VH: Tensor) -> FrozenLinear:
    return FrozenLinear([head_VH], head_VH.dtype)


def plain(hidden_NH: Tensor, head_VH: Tensor, targets: Tensor, lora: HeadLora | None) -> Tensor:
    all_NV = hidden_NH @ head_VH.T
    if lora is not None:
        all_NV = all_NV + lora.scale * hidden_NH @ lora.a.T @ lora.b.T
    logprobs = torch.log_softmax(all_NV, dim=-1).gather(1, targets if targets.dim() == 2 else targets[:, None])
    return logprobs if targets.dim() == 2 else logprobs[:, 0]


@pytest.fixture(params=[head.ELEMENTS_MAX, 1], ids=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "ELEMENTS_MAX", request.param)  # many: chunks of ROWS_MIN rows, the last one shorter


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("columns", [0, 1, 4])
@pytest.mark.parametrize("adapted", [False, True])
def test_values_and_gradients_equal_log_softmax(columns: int, adapted: bool) -> None:
    hidden_NH, head_VH, targets, lora = draw(columns)
    head_lora = lora if adapted else None
    logprobs, wanted = (
        target_logprobs(hidden_NH, frozen(head_VH), targets, head_lora),
        plain(hidden_NH, head_VH, targets, head_lora),
    )
    torch.testing.assert_close(logprobs, wanted, rtol=1e-12, atol=1e-12)
    assert logprobs.shape == targets.shape
    factor = torch.randn(logprobs.shape, dtype=logprobs.dtype, generator=torch.Generator().manual_seed(4))
    leaves = [hidden_NH, lora.a, lora.b] if adapted else [hidden_NH]
    for own_grad, plain_grad in zip(
        torch.autograd.grad((logprobs * factor).sum(), leaves),
        torch.autograd.grad((wanted * factor).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(own_grad, plain_grad, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("columns", [0, 2])
def test_gradcheck(columns: int) -> None:
    hidden_NH, head_VH, targets, lora = draw(columns)
    assert torch.autograd.gradcheck(lambda h: target_logprobs(h, frozen(head_VH), targets), (hidden_NH,))
    assert torch.autograd.gradcheck(
        lambda h, a, b: target_logprobs(h, frozen(head_VH), targets, HeadLora(a, b, 0.7)), (hidden_NH, lora.a, lora.b)
    )


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("adapted", [False, True])
def test_rows_that_need_no_gradient_change_nothing_for_the_others(adapted: bool) -> None:
    hidden_NH, head_VH, targets, lora = draw(2)
    needed_N = torch.arange(ROWS) % 3 != 0
    needed_N[:16] = False  # a whole chunk, where there are many
    head_lora = lora if adapted else None
    leaves = [hidden_NH, lora.a, lora.b] if adapted else [hidden_NH]
    factor = needed_N[:, None] * torch.linspace(-1, 2, ROWS * 2, dtype=torch.float64).view(ROWS, 2)
    logprobs = target_logprobs(hidden_NH, frozen(head_VH), targets, head_lora, needed_N.numpy())
    everywhere = target_logprobs(hidden_NH, frozen(head_VH), targets, head_lora)
    assert torch.equal(logprobs, everywhere)
    for sparse, whole in zip(
        torch.autograd.grad((logprobs * factor).sum(), leaves),
        torch.autograd.grad((everywhere * factor).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(sparse, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_broken_promise_of_no_gradient_is_an_error(adapted: bool) -> None:
    hidden_NH, head_VH, targets, lora = draw()
    needed_N = torch.arange(ROWS) != 5
    logprobs = target_logprobs(hidden_NH, frozen(head_VH), targets, lora if adapted else None, needed_N.numpy())
    with pytest.raises(AssertionError, match="promised"):
        logprobs.sum().backward()


def test_large_logits_stay_finite_in_float32() -> None:
    hidden_NH, head_VH, targets, _ = draw(dtype=torch.float32)
    hidden_NH = (hidden_NH.detach() * 1e4).requires_grad_()
    logprobs = target_logprobs(hidden_NH, frozen(head_VH), targets)
    torch.testing.assert_close(logprobs, plain(hidden_NH, head_VH, targets, None), rtol=1e-5, atol=0.1)
    (grad,) = torch.autograd.grad(logprobs.sum(), hidden_NH)
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(grad).all()


def test_bfloat16_weights_give_float32_log_probabilities() -> None:
    hidden_NH, head_VH, targets, lora = draw(dtype=torch.float32)
    half, half_head = hidden_NH.detach().bfloat16().requires_grad_(), head_VH.bfloat16()
    logprobs = target_logprobs(half, frozen(half_head), targets, lora)
    wanted = plain(half.float(), half_head.float(), targets, lora)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, wanted, rtol=0, atol=0.15)  # logits above 16 are an eighth apart
    leaves = (half, lora.a, lora.b)
    for own_grad, plain_grad in zip(
        torch.autograd.grad(logprobs.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
    ):
        assert own_grad.dtype == plain_grad.dtype
        torch.testing.assert_close(own_grad, plain_grad, rtol=0.05, atol=0.3)


def test_a_row_of_logits_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_NH, head_VH = torch.randn(40, 64, generator=generator), torch.randn(300, 64, generator=generator)
    linear = frozen(head_VH)
    whole = logits(hidden_NH, linear)
    for start, stop in ((0, 1), (3, 5), (7, 16), (20, 40)):
        assert torch.equal(logits(hidden_NH[start:stop], linear), whole[start:stop])
