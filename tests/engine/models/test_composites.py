"""The text part of a checkpoint of images and text equals, of texts, the whole model of transformers with PEFT."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from knapper.catalogue import servable
from knapper.engine.layers.lora_grouped import base
from knapper.engine.models import loader, weight_files
from knapper.engine.models.composite import PREPROCESSOR
from knapper.engine.models.config import ModelConfig, computed_by
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.registry import COMPOSITES
from knapper.engine.models.rotary import Rope
from knapper.engine.models.tensor_header import BrokenModel
from knapper.engine.training.trainer import RunState, Trainer
from knapper.errors import InvalidField, UserError
from knapper.local.banner import banner
from knapper.settings import Settings
from knapper.text.sizes import sized
from tests.engine import peft_experts
from tests.engine.composites import CASES, COMPOSITE, LAYOUTS, composite_model
from tests.engine.models.test_decoder import decoder_of, tokens_of
from tests.engine.pictures import picture_model
from tests.engine.runs import datum, done, request, spec
from tests.engine.strange import strange_model
from tests.engine.test_peft_parity import expect_equal_steps, load_in_peft, plain_logprobs

# PEFT warns about tied heads (docs/decisions/0002) and about a base model that is not on the hub.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),  # PEFT forgets what it fused
]
LENGTHS = (19, 90, 7, 200)  # beyond the windows, which are of 16 tokens
OF_IMAGES = ("vision_tower", "multi_modal_projector", "visual")


def test_every_composite_has_a_model_here() -> None:
    assert COMPOSITE.keys() == COMPOSITES.keys()


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_a_run_equals_peft_in_the_whole_model(tmp_path: Path, kind: str, layout: str) -> None:
    """In log-probabilities, gradients and weights; so does the merged model. Qwen's positions have three axes there."""
    trainer = Trainer(loader.load(composite_model(tmp_path / "model", kind, layout)))
    assert isinstance(trainer.decoder, Decoder)
    assert trainer.decoder.weights.tied == (kind == "gemma3")
    state = trainer.create(spec())
    model = load_whole(state, tmp_path, "adapter", trainable=True)
    model.eval()  # Gemma's training mode asks for the types of tokens
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainer.decoder.config.has_experts:  # of experts PEFT keeps zeros, too
        assert sum(p.numel() for p in trainable) == state.layout.numel  # none in the layers of images
    rng = np.random.default_rng(5)
    state = expect_equal_steps(trainer, state, model, ("cross_entropy", "importance_sampling"), LENGTHS, rng)
    expect_merged(trainer, state, tmp_path, datum(90, "importance_sampling", rng))


def load_whole(state: RunState, at: Path, name: str, *, trainable: bool = False) -> torch.nn.Module:
    """PEFT joins the pairs of experts in a model of text; of those that have one as a part in Kimi's alone."""
    mixed = any(target.experts for target in state.layout.lora_targets)
    unread = mixed and json.loads((at / "model" / "config.json").read_text())["model_type"] != "kimi_k25"
    with pytest.warns(UserWarning, match="missing adapter keys.*experts") if unread else nullcontext():
        model = load_in_peft(state, at / "model", at / name, trainable=trainable, auto=AutoModelForImageTextToText)
    peft_experts.fill(model, state.layout.matrices(state.weights_P))
    return model


