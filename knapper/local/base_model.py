"""The base model of `knapper up`: located, checked, and refused in one line before anything is served."""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog

from knapper.catalogue import servable
from knapper.catalogue.download import is_name, obtain
from knapper.catalogue.served_models import record_of
from knapper.engine.models.config import computed_by
from knapper.errors import UserError
from knapper.settings import Settings
from knapper.state.model_record import ModelRecord

log = structlog.get_logger()


def chosen(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """The settings with the model's name and directory. Raises KnapperError if it is unavailable or unservable."""

    def accept(partial: Path) -> None:
        """Check before the weights are downloaded."""
        by = servable.expect_config(partial)
        servable.expect_libraries(settings, by)
        servable.expect_rehearsed(_with(settings, settings.model, partial), environ, by)

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
    servable.expect_libraries(settings, by)
    servable.expect_rehearsed(settings, environ, by, numbers)
    return settings


def served(settings: Settings) -> ModelRecord:
    """The model's record in the catalogue."""
    directory = Path(settings.model_directory)
    record = record_of(
        directory,
        settings.model,
        dtype=settings.dtype,
        train_step_url=settings.train_step_url,
        sample_url=settings.sample_url,
    )
    return msgspec.structs.replace(record, computed_by=computed_by(directory))


def _with(settings: Settings, name: str, directory: Path) -> Settings:
    return msgspec.structs.replace(settings, model=name, model_directory=str(directory))
