"""GGUF by llama.cpp's programs: what is asked of them, what they say, and that their file is the merged model.

The programs are not in any package that could be a dependency. Here a script stands for the converter, with the options
of llama.cpp's, and writes the few tensors that are looked at. With LLAMA_CPP naming llama.cpp's sources, the long test
runs the real one on SmolLM2; if llama-cpp-python is installed, it computes what is compared.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knapper.catalogue import smollm2_gguf
from knapper.catalogue.download import SMOLLM2, obtain
from knapper.errors import UserError
from knapper.export import adapter, gguf, merge
from knapper.export.gguf import SCRIPT, Tools
from knapper.settings import Settings
from tests.export.test_merge import ALL, trained

STAND_IN = """
import argparse, gguf, numpy, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto"])
asked = parser.parse_args()
if not pathlib.Path(asked.model, "config.json").is_file():
    sys.exit("no config.json")
writer = gguf.GGUFWriter(asked.outfile, "llama")
for name in {names}:
    writer.add_tensor(name, numpy.zeros((2, 32), numpy.float32))
for percent in (5, 50, 100):
    print(f"Writing: {{percent:3}}%|###", end="\\r", file=sys.stderr)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def tools(tmp_path: Path, *names: str) -> Tools:
    (tmp_path / SCRIPT).write_text(STAND_IN.format(names=names or ("token_embd.weight",)))
    return Tools.find(tmp_path, ["f16"])


def model(tmp_path: Path) -> Path:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    return tmp_path / "merged"


def test_files_are_written_once_with_progress(tmp_path: Path) -> None:
    said: list[str] = []
    merged, programs = model(tmp_path), tools(tmp_path)
    wanted = [tmp_path / "mine-q8_0.gguf", tmp_path / "mine-f16.gguf"]
    assert gguf.write(merged, tmp_path, "mine", ["q8_0", "f16"], programs, said.append, untied=False) == wanted
    assert said == ["converting to q8_0", "  50 %", "  100 %", str(wanted[0]),
                    "converting to f16", "  50 %", "  100 %", str(wanted[1])]  # fmt: skip
    wanted[1].unlink()
    (tmp_path / ".mine-f16.gguf.part").write_bytes(b"of a kill")
    said.clear()
    gguf.write(merged, tmp_path, "mine", ["q8_0", "f16"], programs, said.append, untied=False)
    assert said[:2] == [f"{wanted[0]} was there", "converting to f16"]
    assert not [*tmp_path.glob(".*.part")]


def test_a_file_without_the_trained_head_is_refused(tmp_path: Path) -> None:
    """llama.cpp has architectures whose head is always the embedding; its converter drops the head without a word."""
    merged = model(tmp_path)
    with pytest.raises(UserError, match="the GGUF would be another model"):
        gguf.write(merged, tmp_path, "mine", ["f16"], tools(tmp_path), print, untied=True)
    assert not [*tmp_path.glob("*.gguf*")]
    with_head = tools(tmp_path, "token_embd.weight", "output.weight")
    assert gguf.write(merged, tmp_path, "mine", ["f16"], with_head, print, untied=True)[0].exists()


def test_a_program_that_fails_is_quoted(tmp_path: Path) -> None:
    programs = tools(tmp_path)
    with pytest.raises(UserError, match=r"convert_hf_to_gguf.py failed: no config.json"):
        gguf.write(tmp_path / "nowhere", tmp_path, "mine", ["f16"], programs, print, untied=False)
    (tmp_path / SCRIPT).write_text("import no_such_module_at_all")
    with pytest.raises(UserError, match="needs no_such_module_at_all; install it here: pip install"):
        gguf.write(model(tmp_path), tmp_path, "mine", ["f16"], programs, print, untied=False)


def test_a_quantized_file_is_made_of_a_wider_one(tmp_path: Path) -> None:
    quantizer = tmp_path / "build/bin/llama-quantize"
    quantizer.parent.mkdir(parents=True)
    quantizer.write_text('#!/bin/sh\ntest "$3" = Q4_K_M && cp "$1" "$2"\n')
    quantizer.chmod(0o755)
    tools(tmp_path)
    programs = Tools.find(tmp_path, ["q4_k_m"])
    assert gguf.write(model(tmp_path), tmp_path, "mine", ["q4_k_m"], programs, print, untied=False)[0].exists()
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["mine-q4_k_m.gguf"], "the wider one is gone"
    assert not [*tmp_path.glob(".*.gguf")]


# ---- the real programs, on a real model

TEXT = "The quick brown fox jumps over the lazy dog, and then it wonders what to do with the 27 days that are left."


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return obtain(SMOLLM2, Settings.load(os.environ).cache)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("modules", [ALL, ["q_proj", "lm_head"]], ids=["linears", "a tied head"])
def test_smollm2_merges_exactly(smollm2: Path, modules: list[str], tmp_path: Path) -> None:
    wanted = trained(smollm2, tmp_path / "adapter", std=0.02, target_modules=modules)
    merge.merge(merge.plan(smollm2, adapter.read(tmp_path / "adapter")), tmp_path / "out", print)
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(_logprobs(tmp_path / "out", ids), wanted, atol=2e-3, rtol=1e-3)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names llama.cpp's sources")
def test_smollm2s_gguf_is_the_merged_model(smollm2: Path, tmp_path: Path) -> None:
    """Read back by our own reader of SmolLM2's GGUF files, and by llama.cpp where its Python package is installed."""
    trained(smollm2, tmp_path / "adapter", std=0.02, target_modules=ALL)
    merge.merge(merge.plan(smollm2, adapter.read(tmp_path / "adapter")), tmp_path / "merged", print)
    types = ["f16", "q8_0"]
    programs = Tools.find(Path(os.environ["LLAMA_CPP"]), types)
    files = gguf.write(tmp_path / "merged", tmp_path, "mine", types, programs, print, untied=False)
    ids = torch.tensor([AutoTokenizer.from_pretrained(smollm2).encode(TEXT)])
    wanted = _logprobs(tmp_path / "merged", ids)[0]
    targets = ids[0, 1:]
    for file, tolerance in zip(files, (0.02, 0.6), strict=True):
        (back := tmp_path / f"back-{file.stem}").mkdir()
        smollm2_gguf.convert(file, back)
        found = [_logprobs(back, ids)[0]]
        if importlib.util.find_spec("llama_cpp") is not None:
            found.append(_by_llama_cpp(file, ids[0].tolist()))
        for logprobs in found:
            assert float((logprobs - wanted)[:-1].gather(1, targets[:, None]).abs().max()) < tolerance
            assert float((logprobs.argmax(1) == wanted.argmax(1)).float().mean()) > 0.9


def _logprobs(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return torch.log_softmax(loaded.eval()(input_ids=ids).logits, -1)


def _by_llama_cpp(file: Path, ids: list[int]) -> torch.Tensor:
    llama_cpp = importlib.import_module("llama_cpp")
    llama = llama_cpp.Llama(str(file), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    assert llama.tokenize(TEXT.encode(), add_bos=False) == ids
    llama.eval(ids)
    return torch.log_softmax(torch.from_numpy(np.array(llama.scores[: len(ids)])).float(), -1)
