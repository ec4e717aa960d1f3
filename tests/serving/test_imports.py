"""What a start imports: nothing that its first answers do not need. Counts, which load does not change."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import knapper
from tests.engine.tiny import tiny_model

_ROOT = Path(knapper.__file__).parent.parent
_NEVER = {
    "google.api_core", "google.cloud.pubsub_v1", "google.cloud.storage", "huggingface_hub", "jsonschema", "math_verify",
    "opentelemetry", "peft", "scipy", "sympy", "tinker", "transformers", "typer", "vllm",
}  # fmt: skip
_NEVER_OF_ONE_DEVICE = {  # the rest of torch.distributed torch itself imports
    "knapper.engine.ranks.start", "torch.distributed.elastic", "torch.distributed.fsdp", "torch.distributed.tensor",
}  # fmt: skip
_NEVER_OF_TORCH = {"torch._dynamo", "torch._inductor", "torch.onnx", "torch.utils.tensorboard"}


def _imported(entry: str, directory: Path, **environment: str) -> set[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KNAPPER_")}
    code = f"import {entry}, sys; getattr(sys.modules[{entry!r}], 'app', None); print('MODULES', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "KNAPPER_DATA": str(directory / "data"), "KNAPPER_DTYPE": "float32", **environment},
        cwd=_ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return set(done.stdout.rpartition("MODULES ")[2].split())


@pytest.mark.parametrize("entry", ["functions.train_step.main", "functions.sample.main"])
def test_an_engine_that_loaded_its_weights_imported_only_what_it_needs(tmp_path: Path, entry: str) -> None:
    directory = str(tiny_model(tmp_path / "model"))
    modules = _imported(entry, tmp_path, KNAPPER_MODEL_DIRECTORY=directory, KNAPPER_THREADS="1")
    assert "torch" in modules
    assert (modules & (_NEVER | _NEVER_OF_TORCH | _NEVER_OF_ONE_DEVICE | {"aiohttp"})) == set()
    assert len(modules) < 1900


@pytest.mark.parametrize(
    ("entry", "unneeded", "most"),
    [("functions.reward.main", {"torch", "tokenizers", "aiohttp"}, 850), ("gateway.app", {"torch"}, 1110)],
)
def test_what_computes_nothing_starts_without_torch(tmp_path: Path, entry: str, unneeded: set[str], most: int) -> None:
    modules = _imported(entry, tmp_path)
    assert "knapper.store" in modules
    assert (modules & (_NEVER | unneeded)) == set()
    assert len(modules) < most


@pytest.mark.parametrize("entry", ["functions.train_step.main", "functions.sample.main"])
def test_a_torch_that_is_broken_is_found_at_a_gate_and_stops_no_import(tmp_path: Path, entry: str) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libtorch_cpu.so: no such file')")
    modules = _imported(entry, tmp_path, KNAPPER_MODEL_DIRECTORY=str(tmp_path), PYTHONPATH=f"{tmp_path}:{_ROOT}")
    assert "knapper.serving.gates" in modules
    assert "torch" not in modules