def expect_merged(trainer: Trainer, state: Any, at: Path, example: Any) -> None:
    _, output = done(trainer.forward_backward(state, request([example], "importance_sampling")))
    moved: Any = load_whole(state, at, "moved")
    merged = moved.merge_and_unload().eval()
    with torch.no_grad():
        logprobs = plain_logprobs(merged, example)
    np.testing.assert_allclose(output.outputs[0]["logprobs"], logprobs.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_for_images_is_neither_counted_nor_read(tmp_path: Path, layout: str) -> None:
    directory = composite_model(tmp_path, "gemma3", layout)
    config = ModelConfig.read(directory)
    found = weight_files.text_entries(directory)
    assert {name: header.shape for name, header in found.items()} == dict(weight_files.promised(config))
    assert servable.expect_files(directory).keys() == found.keys()
    stored = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    of_images = {name for name in stored if any(part in name for part in OF_IMAGES)}
    assert of_images
    skipped = sum(stored[name].nbytes for name in of_images)
    assert weight_files.skipped_bytes(directory) == skipped
    read = sum(end - at for path in directory.glob("*.safetensors") for at, end in weight_files.read_spans(path))
    assert read == sum(tensor.nbytes for tensor in stored.values()) - skipped
    before = logits(directory)
    for path in directory.glob("*.safetensors"):
        _overwrite(path, of_images)
    assert torch.equal(before, logits(directory))


def test_where_images_are_served_their_tensors_are_read_ahead_too(tmp_path: Path) -> None:
    directory = picture_model(tmp_path)
    stored = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    read = sum(end - at for path in directory.glob("*.safetensors") for at, end in weight_files.read_spans(path))
    assert read == sum(tensor.nbytes for tensor in stored.values()) - weight_files.skipped_bytes(directory)
    (directory / PREPROCESSOR).unlink()  # its text alone
    text = sum(end - at for path in directory.glob("*.safetensors") for at, end in weight_files.read_spans(path))
    assert text == sum(header.nbytes for header in weight_files.text_entries(directory).values()) < read


@pytest.mark.parametrize("name", ["mtp.layers.0.x.weight", "mtp.norm.weight"])
def test_what_drafts_tokens_ahead_is_left_out(tmp_path: Path, name: str) -> None:
    """In Qwen 3.5 it lies beside the text part; in a model of text alone too."""
    for directory in (composite_model(tmp_path / "whole", "qwen3_5"), strange_model(tmp_path / "text", "qwen3_5")):
        before = logits(directory)
        path = sorted(directory.glob("*.safetensors"))[0]
        save_file({**load_file(path), name: torch.full((3,), float("nan"))}, path, {"format": "pt"})
        assert torch.equal(before, logits(directory))


def logits(directory: Path) -> Tensor:
    decoder = decoder_of(directory)
    with torch.no_grad():
        return decoder.logits(decoder.hidden(tokens_of(decoder, [40]), [40], []), base)


def _overwrite(path: Path, names: set[str]) -> None:
    tensors = {name: tensor * float("nan") if name in names else tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def test_a_model_of_text_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"model.visual.x": torch.zeros(3)}, path)
    assert weight_files.read_spans(path) == [(0, path.stat().st_size)]
    assert weight_files.skipped_bytes(tmp_path) == 0
    assert servable.not_served(tmp_path) == ""


def test_the_banner_says_that_images_are_not_served_and_what_was_skipped(tmp_path: Path) -> None:
    directory = composite_model(tmp_path, "gemma3")
    record = servable.record_of(directory, "org/composite", dtype="float32", train_step_url="-", sample_url="-")
    text = AutoConfig.from_pretrained(directory).text_config
    assert (record.vocab, record.context) == (text.vocab_size, text.max_position_embeddings)
    assert record.arch == "Gemma3ForConditionalGeneration"
    lines = banner(Settings.load({}), [record], "http://127.0.0.1:1")
    size = sized(weight_files.skipped_bytes(directory))
    assert f"  images not served: {size} of weights that a text does not need are skipped" in lines


def test_vllm_does_not_sample_a_text_part(tmp_path: Path) -> None:
    directory = composite_model(tmp_path, "gemma3")
    settings = Settings.load({"KNAPPER_MODEL_DIRECTORY": str(directory), "KNAPPER_SAMPLER": "vllm"})
    with pytest.raises(InvalidField, match=r"KNAPPER_SAMPLER.*only the text part"):
        servable.expect_libraries(settings, "native")


def test_a_silent_text_config_means_what_transformers_reads(tmp_path: Path) -> None:
    """That of Gemma 3 4B, which leaves out its vocabulary, its heads and its context."""
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps({**whole, "text_config": text, "vision_config": {}}))
    config, expected = ModelConfig.read(tmp_path), AutoConfig.from_pretrained(tmp_path).text_config
    assert computed_by(tmp_path) == "native"
    assert config.eos == (1, 106)
    assert (config.vocab_size, config.context) == (expected.vocab_size, expected.max_position_embeddings)
    record = servable.record_of(tmp_path, "org/composite", dtype="float32", train_step_url="-", sample_url="-")
    assert (record.vocab, record.context) == (config.vocab_size, config.context)
    assert config.kv_shape == (34, expected.num_key_value_heads, expected.head_dim)
    assert {mixer.heads for mixer in config.attention} == {expected.num_attention_heads}
    windows = [mixer.scores.window is not None for mixer in config.attention]
    assert windows == [kind == "sliding_attention" for kind in expected.layer_types]


