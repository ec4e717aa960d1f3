"""Every architecture of the native decoder equals transformers and PEFT, beyond its windows and past its scaling, and
its bits do not depend on what is computed beside it.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_grouped import Segment
from knapper.engine.models import transformers_loader, weight_files, weights
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.prefill import PrefillPrompt
from knapper.engine.models.registry import ARCHITECTURES
from knapper.wire.types import AdamW
from tests.engine.models.test_decoder import decoder_of, lora_of, tokens_of
from tests.engine.runs import datum, done, request, spec, tiny_trainer
from tests.engine.strange import HYBRIDS, MIXTURES, NATIVE, strange_model
from tests.engine.test_peft_parity import expect_equal_steps, load_in_peft

# PEFT warns about tied heads (docs/decisions/0002) and about a base model that is not on the hub.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),  # PEFT forgets what it fused
]
LENGTHS = (19, 90, 7, 200)  # windows are of 16 tokens, and contexts are scaled from 64 on


def test_every_architecture_has_a_model_here(tmp_path: Path) -> None:
    kinds = {ModelConfig.read(strange_model(tmp_path / kind, kind)).model_type for kind in NATIVE}
    assert kinds == ARCHITECTURES.keys()


@pytest.mark.parametrize("kind", NATIVE)
def test_three_optimizer_steps_equal_those_of_peft(tmp_path: Path, kind: str) -> None:
    """In log-probabilities, gradients and weights, the head adapted too.

    Of losses without clips: at the edge of one, rounding is another gradient. test_peft_parity.py has them.
    """
    trainer = tiny_trainer(tmp_path / "model", kind)
    assert isinstance(trainer.decoder, Decoder)
    state = trainer.create(spec(train_unembed=True))
    model = load_in_peft(state, tmp_path / "model", tmp_path / "adapter", trainable=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if kind not in MIXTURES:  # of experts PEFT keeps zeros, too
        assert sum(p.numel() for p in trainable) == state.layout.numel
    rng = np.random.default_rng(5)
    expect_equal_steps(trainer, state, model, ("cross_entropy", "importance_sampling", "dro"), LENGTHS, rng)


@pytest.mark.parametrize("kind", NATIVE)
def test_a_run_in_bfloat16_moves_as_in_float32(tmp_path: Path, kind: str) -> None:
    """To bfloat16's rounding; tests/engine/test_peft_parity.py compares some of them with PEFT's.

    By rounding alone a row takes another of two experts that are nearly alike to its router.
    """
    logprobs = []
    for dtype in (torch.float32, torch.bfloat16):
        trainer = tiny_trainer(tmp_path / "model", kind, dtype)
        state, rng = trainer.create(spec()), np.random.default_rng(5)
        data = [datum(length, "cross_entropy", rng) for length in LENGTHS]
        state, _ = done(trainer.forward_backward(state, request(data)))
        state, _ = done(trainer.optim_step(state, AdamW(learning_rate=1e-3)))
        state, output = done(trainer.forward_backward(state, request(data)))
        logprobs.append(np.concatenate([one["logprobs"] for one in output.outputs]))
    assert np.abs(logprobs[0] - logprobs[1]).mean() < (0.1 if kind in MIXTURES else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NATIVE)
def test_rows_and_gradients_have_the_same_bits_alone_and_in_a_crowd(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    decoder = decoder_of(strange_model(tmp_path, kind), dtype)
    lengths, loras = [70, 33, 5, 33, 90], [lora_of(decoder, seed=seed, rank=rank) for seed, rank in enumerate((4, 7))]
    tokens = tokens_of(decoder, lengths)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    members: list[Lora | None] = [loras[0], loras[1], None, loras[0], loras[1]]
    rows, gradients = _differentiated(decoder, tokens, lengths, members, loras[1])
    own = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    its_tokens = torch.cat([tokens[own[1]], tokens[own[4]]])
    its_rows, its_gradients = _differentiated(decoder, its_tokens, [33, 90], 2 * [loras[1]], loras[1])
    assert torch.equal(torch.cat([rows[own[1]], rows[own[4]]]), its_rows)
    assert its_gradients.keys() == gradients.keys() == loras[1].b.keys() - {"lm_head"}
    assert all(torch.equal(gradients[name], gradient) for name, gradient in its_gradients.items())
    for n, lora in enumerate(members):
        with torch.no_grad():
            by_itself = decoder.hidden(tokens[own[n]], [lengths[n]], [Segment(0, lengths[n], lora)])
        assert torch.equal(by_itself, rows[own[n]]), n


def _differentiated(
    decoder: Decoder, tokens_N: Tensor, lengths: Sequence[int], loras: Sequence[Lora | None], of: Lora
) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows, and the gradients of one adapter's B."""
    leaves = {name: matrix.clone().requires_grad_() for name, matrix in of.b.items()}
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    segments = [
        Segment(start, start + length, Lora(of.a, leaves, of.scale) if lora is of else lora)
        for start, length, lora in zip(starts, lengths, loras, strict=True)
    ]
    rows_NH = decoder.hidden(tokens_N, lengths, segments)
    rows_NH.float().square().sum().backward()
    return rows_NH.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NATIVE)
