"""The decoder computes what transformers computes, and a row's bits depend on its own sequence and adapter only."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from knapper.engine.layers.attention import PackedAttention
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_gathered import GatheredLora, Stack
from knapper.engine.layers.lora_grouped import Segment, Segments, base
from knapper.engine.models import loader
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.fields import UnsupportedModel
from knapper.engine.models.tensor_header import BrokenModel
from knapper.engine.sampling.kv_cache import Cache
from knapper.errors import NotFound
from tests.engine.strange import CONFIGS, strange_model
from tests.engine.tiny import Kind, tiny_model

kinds: tuple[Kind, ...] = ("llama", "llama_untied", "qwen3")


def decoder_of(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = loader.load(directory, dtype)
    assert isinstance(decoder, Decoder)
    return decoder


def model_of(directory: Path, kind: str) -> Path:
    if kind in CONFIGS:
        return strange_model(directory, kind)
    return tiny_model(directory, kind="qwen3" if kind == "qwen3" else "llama")


def tokens_of(decoder: Decoder, lengths: Sequence[int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(decoder.config.vocab_size, (sum(lengths),), generator=generator)


def lora_of(decoder: Decoder, *, seed: int, rank: int = 4, scale: float = 2.0, only: Sequence[str] = ()) -> Lora:
    """Random in every target module (or in those whose name ends in one of `only`), with a B that is far from zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {target.name: target.shapes(rank) for target in decoder.config.lora_targets}
    wanted = {target: both for target, both in shapes.items() if not only or target.endswith(tuple(only))}
    return Lora(
        a={target: torch.randn(a_shape, generator=generator) * 0.1 for target, (a_shape, _) in wanted.items()},
        b={target: torch.randn(b_shape, generator=generator) * 0.1 for target, (_, b_shape) in wanted.items()},
        scale=scale,
    )


def prefill(
    decoder: Decoder, tokens_N: Tensor, lengths: Sequence[int], segments: Sequence[Segment]
) -> tuple[Tensor, Tensor]:
    positions_N = torch.cat([torch.arange(length) for length in lengths])
    return decoder.hidden_and_kv(tokens_N, positions_N, PackedAttention(lengths), segments)[:2]


def tensor_name(target: str) -> str:
    if target == "lm_head":
        return "lm_head.weight"
    _, index, linear = target.split(".")
    return f"model.layers.{index}.{'self_attn' if linear[0] in 'qkvo' else 'mlp'}.{linear}.weight"


def merged(directory: Path, merged_directory: Path, lora: Lora) -> Path:
    """A copy of the model with the adapter added to its weights: what the adapter must compute."""
    merged_directory.mkdir()
    for name in ("config.json", "generation_config.json"):
        (merged_directory / name).write_bytes((directory / name).read_bytes())
    tensors = load_file(directory / "model.safetensors")
    for target, a in lora.a.items():
        tensors[tensor_name(target)] += lora.scale * lora.b[target] @ a
    save_file(tensors, merged_directory / "model.safetensors", metadata={"format": "pt"})
    return merged_directory


@pytest.mark.parametrize("kind", kinds)
def test_logits_equal_those_of_transformers(tmp_path: Path, kind: Kind) -> None:
    directory = tiny_model(tmp_path, kind=kind)
    decoder = decoder_of(directory)
    tokens = tokens_of(decoder, [50])
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(tokens[None]).logits[0]
        logits = decoder.logits(decoder.hidden(tokens, [50], []), base)
    assert expected.std() > 0.5  # a constant would match anything
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama_untied", "qwen3"])
def test_an_adapter_computes_what_its_merged_weights_compute(tmp_path: Path, kind: Kind) -> None:
    directory = tiny_model(tmp_path / "model", kind=kind)
    decoder = decoder_of(directory)
    lora = lora_of(decoder, seed=1)
    reference = AutoModelForCausalLM.from_pretrained(merged(directory, tmp_path / "merged", lora), dtype=torch.float32)
    tokens = tokens_of(decoder, [40])
    adapt = [Segment(0, 40, lora)]
    with torch.no_grad():
        logits = decoder.logits(decoder.hidden(tokens, [40], adapt), Segments(adapt))
        expected = reference(tokens[None]).logits[0]
        plain = decoder.logits(decoder.hidden(tokens, [40], []), base)
    assert (plain - expected).abs().max() > 0.5
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


