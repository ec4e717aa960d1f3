"""The base model of `knapper up`: located, checked, and refused in one line before anything is served."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from knapper import limits
from knapper.catalogue import servable
from knapper.catalogue.download import is_name, obtain
from knapper.engine.models.config import bounded_context, computed_by
from knapper.engine.models.spread import expect_spreadable
from knapper.errors import InvalidField, UserError
from knapper.settings import Settings
from knapper.state.model_record import ModelRecord

log = structlog.get_logger()


def chosen(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """The settings with the model's name and directory. Raises KnapperError if it is unavailable or unservable."""

    def accept(partial: Path) -> None:
        """Check before the weights are downloaded."""
        by = servable.expect_config(partial)
        located = _with(settings, settings.model, partial)
        servable.expect_libraries(located, by)
        servable.expect_rehearsed(located, environ, by)

    path = Path(settings.model).expanduser()
    try:
        directory = obtain(settings.model, settings.cache, say=log.info, accept=accept)
        name = str(directory) if path.is_dir() and not is_name(settings.model) else settings.model
        if path.is_dir() and "/" in name and is_name(name):
            log.info(f"model {name}: taken from the directory of that name; to use the hub's, start elsewhere")
        settings = _with(settings, name, directory)
        numbers = sum(file.numbers for file in servable.expect_files(directory).values())
    except OSError as error:
        raise UserError(
            f"model {settings.model!r}: {error.strerror or error} ({error.filename or settings.cache}). Free space, "
            "give the right to read and write there, or name another cache with KNAPPER_CACHE"
        ) from error
    by = computed_by(directory)
    expect_spreadable(settings)
    served(settings, dict.fromkeys(("train_step", "sample"), ""))  # its context is what the settings may ask for
    servable.expect_libraries(settings, by)
    servable.expect_rehearsed(settings, environ, by, numbers)
    if left_out := servable.not_served(directory):
        log.info(f"model {name}: its text is served; images are {left_out}")
    return settings


def listed(path: Path) -> list[str]:
    """The models of a file, a line each; # begins a comment. Raises InvalidField."""
    try:
        if not path.is_file():  # a device has no end, and a pipe may never have one
            raise InvalidField("models", str(path), "a text file that can be read")
        with path.open("rb") as file:
            data = file.read(limits.models_file_bytes_max + 1)
        if len(data) > limits.models_file_bytes_max:
            raise InvalidField("models", str(path), f"a file of at most {limits.models_file_bytes_max} bytes")
        lines = [line.partition("#")[0].strip() for line in data.decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidField("models", str(path), "a text file that can be read", str(error)) from error
    if not any(lines):
        raise InvalidField("models", str(path), "a file that names a model a line", "It names none")
    return [line for line in lines if line]


def all_chosen(settings: Settings, environ: Mapping[str, str], models: Sequence[str]) -> list[Settings]:
    """For each of the models, the settings of its engine. Raises KnapperError as `chosen` does, or for a double."""
    served = [chosen(msgspec.structs.replace(settings, model=model), environ) for model in models]
    if len(served) > limits.models_declared_max:
        raise InvalidField("model", len(served), f"at most {limits.models_declared_max} models")
    names = [each.model for each in served]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise InvalidField("model", double, "each model once")
    together = [msgspec.structs.replace(each, engines=len(served)) for each in served]
    for each in together:
        expect_spreadable(each)
    return together


def served(settings: Settings, urls: Mapping[str, str]) -> ModelRecord:
    """The model's record in the catalogue; `urls`: of its functions."""
    directory = Path(settings.model_directory)
    record = servable.record_of(
        directory,
        settings.model,
        dtype=settings.dtype,
        train_step_url=urls["train_step"],
        sample_url=urls["sample"],
    )
    context = bounded_context(record.context, settings.context)
    return msgspec.structs.replace(record, computed_by=computed_by(directory), context=context)


def _with(settings: Settings, name: str, directory: Path) -> Settings:
    return msgspec.structs.replace(settings, model=name, model_directory=str(directory))
