"""Models that transformers computes: sampled from and trained as the native ones are, or refused in words.

That a run of them equals a plain PEFT loop is in test_peft_parity.
"""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from knapper.engine import checkpoint_format
from knapper.engine.executor import Executor
from knapper.engine.layers.lora import Lora
from knapper.engine.models import transformers_loader
from knapper.engine.models.config import computed_by
from knapper.engine.models.fields import UnsupportedModel
from knapper.engine.models.loader import load
from knapper.engine.models.tensor_header import BrokenModel
from knapper.engine.sampling.sampler import EngineSampler
from knapper.engine.training.batch import compute
from knapper.engine.training.trainer import RunState, Trainer
from knapper.wire.types import AdamW, Datum, SampleOutput, SampleRequest
from tests.engine.runs import datum, done, request, spec, tiny_trainer
from tests.engine.sampling.test_scheduler import AdapterDict, prompt_of, same
from tests.engine.sampling.test_scheduler import request as sample_request
from tests.engine.strange import FOREIGN, strange_model
from tests.engine.test_peft_parity import arena, load_in_peft, plain_logprobs, plain_loss
from tests.engine.tiny import tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]
KINDS = ["gpt_neox", "phi", "cohere2", "vaultgemma"]


def trained(trainer: Trainer, **changes: Any) -> RunState:
    """A run whose adapter matters to the logits."""
    state, rng = trainer.create(spec(**changes)), np.random.default_rng(3)
    for _ in range(2):
        state, _ = done(trainer.forward_backward(state, request([datum(20, "cross_entropy", rng)])))
        state, _ = done(trainer.optim_step(state, AdamW(learning_rate=2e-3)))
    return state


def sampled(
    trainer: Trainer, adapters: dict[str, Lora], directory: Path, *requests: SampleRequest
) -> list[SampleOutput]:
    device = Executor()
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    sampler = EngineSampler(
        trainer.decoder, device, AdapterDict(adapters), tokenizer, slots_max=6, kv_tokens_max=4096, now=time.monotonic
    )

    async def together() -> list[SampleOutput]:
        return list(await asyncio.gather(*(sampler.sample(one) for one in requests)))

    try:
        outputs = asyncio.run(asyncio.wait_for(together(), 60))
        assert sampler._scheduler._cache.tokens == 0
        return outputs
    finally:
        device.close()


