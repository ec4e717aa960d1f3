"""Steps of a run: gradients add up, forward_only leaves no trace, a failure changes nothing, cuts do not matter."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from knapper.engine.training.trainer import RunState, Trainer
from knapper.errors import InvalidField, UserError
from knapper.wire.types import AdamW, Datum
from tests.engine.runs import datum, done, request, spec, tiny_trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return tiny_trainer(tmp_path_factory.mktemp("model"))


def batch(lengths: tuple[int, ...] = (19, 33, 7, 33, 20), loss: str = "cross_entropy", seed: int = 0) -> list[Datum]:
    rng = np.random.default_rng(seed)
    return [datum(length, loss, rng, prompt=length // 3) for length in lengths]


def trained(trainer: Trainer, steps: int = 2) -> RunState:
    """A run whose B matrices and moments are not zero."""
    state = trainer.create(spec(train_unembed=True))
    for step in range(steps):
        state, _ = done(trainer.forward_backward(state, request(batch(seed=step))))
        state, _ = done(trainer.optim_step(state, AdamW(learning_rate=1e-2)))
    return state


def tensors(state: RunState) -> list[Tensor]:
    arenas = [state.weights_P, state.moments.m_P, state.moments.v_P]
    return arenas if state.grads_P is None else [*arenas, state.grads_P]


def gradient(trainer: Trainer, state: RunState, data: list[Datum]) -> Tensor:
    state, _ = done(trainer.forward_backward(state, request(data)))
    assert state.grads_P is not None
    return state.grads_P


def test_gradients_of_several_calls_add_up_to_those_of_one(trainer: Trainer) -> None:
    state, data = trained(trainer), batch()
    whole = gradient(trainer, state, data)
    for first, second in ((data[:2], data[2:]), (data[:4], data[4:])):
        parts, _ = done(trainer.forward_backward(state, request(first)))
        parts, _ = done(trainer.forward_backward(parts, request(second)))
        assert parts.grads_P is not None
        torch.testing.assert_close(parts.grads_P, whole, rtol=1e-4, atol=1e-5)
    assert whole.abs().max() > 0.1


def test_losses_are_sums_over_datums_not_means(trainer: Trainer) -> None:
    state, data = trained(trainer), batch()
    once, _ = done(trainer.forward_backward(state, request(data)))
    output = done(trainer.forward_backward(state, request(data)))[1]
    twice, doubled = done(trainer.forward_backward(state, request(data + data)))
    assert once.grads_P is not None
    assert twice.grads_P is not None
    assert doubled.metrics["loss:sum"] == pytest.approx(2 * output.metrics["loss:sum"])
    torch.testing.assert_close(twice.grads_P, 2 * once.grads_P, rtol=1e-4, atol=1e-5)


def test_forward_only_leaves_the_state_as_it_is(trainer: Trainer) -> None:
    state, _ = done(trainer.forward_backward(trained(trainer), request(batch())))
    before = [t.clone() for t in tensors(state)]
    after, output = done(trainer.forward_backward(state, request(batch(seed=9), forward_only=True)))
    assert after is state
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(after), strict=True))
    full = done(trainer.forward_backward(state, request(batch(seed=9))))[1]
    assert full.metrics == output.metrics
    for datum_output, other in zip(output.outputs, full.outputs, strict=True):
        np.testing.assert_array_equal(datum_output["logprobs"], other["logprobs"])


def test_log_probabilities_have_the_shape_of_their_targets(trainer: Trainer) -> None:
    rng = np.random.default_rng(0)
    data = [datum(n, "cross_entropy", rng, columns=k) for n, k in ((5, 0), (9, 3), (1, 1), (30, 64))]
    output = done(trainer.forward_backward(trained(trainer), request(data)))[1]
    assert [o["logprobs"].shape for o in output.outputs] == [(5,), (9, 3), (1, 1), (30, 64)]
    assert all(o["logprobs"].dtype == np.float32 for o in output.outputs)


def test_micro_batches_change_nothing_but_the_last_bits(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    state, data = trained(trainer), batch()
    whole, output = done(trainer.forward_backward(state, request(data)))
    monkeypatch.setattr(trainer, "rows_max", 40)
    micro_batch_count = len(trainer.open(state, request(data)).waiting)
    cut, cut_output = done(trainer.forward_backward(state, request(data)))
    assert micro_batch_count == 4  # 19 | 33 + 7 | 33 | 20
    torch.testing.assert_close(cut.grads_P, whole.grads_P, rtol=1e-4, atol=1e-5)
    assert cut_output.metrics["loss:sum"] == pytest.approx(output.metrics["loss:sum"], rel=1e-5)
    for datum_output, other in zip(cut_output.outputs, output.outputs, strict=True):
        np.testing.assert_array_equal(datum_output["logprobs"], other["logprobs"])


def test_the_same_request_gives_the_same_bits(trainer: Trainer) -> None:
    state = trained(trainer)
    assert torch.equal(gradient(trainer, state, batch()), gradient(trainer, state, batch()))


def test_a_task_left_half_way_changes_nothing_and_disturbs_nobody(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = trained(trainer)
    alone = gradient(trainer, state, batch())
    monkeypatch.setattr(trainer, "rows_max", 40)
    before = [t.clone() for t in tensors(state)]
    half = trainer.forward_backward(state, request(batch(seed=5)))
    next(half)
    between = trainer.forward_backward(state, request(batch(seed=6), forward_only=True))
    next(between)
    assert torch.is_grad_enabled()
    monkeypatch.undo()
    assert torch.equal(gradient(trainer, state, batch()), alone)
    half.close()
    done(between)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True))


def test_a_loss_that_is_not_finite_is_refused_half_way_and_changes_nothing(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "rows_max", 40)
    state, _ = done(trainer.forward_backward(trained(trainer), request(batch())))
    before = [t.clone() for t in tensors(state)]
    data = batch(loss="ppo")
    data[3].inputs["logprobs"][20] = -500.0  # exp(p - q) overflows
    task = trainer.forward_backward(state, request(data, "importance_sampling"))
    next(task)
    with pytest.raises(UserError, match=r"datum 3: the loss importance_sampling is .*nothing was changed.*`logprobs`"):
        done(task)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True))


def test_a_gradient_that_is_not_finite_is_refused_and_the_site_named(trainer: Trainer) -> None:
    state = trained(trainer)
    example = datum(9, "cross_entropy", np.random.default_rng(0))
    example.inputs["weights"][:] = 0
    example.inputs["weights"][4] = 3e37  # the loss is finite; its gradient is not
    with pytest.raises(UserError, match=r"gradient of .* \([AB]\) is not finite.*added nothing"):
        done(trainer.forward_backward(state, request([example])))


def test_sums_that_overflow_together_are_refused_where_they_do(trainer: Trainer) -> None:
    state = trained(trainer)
    huge = state.weights_P.new_full((state.layout.numel,), torch.finfo(torch.float32).max)
    state = RunState(state.spec, state.layout, state.weights_P, state.moments, huge)
    example = datum(9, "cross_entropy", np.random.default_rng(0))
    example.inputs["weights"][:] *= 1e36
    with pytest.raises(UserError, match="added nothing to the pending gradients"):
        done(trainer.forward_backward(state, request([example])))


def test_weights_that_give_nan_are_blamed_on_the_weights(trainer: Trainer) -> None:
    state = trainer.begin(spec(), trained(trainer).weights_P[: trainer.layout(spec()).numel] * 1e30)
    with pytest.raises(UserError, match=r"datum 0: the model's log-probabilities are not finite.*learning_rate"):
        done(trainer.forward_backward(state, request(batch())))


def test_no_step_writes_to_the_state_it_is_given(trainer: Trainer) -> None:
    state, _ = done(trainer.forward_backward(trained(trainer), request(batch())))
    before = [t.clone() for t in tensors(state)]
    done(trainer.forward_backward(state, request(batch(seed=1))))
    done(trainer.optim_step(state, AdamW(learning_rate=0.1, grad_clip_norm=0.01)))
    assert len(before) == 4
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(state), strict=True))


def test_an_optimizer_step_uses_the_gradients_up(trainer: Trainer) -> None:
    state, _ = done(trainer.forward_backward(trained(trainer), request(batch())))
    stepped, metrics = done(trainer.optim_step(state, AdamW(learning_rate=1e-3)))
    assert stepped.grads_P is None
    assert state.grads_P is not None
    assert stepped.moments.step == state.moments.step + 1
    assert metrics["grad_norm"] == pytest.approx(state.grads_P.norm().item(), rel=1e-5)
    assert not torch.equal(stepped.weights_P, state.weights_P)


def test_a_step_with_nothing_pending_is_a_step_with_a_zero_gradient(trainer: Trainer) -> None:
    state = trained(trainer)
    stepped, metrics = done(trainer.optim_step(state, AdamW(learning_rate=1e-3)))
    torch.testing.assert_close(stepped.moments.m_P, 0.9 * state.moments.m_P)
    torch.testing.assert_close(stepped.moments.v_P, 0.95 * state.moments.v_P)
    assert (metrics["grad_norm"], stepped.moments.step) == (0.0, state.moments.step + 1)
    assert not torch.equal(stepped.weights_P, state.weights_P)  # what momentum is left


def test_a_refused_step_keeps_the_gradients_for_the_next(trainer: Trainer) -> None:
    state, _ = done(trainer.forward_backward(trained(trainer), request(batch())))
    with pytest.raises(InvalidField, match=r"adam_params.learning_rate is nan"):
        done(trainer.optim_step(state, AdamW(learning_rate=float("nan"))))
    with pytest.raises(UserError, match="gradients are still pending"):
        done(trainer.optim_step(state, AdamW(learning_rate=1e30, weight_decay=1e30)))
    again, metrics = done(trainer.optim_step(state, AdamW()))
    assert metrics["grad_norm"] > 0
    assert again.moments.step == state.moments.step + 1


def test_clipping_looks_at_this_runs_parameters_alone(trainer: Trainer) -> None:
    """Another run with huge gradients in the same process scales nothing here."""
    state, _ = done(trainer.forward_backward(trained(trainer), request(batch())))
    alone, _ = done(trainer.optim_step(state, AdamW(grad_clip_norm=0.1)))
    other = trainer.create(spec(seed=1))
    big = batch(seed=3)
    for example in big:
        example.inputs["weights"] *= 1e6
    other, _ = done(trainer.forward_backward(other, request(big)))
    done(trainer.optim_step(other, AdamW(grad_clip_norm=0.1)))
    crowded, _ = done(trainer.optim_step(state, AdamW(grad_clip_norm=0.1)))
    assert torch.equal(crowded.weights_P, alone.weights_P)


def test_a_bfloat16_base_trains_float32_adapters_to_about_the_same_gradients(tmp_path: Path, trainer: Trainer) -> None:
    half = tiny_trainer(tmp_path, dtype=torch.bfloat16)
    state, data = trained(trainer), batch()
    wanted, output = done(trainer.forward_backward(state, request(data)))
    half_state, half_output = done(half.forward_backward(state, request(data)))
    assert half_state.grads_P is not None
    assert wanted.grads_P is not None
    assert half_state.grads_P.dtype == torch.float32
    assert torch.cosine_similarity(half_state.grads_P, wanted.grads_P, dim=0) > 0.98
    for datum_output, other in zip(half_output.outputs, output.outputs, strict=True):
        assert np.abs(datum_output["logprobs"] - other["logprobs"]).mean() < 0.1


def test_the_scale_is_alpha_over_rank(trainer: Trainer) -> None:
    state = trained(trainer)
    half = trainer.begin(spec(train_unembed=True, alpha=4.0), state.weights_P.clone())
    doubled_b = state.weights_P.clone()
    for _, _, b in half.layout.matrices(doubled_b):
        b.mul_(2)
    data = batch()
    wanted = done(trainer.forward_backward(state, request(data, forward_only=True)))[1]
    half_state = done(
        trainer.forward_backward(
            trainer.begin(spec(train_unembed=True, alpha=4.0), doubled_b), request(data, forward_only=True)
        )
    )[1]
    other = done(trainer.forward_backward(half, request(data, forward_only=True)))[1]
    for datum_output, same, different in zip(half_state.outputs, wanted.outputs, other.outputs, strict=True):
        np.testing.assert_allclose(datum_output["logprobs"], same["logprobs"], atol=1e-5)
        assert np.abs(different["logprobs"] - same["logprobs"]).max() > 1e-3
