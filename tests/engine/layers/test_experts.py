"""Experts: one by one or in groups the same, a row by itself or among others too, and a pair of each in every file."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from knapper.engine import checkpoint_format
from knapper.engine.layers.attention import PackedAttention
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.experts import ExpertLinears, by_groups, by_loop
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_grouped import Segment, Segments
from knapper.engine.layers.routing import Dispatch, combined, routed, spread
from knapper.engine.models import weights
from knapper.engine.models.blocks import PassRows
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.mlp import Routing
from tests.engine.gate.meter import Meter
from tests.engine.runs import spec, tiny_trainer
from tests.engine.strange import strange_model

EXPERTS, ACTIVE, HIDDEN, WIDTH, ROWS = 6, 3, 64, 48, 40
NAMES = ("layers.0.experts.gate_proj", "layers.0.experts.up_proj")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linears(dtype: torch.dtype = torch.float32) -> ExpertLinears:
    parts = [[random(WIDTH, HIDDEN, seed=2 * expert + part) * 0.2 for part in range(2)] for expert in range(EXPERTS)]
    made = ExpertLinears(parts, dtype, Exactness())
    made.w_EOI = torch.stack([torch.cat(own).to(dtype) for own in parts])  # on a CPU only `by_groups` here needs it
    return made


def lora(rank: int, *, only: int = 2, seed: int = 50) -> Lora:
    a = {name: random(EXPERTS, rank, HIDDEN, seed=seed + n) for n, name in enumerate(NAMES[:only])}
    b = {name: random(EXPERTS, WIDTH, rank, seed=seed + 9 + n) for n, name in enumerate(NAMES[:only])}
    return Lora(a, b, 0.5)


def dispatch(logits_NE: Tensor, numbers_N: Tensor, adapters: int) -> tuple[Tensor, Dispatch]:
    weights_NK, experts_NK = routed(logits_NE, Routing(EXPERTS, ACTIVE, renormalised=True))
    return weights_NK, Dispatch.of(experts_NK, EXPERTS, numbers_N, adapters)


def plain(
    x_NH: Tensor, linears: ExpertLinears, weights_NK: Tensor, choice: Tensor, of_row: list[Lora | None]
) -> Tensor:
    """The sum over a row's experts, row by row: gate and up side by side."""
    rows = []
    for row, x_H in enumerate(x_NH):
        total = torch.zeros(2 * WIDTH)
        for weight, expert in zip(weights_NK[row], choice[row].tolist(), strict=True):
            y = linears.w_EOI[expert].float() @ x_H
            adapter = of_row[row]
            if adapter is not None:
                deltas = [
                    adapter.scale * adapter.b[name][expert] @ (adapter.a[name][expert] @ x_H)
                    if name in adapter.a
                    else torch.zeros(WIDTH)
                    for name in NAMES
                ]
                y = y + torch.cat(deltas)
            total = total + weight * y
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("compute", [by_loop, by_groups])
def test_values_and_gradients_are_those_of_each_row_by_itself(compute: Callable[..., tuple[Tensor, ...]]) -> None:
    """Rows of two adapters, of different ranks and sites, and of the base model."""
    of_all, loras = linears(), [lora(4), lora(7, only=1, seed=80)]
    leaves = [matrix.requires_grad_() for one in loras for side in (one.a, one.b) for matrix in side.values()]
    x_NH = random(ROWS, HIDDEN, seed=90).requires_grad_()
    logits_NE = random(ROWS, EXPERTS, seed=91).requires_grad_()
    numbers = [0] * 15 + [2] * 5 + [1] * 20
    weights_NK, sent = dispatch(logits_NE, torch.tensor(numbers), 2)
    found = combined(torch.cat(compute(NAMES, spread(x_NH, sent), of_all, sent, loras), 1), weights_NK, sent)
    grad = random(*found.shape, seed=92)
    inputs = [x_NH, logits_NE, *leaves]
    grads = torch.autograd.grad(found, inputs, grad)
    weights_NK, choice_NK = routed(logits_NE, Routing(EXPERTS, ACTIVE, renormalised=True))
    wanted = plain(x_NH, of_all, weights_NK, choice_NK, [[*loras, None][n] for n in numbers])
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
    for one, expected in zip(grads, torch.autograd.grad(wanted, inputs, grad), strict=True):
        assert (one - expected).norm() < 1e-5 * expected.norm()


