"""Whether a model directory can be served, as far as that can be told before anybody computes. Loads no torch.

What is asked, in this order: config.json, the weight files' headers, the tokenizer, the libraries that are there; and
of torch and transformers, in a process of their own, only what these leave open (knapper.engine.models.preflight).
"""

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from knapper.catalogue.served_models import record_of
from knapper.catalogue.tokenizer import Language
from knapper.engine import host_memory
from knapper.engine.models import weight_files
from knapper.engine.models.config import ComputedBy, ModelConfig, computed_by, expect_text_model
from knapper.engine.models.fields import read_json
from knapper.errors import InvalidField, UserError
from knapper.settings import Settings

_REFUSED: Final = 3  # knapper.engine.models.preflight's exit status
_REHEARSAL_S: Final = 300.0  # more than imports take on the slowest disk


def expect_files(directory: Path) -> dict[str, weight_files.TensorHeader]:
    """The tensors of a directory that can be served, by name. Raises UserError for the first thing that is wrong."""
    try:
        by = expect_config(directory)
        if by == "native":
            found = weight_files.expect_promised(directory, ModelConfig.read(directory))
        else:
            found = weight_files.entries(directory)
    except OSError as error:
        raise UserError(
            f"model {directory} cannot be read: {error.strerror}: {error.filename}; give this user the right to read it"
        ) from error
    Language.read(directory)
    return found


def expect_config(directory: Path) -> ComputedBy:
    """Who would compute it, by its config.json. Raises UserError for a model that neither would."""
    raw = read_json(directory / "config.json")
    if raw is not None:
        expect_text_model(raw, directory)
    record_of(directory, str(directory), dtype="", train_step_url="", sample_url="")
    return computed_by(directory)


def expect_libraries(settings: Settings, by: ComputedBy) -> None:
    """Raises UserError for what the engine would import and is not installed, and for what vLLM does not sample."""
    wanted = {"torch": "pip install 'knapper[train]'"}
    if by == "transformers":
        wanted["transformers"] = "pip install 'knapper[train]'"
    if settings.sampler == "vllm":
        wanted["vllm"] = "see docs/vllm.md, or unset KNAPPER_SAMPLER"
        if by == "transformers":
            allowed = f"torch for {settings.model}, which transformers computes"
            raise InvalidField("KNAPPER_SAMPLER", settings.sampler, allowed)
    for name, todo in wanted.items():
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed in {sys.prefix}, and {settings.model} needs it: {todo}")


def expect_rehearsed(settings: Settings, environ: Mapping[str, str], by: ComputedBy, numbers: int = 0) -> None:
    """Ask torch, where only it can tell: another architecture, a device that was chosen, more weights than memory.

    Raises UserError with what it says. `numbers`: of the weights.
    """
    least = numbers * (4 if settings.dtype == "float32" else 2)
    chosen = settings.device not in ("auto", "cpu") or settings.gpu_memory_share != 1
    if by == "native" and not chosen and least <= host_memory.available() + host_memory.swap():
        return
    outer = {name: value for name, value in environ.items() if not name.startswith("KNAPPER_")}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "knapper.engine.models.preflight"], capture_output=True, text=True,
            env={**outer, **settings.environment()}, timeout=_REHEARSAL_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return  # the engine will tell
    if done.returncode == _REFUSED:
        raise UserError(done.stdout.strip().splitlines()[-1])
