"""Plain transformers and peft on the same card: whether the numbers are the same, and how fast it is."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.figures import Figure
from benchmarks.gpu.rig import ADAM, Rig, noted, rate, request, roughen, spec, texts
from benchmarks.gpu.sizes import write_model
from knapper.engine import checkpoint_format
from knapper.engine.executor import Work
from knapper.engine.models.loader import load
from knapper.engine.training.trainer import RunState, Trainer
from knapper.wire.types import Datum

_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_STEPS = 3
_FLOAT32_MAX = 1e-3  # between log-probabilities of two orders of addition, after the steps
_COARSER_MAX = 1.5  # bfloat16's distance from float32, over that of transformers


@dataclass(frozen=True)
class Run:
    """What three steps gave: log-probabilities of every step, and the adapter afterwards."""

    logprobs: Tensor
    weights: Tensor


def parity(rig: Rig) -> Iterator[Figure]:
    """Three steps of AdamW on packed texts of different lengths, in float32 and in bfloat16.

    float32 must be equal up to rounding, bfloat16 as near to float32 as transformers' own. Raises AssertionError.
    """
    directory = rig.scratch / "small"
    write_model(directory, rig.sizes.small, stored=True)
    device, data = rig.device_now, texts([length for length in rig.sizes.ragged if length < 1000], 0)
    truth = _plain(directory, device, torch.float32, data)
    ours = _ours(directory, device, torch.float32, data)
    yield _gap("float32: log-probabilities, largest difference", ours.logprobs, truth.logprobs)
    yield _gap("float32: the trained adapter, largest difference", ours.weights, truth.weights)
    assert float((ours.logprobs - truth.logprobs).abs().max()) < _FLOAT32_MAX, (
        "float32 differs from transformers + peft"
    )
    coarse, coarse_plain = (of(directory, device, torch.bfloat16, data) for of in (_ours, _plain))
    gap, gap_plain = (float((run.logprobs - truth.logprobs).abs().mean()) for run in (coarse, coarse_plain))
    name = "bfloat16: log-probabilities, mean distance from float32"
    yield Figure("against transformers + peft", name, gap, gap_plain, "", gap_plain / max(gap, 1e-12), "<= 1.5x its")
    assert gap <= _COARSER_MAX * gap_plain + 1e-6, f"bfloat16 is {gap:.2e} from float32, transformers {gap_plain:.2e}"


def _gap(name: str, ours: Tensor, theirs: Tensor) -> Figure:
    gap = float((ours - theirs).abs().max())
    return Figure("against transformers + peft", name, gap, None, "", goal=f"< {_FLOAT32_MAX:g}")


def _first(model: Trainer, rank: int) -> RunState:
    state = model.create(spec(rank, 0))
    roughen(state)
    return state


def _done(task: Work[Any]) -> Any:
    while True:
        try:
            next(task)
        except StopIteration as stop:
            return stop.value


def _ours(directory: Path, device: torch.device, dtype: torch.dtype, data: Sequence[Datum]) -> Run:
    trainer = Trainer(load(directory, dtype, device), rows_max=1 << 13)
    state, logprobs = _first(trainer, 8), list[Tensor]()
    for _ in range(_STEPS):
        state, output = _done(trainer.forward_backward(state, request(data, state.spec.run)))
        logprobs += [torch.from_numpy(of_datum["logprobs"]) for of_datum in output.outputs]
        state, _ = _done(trainer.optim_step(state, ADAM))
    return Run(torch.cat(logprobs), state.weights_P.cpu())


def _plain(directory: Path, device: torch.device, dtype: torch.dtype, data: Sequence[Datum]) -> Run:
    """The same steps, text by text, from the same adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    first = _first(Trainer(load(directory, torch.float32)), 8)
    with tempfile.TemporaryDirectory() as adapter:
        for name, content in checkpoint_format.export(first, with_optimizer=False).items():
            (Path(adapter) / name).write_bytes(content)
        base: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        base.to(device)
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    trainable = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    optimizer, logprobs = _optimizer(trainable), list[Tensor]()
    for _ in range(_STEPS):
        for datum in data:
            logits_TV = model(input_ids=torch.from_numpy(datum.tokens).long()[None].to(device)).logits[0].float()
            targets_T = torch.from_numpy(datum.inputs["target_tokens"]).to(device)
            p_T = -F.cross_entropy(logits_TV, targets_T, reduction="none")
            (-p_T.sum()).backward()
            logprobs.append(p_T.detach().cpu())
        torch.nn.utils.clip_grad_norm_(trainable, ADAM.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    named = {name.replace(".default", ""): parameter.detach().cpu() for name, parameter in model.named_parameters()}
    ordered = [
        named[name] for target in first.layout.lora_targets for name in checkpoint_format.peft_names(target.module)
    ]
    return Run(torch.cat(logprobs), torch.cat([each.flatten() for each in ordered]).float())


def _optimizer(trainable: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        trainable, lr=ADAM.learning_rate, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps, weight_decay=ADAM.weight_decay
    )


def speed(rig: Rig) -> Iterator[Figure]:
    """Steps of a bare loop at the measured size: the packed request in one padded batch, and tenants in turns."""
    model = _random(rig)
    adapters = [name for name, _ in zip(model.peft_config, range(99), strict=False)]
    yield _bare_steps(rig, model, adapters[:1], [rig.sizes.packed], "packed texts")
    yield _bare_steps(rig, model, adapters, rig.sizes.small_tenants, "runs of one small text")


def _random(rig: Rig) -> Any:
    """The model with random weights, made on the device, and an adapter for each small tenant."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.float32 if rig.device_now.type == "cpu" else torch.bfloat16
    config = AutoConfig.for_model(**{name: value for name, value in rig.sizes.model.items() if name != "architectures"})
    with torch.device(rig.device_now):
        base: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]  # the library has no types here
        lora = LoraConfig(r=rig.sizes.rank, lora_alpha=32, target_modules=_LINEARS)
        model = get_peft_model(base, lora, adapter_name="run0")
        for number in range(1, len(rig.sizes.small_tenants)):
            model.add_adapter(f"run{number}", lora)
    return model


def _tokens(datum: Datum) -> np.ndarray:
    return datum.tokens


def _targets(datum: Datum) -> np.ndarray:
    return datum.inputs["target_tokens"]


def _bare_steps(rig: Rig, model: Any, names: Sequence[str], lengths: Sequence[Sequence[int]], kind: str) -> Figure:
    batches = [texts(of_run, seed) for seed, of_run in enumerate(lengths)]
    optimizers = {}
    for name in names:
        model.set_adapter(name)
        optimizers[name] = _optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])

    def turn() -> None:
        for name, data in zip(names, batches, strict=True):
            model.set_adapter(name)
            tokens_BT, targets_BT = (
                torch.stack([torch.from_numpy(pick(datum)).long() for datum in data]).to(rig.device_now)
                for pick in (_tokens, _targets)
            )
            logits_BTV = model(input_ids=tokens_BT).logits
            F.cross_entropy(logits_BTV.float().transpose(1, 2), targets_BT, reduction="sum").backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

    with rig.peak() as peak:
        took_s = rig.median_s(turn)
        tokens = sum(map(sum, lengths))
        name = f"{kind}: {len(lengths)} run{'s' * (len(lengths) > 1)}, {tokens:,} tokens"
        return rate(
            "a bare loop of transformers + peft", name, tokens, took_s, note=noted(peak(), f"a step {took_s:.3f} s")
        )