def test_weights_sum_to_one_where_they_are_renormalised_and_are_probabilities_where_not() -> None:
    logits_NE = random(ROWS, EXPERTS, seed=1)
    probabilities = logits_NE.softmax(-1)
    plain_NK, choice_NK = routed(logits_NE, Routing(EXPERTS, ACTIVE, renormalised=False))
    summed_NK, same_NK = routed(logits_NE, Routing(EXPERTS, ACTIVE, renormalised=True))
    assert torch.equal(choice_NK, same_NK)
    assert torch.equal(plain_NK, probabilities.gather(1, choice_NK))
    torch.testing.assert_close(summed_NK, plain_NK / plain_NK.sum(-1, keepdim=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_and_its_gradient_have_the_same_bits_alone_and_in_a_crowd(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        of_all, one = linears(), lora(4)
        x_NH, logits_NE = random(300, HIDDEN, seed=3), random(300, EXPERTS, seed=4)
        grad = random(300, 2 * WIDTH, seed=5)

        def computed(start: int, stop: int) -> list[Tensor]:
            x, logits = (whole[start:stop].clone().requires_grad_() for whole in (x_NH, logits_NE))
            weights, sent = dispatch(logits, torch.zeros(stop - start, dtype=torch.int64), 1)
            y = combined(torch.cat(by_loop(NAMES, spread(x, sent), of_all, sent, [one]), 1), weights, sent)
            return [y.detach(), torch.autograd.grad(y, logits, grad[start:stop])[0]]

        crowd = computed(0, 300)
        for start, stop in ((0, 1), (17, 18), (40, 57), (100, 240)):
            for alone, among in zip(computed(start, stop), crowd, strict=True):
                assert torch.equal(alone, among[start:stop]), (start, stop)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "up"), [("qwen3_moe", "mlp.experts.3.up_proj"), ("mixtral", "mlp.experts.3.w3")])
def test_every_expert_has_a_pair_of_its_own_in_the_file_and_is_read_back(tmp_path: Path, kind: str, up: str) -> None:
    trainer = tiny_trainer(tmp_path, kind)
    state = trainer.create(spec())
    state = trainer.begin(spec(), torch.arange(state.layout.numel, dtype=torch.float32))  # no two numbers are equal
    files = checkpoint_format.export(state, with_optimizer=False)
    tensors, _ = checkpoint_format._tensors(files[checkpoint_format.ADAPTER], "adapter")
    name = f"base_model.model.model.layers.1.{up}.lora_B.weight".replace(
        "mlp", "block_sparse_moe" if kind == "mixtral" else "mlp"
    )
    site = "layers.1.experts." + up.rpartition(".")[2]
    assert torch.equal(tensors[name], state.lora().b[site][3])
    weights_P, _ = checkpoint_format.read(files, state.spec, state.layout, with_optimizer=False)
    assert torch.equal(weights_P, state.weights_P)


def test_what_adapters_enter_is_known_before_the_first_is_probed(tmp_path: Path) -> None:
    """Of experts too: an adapter's layout is found once, on all linears of the model."""
    trainer = tiny_trainer(tmp_path, "qwen3_moe")
    assert isinstance(trainer.decoder, Decoder)
    exactness = trainer.decoder.weights.head.exactness
    assert {(HIDDEN, (WIDTH, WIDTH)), (WIDTH, (HIDDEN,))} <= exactness._linears


@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe"])
def test_on_a_gpu_a_layer_waits_for_nothing(tmp_path: Path, kind: str) -> None:
    """Forward and backward, rows of an adapter and of the base model, on the meta device."""
    directory, meta = strange_model(tmp_path, kind), torch.device("meta")
    config = ModelConfig.read(directory)
    block = weights.load(directory, config, torch.bfloat16, meta).layers[1].mlp
    assert block is not None
    shapes = {target.name: target.shapes(4) for target in config.lora_targets}
    a, b = ({name: torch.empty(both[side], device=meta, requires_grad=True) for name, both in shapes.items()}
            for side in (0, 1))  # fmt: skip
    x_NH = torch.empty(ROWS, HIDDEN, dtype=torch.bfloat16, device=meta, requires_grad=True)
    rows = PassRows(PackedAttention([ROWS]), Segments([Segment(0, 30, Lora(a, b, 1.0))]), torch.bfloat16, {})
    with Meter() as meter:
        block(x_NH, rows).square().sum().backward()
    assert meter.counts.kernels["_grouped_mm"] > 0
    assert (meter.counts.waits, meter.counts.mixed, meter.counts.pageable) == (Counter(), Counter(), Counter())
    assert a["layers.1.experts.gate_proj"].grad is not None