def test_gradients_equal_those_through_merged_weights(tmp_path: Path) -> None:
    directory = tiny_model(tmp_path, kind="llama_untied")
    decoder = decoder_of(directory)
    lora = lora_of(decoder, seed=1)
    leaves = [tensor.requires_grad_() for tensor in (*lora.a.values(), *lora.b.values())]
    tokens = tokens_of(decoder, [20, 12])
    weight = torch.randn(32, decoder.config.vocab_size, generator=torch.Generator().manual_seed(3))
    # A base segment between two of the adapter's: its rows give it no gradient, theirs add up.
    segments = [Segment(0, 14, lora), Segment(20, 32, lora)]
    logits = decoder.logits(decoder.hidden(tokens, [14, 6, 12], segments), Segments(segments))
    (logits * weight).sum().backward()
    gradients = [leaf.grad for leaf in leaves]

    for leaf in leaves:
        leaf.grad = None
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    originals = {tensor_name(target): reference.get_parameter(tensor_name(target)).detach() for target in lora.a}
    moved = {
        tensor_name(target): originals[tensor_name(target)] + lora.scale * lora.b[target] @ lora.a[target]
        for target in lora.a
    }
    for start, stop in ((0, 14), (20, 32)):
        out = torch.func.functional_call(reference, moved, (tokens[None, start:stop],))
        (out.logits[0] * weight[start:stop]).sum().backward(retain_graph=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad is not None
        assert gradient is not None
        assert leaf.grad.abs().max() > 0.1
        torch.testing.assert_close(gradient, leaf.grad, atol=1e-4 * float(leaf.grad.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "smollm3"])
def test_a_sequence_has_the_same_bits_alone_and_packed(
    tmp_path: Path, kind: str, dtype: torch.dtype, threads: int
) -> None:
    decoder = decoder_of(model_of(tmp_path, kind), dtype)
    lengths = [5, 33, 5, 70, 1, 33, 12]
    loras = [
        lora_of(decoder, seed=1),
        None,
        lora_of(decoder, seed=2, rank=7),
        None,
        lora_of(decoder, seed=3),
        None,
        None,
    ]
    tokens = tokens_of(decoder, lengths)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    segments = [Segment(s, s + n, lora) for s, n, lora in zip(starts, lengths, loras, strict=True)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            together = decoder.hidden(tokens, lengths, segments)
            for start, length, lora in zip(starts, lengths, loras, strict=True):
                alone = decoder.hidden(tokens[start : start + length], [length], [Segment(0, length, lora)])
                assert torch.equal(alone, together[start : start + length]), (start, length)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "smollm3"])
def test_decoding_step_by_step_equals_one_pass(tmp_path: Path, kind: str) -> None:
    """Several sequences of different lengths and adapters, over several pools, through moves from pool to pool."""
    decoder = decoder_of(model_of(tmp_path, kind))
    lengths, prompts = [100, 75, 140, 66], [30, 3, 120, 60]
    loras = [lora_of(decoder, seed=1), None, lora_of(decoder, seed=2, rank=7), None]
    loras[3] = loras[0]
    sequences = [tokens_of(decoder, [length], seed=index) for index, length in enumerate(lengths)]
    packed = torch.cat([sequence[:prompt] for sequence, prompt in zip(sequences, prompts, strict=True)])
    starts = [sum(prompts[:index]) for index in range(4)]
    hidden, kv = prefill(
        decoder, packed, prompts, [Segment(s, s + p, lora) for s, p, lora in zip(starts, prompts, loras, strict=True)]
    )
    cache = Cache(decoder.config, decoder.attention_dtype, decoder.device)
    slots = [cache.add(kv[:, :, s : s + p], p) for s, p in zip(starts, prompts, strict=True)]
    gradients = [list(hidden[s : s + p]) for s, p in zip(starts, prompts, strict=True)]
    stack = Stack([lora for lora in loras[:3] if lora is not None])
    while cache.rows:
        for index, slot in enumerate(slots):
            if slot in cache.rows and slot.length == lengths[index]:
                cache.remove(slot)
        if not cache.rows:
            break
        cache.reserve()
        order = [slots.index(slot) for slot in cache.rows]
        tokens = torch.stack([sequences[index][slots[index].length] for index in order])
        out = decoder.step(tokens, cache, GatheredLora(stack, [loras[index] for index in order], decoder.device))
        for row, index in enumerate(order):
            gradients[index].append(out[row])
    for index, length in enumerate(lengths):
        with torch.no_grad():
            expected = decoder.hidden(sequences[index], [length], [Segment(0, length, loras[index])])
        torch.testing.assert_close(torch.stack(gradients[index]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "smollm3"])
