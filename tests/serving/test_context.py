"""KNAPPER_CONTEXT bounds the texts that are served; more than the model has, or the memory, ends the start."""

import asyncio
from pathlib import Path

import pytest

from knapper.engine import memory
from knapper.engine.memory import CARDS, ModelBytes
from knapper.engine.memory_table import MODELS
from knapper.engine.models.loader import load
from knapper.errors import ContextLengthExceeded, InvalidField
from knapper.local import base_model
from knapper.serving import engine
from knapper.settings import Settings
from tests.engine.runs import tiny_trainer
from tests.engine.sampling.test_scheduler import House, prompt_of, request
from tests.engine.tiny import context, tiny_model


def settings(directory: Path, wanted: int) -> Settings:
    return Settings.load({"KNAPPER_MODEL_DIRECTORY": str(directory), "KNAPPER_CONTEXT": str(wanted)})


def test_texts_end_where_it_says(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.decoder.config = load(tmp_path, context=100).config  # type: ignore[assignment]  # a native model's
    assert house.run(request(prompt=prompt_of(90), max_tokens=None))[0].sequences[0].tokens.size == 10
    with pytest.raises(ContextLengthExceeded, match="context length is 100 tokens"):
        asyncio.run(house.sampler.sample(request(prompt=prompt_of(100))))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_it_holds_for_models_of_transformers_too(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    assert tiny_trainer(directory, "gpt_neox").decoder.config.context > 64
    model = load(directory, context=64)
    assert model.config.context == model.context_positions == 64


def test_more_than_the_model_has_is_refused(tmp_path: Path) -> None:
    directory = tiny_model(tmp_path)
    said = rf"KNAPPER_CONTEXT is {context + 1}; allowed: up to {context}, the model's own context"
    with pytest.raises(InvalidField, match=said):
        load(directory, context=context + 1)
    urls = {"train_step": "", "sample": ""}
    assert base_model.served(settings(directory, 100), urls).context == 100
    assert base_model.served(settings(directory, 0), urls).context == context
    with pytest.raises(InvalidField, match=said):
        base_model.served(settings(directory, context + 1), urls)


def test_more_than_the_memory_holds_ends_the_start_with_what_fits(tmp_path: Path) -> None:
    """The model's own context only warns: what is too long is refused when it comes."""
    model = load(tiny_model(tmp_path))
    with pytest.raises(InvalidField, match="KNAPPER_CONTEXT is 400; allowed: up to 0: for so many tokens of samples"):
        engine._account(settings(tmp_path, 400), model, planned=1 << 60, gathered=0)
    assert engine._account(settings(tmp_path, 0), model, planned=1 << 60, gathered=0).kv_tokens == 0
    assert engine._account(settings(tmp_path, 400), model, planned=0, gathered=0).kv_tokens >= 400


def test_where_vllm_samples_training_has_the_memory_of_the_engines_own_samples() -> None:
    model = ModelBytes.planned(MODELS["Qwen3-8B"])
    left = memory.planned_left(CARDS["H100 (80 GB)"], 0.45, model.weights)
    both, trained = (memory.divide(left, model, 0, is_cpu=False, samples=samples) for samples in (True, False))
    assert 512 <= trained.kv_tokens <= 513
    assert trained.datum_rows_max is not None
    assert both.datum_rows_max is not None
    assert trained.datum_rows_max > 1.5 * both.datum_rows_max
    assert trained.total == both.total