def test_decoding_and_reuse_of_a_prefix_have_the_bits_of_one_pass(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    """Two sequences of different adapters: one goes on from a part of an earlier prompt; both leave their pools."""
    decoder = decoder_of(strange_model(tmp_path, kind), dtype)
    lora, length = lora_of(decoder, seed=1), 140
    texts = [tokens_of(decoder, [length], seed=seed) for seed in (1, 2)]
    first, second = (text.numpy().astype(np.int32) for text in texts)
    kept = 41 if decoder.config.recurrent else 50  # of a state no part is reused
    (earlier,) = decoder.prefill([PrefillPrompt(first[:kept], lora)])
    reused = decoder.reusable(earlier.past, 41)
    assert reused == 41
    prompts = [PrefillPrompt(first[:60], lora, earlier.past, reused), PrefillPrompt(second[:30], None)]
    prefilled = decoder.prefill(prompts)
    wholes = []
    for text, adapter in zip(texts, (lora, None), strict=True):
        with torch.no_grad():
            wholes.append(decoder.hidden(text, [length], [Segment(0, length, adapter)]))
    assert torch.equal(prefilled[0].rows, wholes[0][reused:60])
    assert torch.equal(prefilled[1].rows, wholes[1][:30])
    decoding = decoder.decode_state(4096)
    slots = [decoding.add(one.past, size) for one, size in zip(prefilled, (60, 30), strict=True)]
    places = [60, 30]
    for _ in range(80):
        decoding.reserve()
        order = [slots.index(slot) for slot in decoding.rows]
        step = torch.stack([texts[n][places[n]] for n in order])
        logits = decoding.step(step, [(lora, None)[n] for n in order])
        for row, n in enumerate(order):
            adapt = decoding._adapt([(lora, None)[n]])
            assert torch.equal(logits[row], decoder.logits(wholes[n][places[n]][None], adapt)[0]), (n, places[n])
            places[n] += 1


@pytest.mark.parametrize("kind", HYBRIDS)
def test_states_are_kept_for_later_prompts_at_a_few_places_and_have_the_bits_of_one_pass(
    tmp_path: Path, kind: str
) -> None:
    decoder = decoder_of(strange_model(tmp_path, kind))
    lora, text = lora_of(decoder, seed=1), tokens_of(decoder, [300])
    tokens = text.numpy().astype(np.int32)
    with torch.no_grad():
        whole = decoder.hidden(text, [300], [Segment(0, 300, lora)])
    other = np.flip(tokens[:70])
    earlier, beside = decoder.prefill([PrefillPrompt(each, lora) for each in (tokens[:210], other)])
    assert [sorted(each.past.states) for each in (earlier, beside)] == [[64, 128, 210], [64, 70]]
    assert [decoder.reusable(earlier.past, common) for common in (63, 64, 209, 210)] == [0, 64, 128, 210]
    for reused, stop in ((64, 130), (128, 300), (210, 211), (210, 300)):
        (rest,) = decoder.prefill([PrefillPrompt(tokens[:stop], lora, earlier.past, reused)])
        assert torch.equal(rest.rows, whole[reused:stop])
        assert sorted(rest.past.states) == sorted({64, *({128, 256} & {*range(stop)}), reused, stop})
        longer = PrefillPrompt(tokens, lora, rest.past, stop if stop < 300 else reused)
        assert torch.equal(decoder.prefill([longer])[0].rows, whole[longer.reused :])


@pytest.mark.parametrize("kind", NATIVE)
def test_the_tensors_of_an_architecture_are_those_that_transformers_writes(tmp_path: Path, kind: str) -> None:
    directory = strange_model(tmp_path, kind)
    config = ModelConfig.read(directory)
    entries = weight_files.text_entries(directory)
    beside = {name for name in entries if weight_files.is_unread(name, config)}
    stored = {name: entry.shape for name, entry in entries.items() if name not in beside}
    assert dict(weight_files.promised(config, stored)) == stored
    assert all(".indexer." in name for name in beside)
    linears = {name: shape for name, shape in stored.items() if len(shape) == 2 or ".experts." in name}
    matrices = sum(4 * math.prod(shape) for name, shape in linears.items() if not name.endswith("bias"))
    assert weights.load(directory, config).nbytes == matrices


@pytest.mark.parametrize("kind", [kind for kind in NATIVE if kind not in MIXTURES])
def test_an_adapter_made_through_transformers_fits_the_native_layers(tmp_path: Path, kind: str) -> None:
    """Its matrices' names, sizes and order, so that a run's snapshot of one engine is read by the other."""
    directory = strange_model(tmp_path, kind)
    config = ModelConfig.read(directory)
    sites = [(t.module, t.peft_target, t.inputs, t.outputs) for t in config.lora_targets]
    if kind in HYBRIDS:  # transformers' models of these are not served: their layers are made of more than linears
        model = AutoModelForCausalLM.from_pretrained(directory)
        linears = [(name, each) for name, each in model.named_modules() if type(each) is torch.nn.Linear]
        assert sites == [(n, n.rpartition(".")[2], each.in_features, each.out_features) for n, each in linears]
    else:
        foreign = transformers_loader.load(directory, torch.float32, torch.device("cpu")).config
        assert sites == [(t.module, t.peft_target, t.inputs, t.outputs) for t in foreign.lora_targets]
        assert (config.context, config.eos, config.tied) == (foreign.context, foreign.eos, foreign.tied)