def logprobs_of(model: Any, tokens: np.ndarray[Any, Any]) -> Tensor:
    """(T - 1): of each token after the first, by the model itself."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        logprobs: Tensor = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    return logprobs[:-1].gather(1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_transformers_and_peft(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "model"
    trainer = tiny_trainer(directory, kind)
    state = trained(trainer, train_unembed=True)
    prompts = [prompt_of(length, seed=length) for length in (9, 14, 30, 2)]
    greedy = [
        sample_request(adapter="mine", prompt=prompt, temperature=0.0, max_tokens=25, prompt_logprobs=True)
        for prompt in prompts
    ]
    outputs = sampled(trainer, {"mine": state.lora()}, directory, *greedy)
    model: Any = load_in_peft(state, directory, tmp_path / "adapter")
    seen: set[int] = set()
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.from_numpy(prompt.astype(np.int64))[None]
        text = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=25, min_new_tokens=25
        )
        tokens = output.sequences[0].tokens
        assert tokens.tolist() == text[0, len(prompt) :].tolist()
        seen |= set(tokens.tolist())
        wanted = logprobs_of(model, np.concatenate([prompt, tokens])).numpy()
        np.testing.assert_allclose(output.sequences[0].logprobs, wanted[len(prompt) - 1 :], atol=2e-5)
        assert output.prompt_logprobs is not None
        logprobs = np.array(output.prompt_logprobs[1:], dtype=np.float32)
        np.testing.assert_allclose(logprobs, wanted[: len(prompt) - 1], atol=2e-5)
    assert len(seen) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(tmp_path: Path, kind: str) -> None:
    trainer = tiny_trainer(tmp_path, kind)
    adapters = {"one": trained(trainer).lora(), "two": trained(trainer, rank=7, seed=2, train_unembed=True).lora()}
    requests = [
        sample_request(
            adapter=adapter, seed=seed, num_samples=2, max_tokens=25, prompt=sample_request().prompt[: 3 + seed]
        )
        for seed, adapter in enumerate(["", "one", "two", "one"])
    ]
    together = sampled(trainer, adapters, tmp_path, *requests)
    for one, crowded in zip(requests, together, strict=True):
        (alone,) = sampled(trainer, adapters, tmp_path, one)
        assert all(map(same, alone.sequences, crowded.sequences))
        assert not same(alone.sequences[0], alone.sequences[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_a_crowd_equals_the_run_alone_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    trainer = tiny_trainer(tmp_path, kind, dtype)
    rng = np.random.default_rng(0)
    states = [trainer.create(spec(seed=seed, rank=3 + seed, train_unembed=seed == 1)) for seed in range(3)]
    requests = [request([datum(length, "ppo", rng) for length in (5, 21, 9 + n)], "ppo") for n in range(3)]
    passes = [trainer.open(state, one) for state, one in zip(states, requests, strict=True)]
    done(compute(trainer.decoder, passes))
    for state, one, crowded in zip(states, requests, passes, strict=True):
        alone, output = done(trainer.forward_backward(state, one))
        together, crowd_output = trainer.close(state, crowded)
        assert alone.grads_P is not None
        assert together.grads_P is not None
        assert alone.grads_P.any()
        assert torch.equal(alone.grads_P, together.grads_P)
        for own, theirs in zip(output.outputs, crowd_output.outputs, strict=True):
            np.testing.assert_array_equal(own["logprobs"], theirs["logprobs"])


def test_sequences_that_begin_alike_get_what_each_gets_alone(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, "vaultgemma")
    state, rng = trained(trainer), np.random.default_rng(0)
    first = datum(30, "cross_entropy", rng)
    tokens = np.concatenate([first.tokens[:20], datum(12, "cross_entropy", rng).tokens])
    data = [first, Datum(tokens, datum(32, "cross_entropy", rng).inputs)]
    both, output = done(trainer.forward_backward(state, request(data)))
    assert both.grads_P is not None
    total = torch.zeros_like(both.grads_P)
    for one, logprobs in zip(data, output.outputs, strict=True):
        alone, wanted = done(trainer.forward_backward(state, request([one])))
        np.testing.assert_allclose(logprobs["logprobs"], wanted.outputs[0]["logprobs"], atol=1e-5)
        assert alone.grads_P is not None
        total += alone.grads_P
    torch.testing.assert_close(both.grads_P, total, rtol=1e-4, atol=1e-5 * float(total.abs().max()))


@pytest.mark.parametrize("kind", ["gpt_neox", "phi"])
@pytest.mark.parametrize("targets", [{}, {"train_mlp": False}, {"train_attn": False, "train_unembed": True}])
def test_saves_and_snapshots_come_back_bit_for_bit(tmp_path: Path, kind: str, targets: dict[str, bool]) -> None:
    state = trained(tiny_trainer(tmp_path, kind), **targets)
    weights_P, moments = checkpoint_format.read(
        checkpoint_format.export(state, with_optimizer=True), state.spec, state.layout, with_optimizer=True
    )
    assert moments is not None
    assert torch.equal(weights_P, state.weights_P)
    assert torch.equal(moments.v_P, state.moments.v_P)
    assert torch.equal(checkpoint_format.thaw(checkpoint_format.freeze(state), state.layout)[0], state.weights_P)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_pass_equals_that_of_peft(tmp_path: Path, kind: str) -> None:
    """Log-probabilities and gradients, beyond windows; test_peft_parity has longer runs of some.

    By rounding alone gradients part by up to 1.1e-5 (a Gemma 4 with AVX2).
    """
    trainer, rng = tiny_trainer(tmp_path / "model", kind), np.random.default_rng(5)
    state = trained(trainer, train_unembed=True)
    model = load_in_peft(state, tmp_path / "model", tmp_path / "adapter", trainable=True)
    data = [datum(length, "cross_entropy", rng) for length in (60, 7)]
    after, output = done(trainer.forward_backward(state, request(data)))
    for example, found in zip(data, output.outputs, strict=True):
        p = plain_logprobs(model, example)
        plain_loss("cross_entropy", p, {"weights": torch.from_numpy(example.inputs["weights"])}, {}).backward()
        np.testing.assert_allclose(found["logprobs"], p.detach().numpy(), atol=1e-5, rtol=1e-5)
    gradient_P = arena(state, model, lambda p: p.grad)
    assert after.grads_P is not None
    assert (after.grads_P - gradient_P).norm() < 3e-5 * gradient_P.norm()


@pytest.mark.parametrize("kind", FOREIGN)
def test_every_strange_model_starts_in_bfloat16(tmp_path: Path, kind: str) -> None:
    model = load(strange_model(tmp_path, kind), torch.bfloat16)
    assert model.computed_by == computed_by(tmp_path) == "transformers"
    assert model.dtype == torch.bfloat16
    assert model.versions == (f"transformers {transformers.__version__}",)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {"hidden_act": "gelu"},
    ],
)
def test_an_option_that_the_native_code_lacks_is_left_to_transformers(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tiny_model(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = load(tmp_path)
    assert model.computed_by == "transformers"
    tokens = np.random.default_rng(0).integers(0, 200, 60).astype(np.int32)
    data = [Datum(tokens[:-1], {"target_tokens": tokens[1:].astype(np.int64), "weights": np.ones(59, np.float32)})]
    trainer = Trainer(model)
    _, output = done(trainer.forward_backward(trainer.create(spec()), request(data, forward_only=True)))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    np.testing.assert_allclose(output.outputs[0]["logprobs"], logprobs_of(plain, tokens).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "encoder",
        ),
        ({"model_type": "wild", "auto_map": {"AutoModelForCausalLM": "wild.Wild"}}, "does not know it.*never run"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "would be BertLMHeadModel"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "no causal language model"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"model_type": "llava", "architectures": ["X"], "vision_config": {}}, "more than text"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    path = tiny_model(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UnsupportedModel, match=complaint):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60, n_positions=64), "Conv1D"),
        (
            transformers.GraniteMoeConfig(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=60,
                intermediate_size=32, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=64,
            ),
            "keeps .*no adapter",
        ),
        (
            transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=60),
            "keeps .*no adapter",
        ),
    ],
    ids=["gpt2", "granitemoe", "mamba"],
)  # fmt: skip
def test_matrices_that_no_adapter_reaches_are_refused(tmp_path: Path, config: Any, complaint: str) -> None:
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # the library has no types here
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=complaint):
        load(tmp_path)


def test_the_trial_refuses_a_head_that_is_understood_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strange_model(tmp_path, "cohere2")
    monkeypatch.setattr(transformers_loader, "_scale", lambda _: 1.0)
    with pytest.raises(UnsupportedModel, match="head is more"):
        load(tmp_path)


def test_missing_and_pickled_weights_are_refused(tmp_path: Path) -> None:
    strange_model(tmp_path, "phi", num_hidden_layers=1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 2}))
    with pytest.raises(BrokenModel, match=r"missing tensors.*layers\.1"):
        load(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(BrokenModel, match="cannot load"):
        load(tmp_path)


def test_lengths_that_would_stretch_the_positions_are_not_served(tmp_path: Path) -> None:
    path = strange_model(tmp_path, "gpt_neox") / "config.json"
    raw = json.loads(path.read_text())
    rope = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 128}
    path.write_text(json.dumps({**raw, "rope_parameters": {**raw["rope_parameters"], **rope}}))
    assert load(tmp_path).config.context == 128


def test_a_native_model_starts_without_transformers(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    code = f"""
import pathlib, sys
from knapper.engine import run_machine
from knapper.engine.sampling import sampler
from knapper.engine.models.loader import load
print(load(pathlib.Path({str(tmp_path)!r})).computed_by, "transformers" in sys.modules, "peft" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ended.stdout.split() == ["native", "False", "False"]