def test_a_flat_config_means_what_transformers_reads(tmp_path: Path) -> None:
    """That of Qwen 2.5 VL 3B, with rotary positions of three axes."""
    raw = {
        "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], "eos_token_id": 151645,
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "max_position_embeddings": 128000, "max_window_layers": 70, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
        "vocab_size": 151936, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**raw, "vision_config": {}}))
    config, expected = ModelConfig.read(tmp_path), AutoConfig.from_pretrained(tmp_path)
    text = expected.text_config
    assert (config.vocab_size, config.context) == (text.vocab_size, text.max_position_embeddings)
    assert config.tied == expected.tie_word_embeddings
    ropes = {mixer.rope for mixer in config.attention}
    assert ropes == {Rope(text.rope_parameters["rope_theta"], 128)}
    assert text.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"text_config": None}, "text_config is None; expected an object"),
        ({"text_config": []}, r"text_config is \[\]; expected an object"),
        ({"text_config": {"model_type": "llama"}}, "text_config has model_type 'llama'; supported in gemma3"),
        ({"text_config": {"hidden_size": "64"}}, "text_config, of a model of type gemma3: .*hidden_size is '64'"),
        ({"text_config": {"layer_types": ["x"]}}, "text_config, of a model of type gemma3: .*layer_types"),
        ({"text_config": {"use_bidirectional_attention": True}}, "text_config, .*use_bidirectional_attention"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_a_damaged_text_config_is_refused_by_name(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    """Transformers, which computes no part of a model, is not asked."""
    raw = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps({**raw, **change, "vision_config": {}}))
    for refuse in (servable.expect_config, ModelConfig.read, computed_by, loader.load, loader.expect_architecture):
        with pytest.raises(UserError, match=complaint) as refused:
            refuse(tmp_path)
        assert refused.value.code == "unsupported_model"


@pytest.mark.parametrize(
    ("stored", "complaint"),
    [
        ("audio_tower.x", "1 tensors that the architecture does not have: audio_tower.x"),
        ("language_model.model.norm.weight", "are the same tensor. Keep one"),
    ],
)
def test_tensors_of_no_known_part_are_refused(tmp_path: Path, stored: str, complaint: str) -> None:
    directory = composite_model(tmp_path, "gemma3")
    path = directory / "model-0.safetensors"
    save_file({**load_file(path), stored: torch.zeros(64)}, path)
    with safe_open(path, "pt") as file:
        assert stored in file.keys()  # noqa: SIM118  it is no mapping
    with pytest.raises(BrokenModel, match=complaint):
        loader.load(directory)


def test_experts_in_one_tensor_are_those_one_by_one(tmp_path: Path) -> None:
    """Published files have them joined, and files of transformers' text models one by one."""
    directory = strange_model(tmp_path, "qwen3_5_moe")
    expected, path = logits(directory), directory / "model.safetensors"
    tensors, at = load_file(path), "model.layers.0.mlp.experts"
    each = [{side: tensors.pop(f"{at}.{n}.{side}_proj.weight") for side in ("gate", "up", "down")} for n in range(6)]
    joined = {
        f"{at}.gate_up_proj": torch.stack([torch.cat([one["gate"], one["up"]]) for one in each]),
        f"{at}.down_proj": torch.stack([one["down"] for one in each]),
    }
    save_file({**tensors, **joined}, path, {"format": "pt"})
    assert torch.equal(expected, logits(directory))
    save_file({**tensors, **joined, f"{at}.down_proj": joined[f"{at}.down_proj"][:5]}, path, {"format": "pt"})
    with pytest.raises(BrokenModel, match=r"down_proj is \[5, 64, 48\]; .* makes it \[6, 64, 48\]"):
        loader.load(directory)
    save_file({**tensors, **joined, f"{at}.0.up_proj.weight": each[0]["up"]}, path, {"format": "pt"})
    with pytest.raises(BrokenModel, match=r"does not have: model.layers.0.mlp.experts.0.up_proj"):
        loader.load(directory)