def test_a_decoding_sequence_has_the_same_bits_alone_and_in_a_crowd(tmp_path: Path, kind: str) -> None:
    decoder = decoder_of(model_of(tmp_path, kind))
    loras = [lora_of(decoder, seed=seed, rank=rank) for seed, rank in ((1, 4), (2, 9), (3, 16))]

    def decoded(members: Sequence[int]) -> dict[int, list[Tensor]]:
        cache = Cache(decoder.config, decoder.attention_dtype, decoder.device)
        slots = {}
        for index in members:
            prompt = 3 + 11 * index
            sequence = tokens_of(decoder, [prompt], seed=index)
            _, kv = prefill(decoder, sequence, [prompt], [Segment(0, prompt, loras[index % 3])])
            slots[index] = cache.add(kv, prompt)
        stack = Stack([loras[which] for which in sorted({index % 3 for index in members})])
        out: dict[int, list[Tensor]] = {index: [] for index in members}
        for step in range(80):
            cache.reserve()
            order = [next(index for index in members if slots[index] is slot) for slot in cache.rows]
            tokens = torch.tensor([(7 * step + 13 * index) % 256 for index in order])
            hidden = decoder.step(
                tokens, cache, GatheredLora(stack, [loras[index % 3] for index in order], decoder.device)
            )
            for row, index in enumerate(order):
                out[index].append(hidden[row])
        return out

    together = decoded(range(11))
    for index in (0, 4, 10):
        alone = decoded([index])[index]
        assert all(torch.equal(a, b) for a, b in zip(alone, together[index], strict=True)), index


def test_a_sequence_that_left_does_not_poison_its_place(tmp_path: Path) -> None:
    decoder = decoder_of(tiny_model(tmp_path))
    cache = Cache(decoder.config, decoder.attention_dtype, decoder.device)
    _, kv = prefill(decoder, tokens_of(decoder, [50]), [50], [])
    cache.add(kv, 50)
    broken = cache.add(torch.full_like(kv, torch.nan), 50)
    cache.remove(broken)
    slot = cache.add(kv[:, :, :10], 10)
    hidden = decoder.step(torch.tensor([1, 1]), cache, base)
    assert slot.length == 11
    assert hidden.isfinite().all()


def test_long_rope_equals_transformers(tmp_path: Path) -> None:
    directory = tiny_model(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config["rope_scaling"] = scaling
    (directory / "config.json").write_text(json.dumps(config))
    decoder = decoder_of(directory)
    tokens = tokens_of(decoder, [300])
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = decoder.logits(decoder.hidden(tokens, [300], []), base)
        torch.testing.assert_close(logits, reference(tokens[None]).logits[0], atol=2e-5, rtol=1e-5)
    del config["rope_scaling"]
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), **scaling}
    (directory / "config.json").write_text(json.dumps(config))
    assert ModelConfig.read(directory) == decoder.config


def test_sharded_weights_load_as_one_file(tmp_path: Path) -> None:
    directory = tiny_model(tmp_path)
    whole = decoder_of(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    tokens = tokens_of(whole, [9])
    assert torch.equal(decoder_of(directory).hidden(tokens, [9], []), whole.hidden(tokens, [9], []))


def test_wrong_weight_files_are_refused_by_name(tmp_path: Path) -> None:
    directory = tiny_model(tmp_path)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, complaint in (
        ({k: v for k, v in tensors.items() if k != name}, "up_proj.weight is missing"),
        ({**tensors, "model.surprise.weight": torch.zeros(2)}, "model.surprise.weight"),
        ({**tensors, name: torch.zeros(3, 3)}, r"is \[3, 3\]; config.json makes it \[128, 64\]"),
        ({**tensors, name: tensors[name].to(torch.int64)}, "int64"),
    ):
        save_file(changed, path)
        with pytest.raises(BrokenModel, match=complaint):
            decoder_of(directory)
    path.write_bytes(b"not safetensors")
    with pytest.raises(BrokenModel, match="cannot be read"):
        decoder_of(directory)
    path.unlink()
    with pytest.raises(NotFound, match="neither"):
        decoder_of(directory)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"model_type": "falcon", "architectures": ["FalconForCausalLM"]},
            "FalconForCausalLM.*llama, mistral, .*qwen2, qwen3",
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "much"}}, "factor is 'much'"),
        ({"rope_scaling": ["linear"]}, "rope_scaling is"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"], "use_sliding_window": True}, "layer_types is"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_key_value_heads": 3}, "do not divide"),
    ],
)
def test_unsupported_models_are_refused_by_name(tmp_path: Path, change: dict[str, object], complaint: str) -> None:
    directory = tiny_model(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UnsupportedModel, match=complaint):
        ModelConfig.read(directory)


def test_the_tiny_tokenizer_loads_in_transformers_and_keeps_text(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(tmp_path))
    sequence = "the cat and 猫"
    assert tokenizer.decode(tokenizer.encode(sequence)) == sequence
