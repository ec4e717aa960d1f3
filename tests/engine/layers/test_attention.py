"""Windows, caps and scales of scores: values and gradients are those of the plain formula, however computed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers import batch_invariant_attention, varlen_attention
from knapper.engine.layers.attention import PackedAttention, _mask
from knapper.engine.layers.varlen_attention import VarlenReference
from knapper.engine.models.layer import ScoreRule
from tests.engine.gate.models import META

RULES = [
    ScoreRule(0.3),
    ScoreRule(0.3, window=1),
    ScoreRule(0.3, window=16),
    ScoreRule(0.3, window=70),
    ScoreRule(0.3, window=1000),
    ScoreRule(0.3, cap=2.0),
    ScoreRule(0.3, window=70, cap=2.0),
]


def formula(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, *, rule: ScoreRule) -> Tensor:
    """(T, H, D), row by row."""
    rows = []
    for row in range(len(q_THD)):
        first = 0 if rule.window is None else max(0, row + 1 - rule.window)
        k, v = (x[first : row + 1].repeat_interleave(2, dim=1) for x in (k_TGD, v_TGD))
        scores = torch.einsum("hd,chd->hc", q_THD[row], k) * rule.scale
        scores = scores if rule.cap is None else rule.cap * torch.tanh(scores / rule.cap)
        rows.append(torch.einsum("hc,chd->hd", scores.softmax(-1), v))
    return torch.stack(rows)


def tensors(dtype: torch.dtype, tokens: int = 150) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, n, 8, generator=generator).to(dtype).requires_grad_() for n in (4, 2, 2)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_values_and_gradients_are_those_of_the_formula(rule: ScoreRule) -> None:
    ours, plain = tensors(torch.float32), tensors(torch.float64)
    grad = torch.randn(150, 4, 8, generator=torch.Generator().manual_seed(1))
    found = batch_invariant_attention.causal(*(x[None] for x in ours), scores=rule)[0]
    wanted = formula(*plain, rule=rule)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
    gradients = zip(
        torch.autograd.grad(found, ours, grad), torch.autograd.grad(wanted, plain, grad.double()), strict=True
    )
    for one, other in gradients:
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.cap is None], ids=str)
def test_the_mask_of_other_devices_hides_the_same_keys(rule: ScoreRule) -> None:
    """Of a whole text, and of the rest of one whose first tokens are cached."""
    q, k, v = (x.detach()[None] for x in tensors(torch.float32))
    whole = batch_invariant_attention.causal(q, k, v, scores=rule)
    for past in (0, 90):
        mask = _mask(150 - past, 150, rule.window, q.device)
        rest = F.scaled_dot_product_attention(
            q[:, past:].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=mask is None,
            scale=rule.scale, enable_gqa=True,
        )  # fmt: skip
        torch.testing.assert_close(rest.transpose(1, 2), whole[:, past:], atol=1e-5, rtol=1e-5)


def test_caps_have_shapes_on_a_device_without_a_kernel_for_them() -> None:
    q, k, v = (torch.empty(2, 150, heads, 8, device=META, requires_grad=True) for heads in (4, 2, 2))
    found = batch_invariant_attention.causal(q, k, v, scores=ScoreRule(0.3, window=70, cap=2.0))
    assert found.shape == q.shape
    assert [x.shape for x in torch.autograd.grad(found.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("window", [None, 7])
def test_the_reference_of_the_kernel_for_packed_rows_is_what_a_cpu_computes(window: int | None) -> None:
    lengths, rule = [5, 64, 1, 20], ScoreRule(0.3, window)
    q, k, v = (torch.randn(sum(lengths), heads, 16) for heads in (4, 2, 2))
    packed = PackedAttention(lengths)(0, q, k, v, scores=rule)
    assert torch.equal(VarlenReference(lengths, lengths)(q, k, v, rule).flatten(1), packed)
    rest = VarlenReference([20], [64])(q[:20], k[:64], v[:64], rule)  # the last rows of a text, its keys before them
    whole = VarlenReference([64], [64])(torch.cat([q[20:64], q[:20]]), k[:64], v[:64], rule)
    assert torch.equal(rest, whole[44:])


def test_the_kernel_is_told_of_grouped_queries_if_this_torch_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    def of_2_11(*_: object, scale: float, window_size: tuple[int, int]) -> None:
        seen.append({"scale": scale, "window_size": window_size})

    def of_2_13(*_: object, scale: float, window_size: tuple[int, int], enable_gqa: bool = False) -> None:
        seen.append({"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa})

    for kernel in (of_2_11, of_2_13):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        varlen_attention._kernel.cache_clear()
        varlen_attention._kernel()(1, 2, 3, scale=0.5, window_size=(-1, 0))
    varlen_attention._kernel.cache_clear()
    assert "enable_gqa" not in seen[0]
    assert seen[1]["enable_gqa"] is True
