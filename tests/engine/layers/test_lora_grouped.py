"""A linear with adapters on its rows: the values and gradients that autograd finds for the formula."""

import pytest
import torch
from torch import Tensor

from knapper.engine.layers import adapters as adapters_module
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_gathered import GatheredLora, Stack
from knapper.engine.layers.lora_grouped import Segment, Segments

NAMES, WIDTHS, INPUTS, ROWS = ("q", "k", "v"), (40, 24, 24), 32, 50
# Whole and with a part missing; ranks that are padded, and one that is not; a row alone.
ADAPTERS = {
    "all": ({"q": 40, "k": 24, "v": 24}, 5, 0.5),
    "two": ({"q": 40, "v": 24}, 16, 2.0),
    "one": ({"k": 24}, 3, 1.0),
}
SPANS = {"all": (4, 20), "two": (20, 21), "one": (30, 45)}


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def adapters(dtype: torch.dtype = torch.float64) -> dict[str, Lora]:
    return {
        name: Lora(
            {target: random(rank, INPUTS, seed=rank, dtype=dtype).requires_grad_() for target in lora_targets},
            {
                target: random(WIDTHS[NAMES.index(target)], rank, seed=rank + 1, dtype=dtype).requires_grad_()
                for target in lora_targets
            },
            scale,
        )
        for name, (lora_targets, rank, scale) in ADAPTERS.items()
    }


def leaves(loras: dict[str, Lora]) -> list[Tensor]:
    return [matrix for lora in loras.values() for side in (lora.a, lora.b) for matrix in side.values()]


def segments(loras: dict[str, Lora]) -> Segments:
    return Segments([Segment(*SPANS[name], lora) for name, lora in loras.items()] + [Segment(45, ROWS, None)])


def formula(x_NI: Tensor, linear_OI: Tensor, loras: dict[str, Lora]) -> list[Tensor]:
    outputs = []
    for name, y_NO in zip(NAMES, (x_NI @ linear_OI.T).split(WIDTHS, dim=1), strict=True):
        for which, lora in loras.items():
            if name in lora.a:
                own = torch.zeros(ROWS, 1, dtype=y_NO.dtype)
                own[slice(*SPANS[which])] = lora.scale
                y_NO = y_NO + own * (x_NI @ lora.a[name].T) @ lora.b[name].T
        outputs.append(y_NO)
    return outputs


@pytest.mark.parametrize("goes_on", [True, False])
def test_values_and_gradients_are_those_of_the_formula(goes_on: bool) -> None:
    """`goes_on`: there is something to differentiate before the linear; of the first layer's there is not."""
    weight_OI = random(sum(WIDTHS), INPUTS, seed=1)
    x_NI, weigh = random(ROWS, INPUTS, seed=2).requires_grad_(goes_on), random(ROWS, sum(WIDTHS), seed=3)
    loras = adapters()
    wanted = torch.cat(formula(x_NI, weight_OI, loras), dim=1)
    linear = FrozenLinear(weight_OI.split(WIDTHS), torch.float64)
    outputs = torch.cat(segments(loras)(NAMES, x_NI, linear), dim=1)
    torch.testing.assert_close(outputs, wanted, rtol=0, atol=1e-12)
    wanted_grads = [*leaves(loras), *([x_NI] if goes_on else [])]
    for found_grad, wanted_grad in zip(
        torch.autograd.grad(outputs, wanted_grads, weigh), torch.autograd.grad(wanted, wanted_grads, weigh), strict=True
    ):
        torch.testing.assert_close(found_grad, wanted_grad, rtol=0, atol=1e-11)


def test_without_adapters_a_gradient_goes_through_all_the_same() -> None:
    weight_OI, x_NI = random(sum(WIDTHS), INPUTS, seed=1), random(ROWS, INPUTS, seed=2).requires_grad_()
    linear, weigh = FrozenLinear(weight_OI.split(WIDTHS), torch.float64), random(ROWS, sum(WIDTHS), seed=3)
    torch.cat(Segments([])(NAMES, x_NI, linear), dim=1).backward(weigh)
    torch.testing.assert_close(x_NI.grad, weigh @ weight_OI, rtol=0, atol=1e-12)


@pytest.fixture(params=[False, True], ids=["adapters in float32", "adapters rounded"])
def rounds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """As on a CPU that multiplies bfloat16 many times as fast, and as on one that does not."""
    rounds: bool = request.param
    monkeypatch.setattr(adapters_module, "multiplies_bfloat16", lambda: rounds)
    return rounds


def test_of_a_base_in_bfloat16_adapters_are_rounded_for_products_at_most(rounds: bool) -> None:
    weight_OI = random(sum(WIDTHS), INPUTS, seed=1).bfloat16()
    x_NI, loras = random(ROWS, INPUTS, seed=2).bfloat16().requires_grad_(), adapters(torch.float32)
    outputs = segments(loras)(NAMES, x_NI, FrozenLinear(weight_OI.split(WIDTHS), torch.bfloat16))
    wanted = formula(x_NI.float(), torch.zeros(sum(WIDTHS), INPUTS), loras)
    plain = (x_NI @ weight_OI.T).split(WIDTHS, dim=1)
    for part, y_NO, delta_NO in zip(outputs, plain, wanted, strict=True):
        near = 2**-8 * float(delta_NO.detach().abs().max()) if rounds else 1e-5
        torch.testing.assert_close(part, (y_NO + delta_NO).bfloat16(), rtol=2**-7, atol=near)
    of_formula = torch.autograd.grad(wanted, leaves(loras), [torch.ones_like(part) for part in wanted])
    torch.autograd.backward(outputs, [torch.ones_like(part) for part in outputs])
    assert x_NI.grad is not None
    assert x_NI.grad.dtype == torch.bfloat16
    for leaf, wanted_grad in zip(leaves(loras), of_formula, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        rounded = 2**-7 if rounds else 2**-20
        torch.testing.assert_close(leaf.grad, wanted_grad, rtol=0, atol=rounded * float(wanted_grad.abs().max()))


def test_a_decoding_row_has_the_bits_that_it_has_in_training(rounds: bool) -> None:
    assert isinstance(rounds, bool)
    weight_OI = random(sum(WIDTHS), INPUTS, seed=1).bfloat16()
    x_NI, loras = random(ROWS, INPUTS, seed=2).bfloat16(), adapters(torch.float32)
    linear = FrozenLinear(weight_OI.split(WIDTHS), torch.bfloat16)
    row_loras = [
        next((loras[name] for name, span in SPANS.items() if row in range(*span)), None) for row in range(ROWS)
    ]
    with torch.inference_mode():
        decoded = GatheredLora(Stack(list(loras.values())), row_loras, torch.device("cpu"))(NAMES, x_NI, linear)
        trained = segments(loras)(NAMES, x_NI, linear)
    assert linear.exactness.broken == []
    for decoded_part, trained_part in zip(decoded, trained, strict=True):
        assert torch.equal(decoded_part, trained_part)


@pytest.mark.parametrize(
    ("limit", "allows"),
    [("", True), ("DEFAULT", True), ("AVX512_CORE_AMX", True), ("AVX512_CORE_BF16", False), ("avx2", False)],
)
def test_amx_is_counted_on_only_where_onednn_may_use_it(
    monkeypatch: pytest.MonkeyPatch, limit: str, *, allows: bool
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert adapters_module.multiplies_bfloat16.__wrapped__() is allows
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    assert not adapters_module.multiplies_bfloat16.__wrapped__()
