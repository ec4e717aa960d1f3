"""Whether a model can be spread over several devices, as far as settings and config.json say it. Loads no torch."""

from pathlib import Path

from knapper.engine.models.config import computed_by
from knapper.errors import InvalidField
from knapper.settings import Settings, variable


def expect_spreadable(settings: Settings) -> None:
    """Raises InvalidField where this process, or this machine, could not have so many devices for its model."""
    if settings.devices == 1:
        return
    if settings.device == "mps":
        raise _refused(settings, "1 on mps")
    if settings.engines > 1:
        raise _refused(settings, f"1 where {settings.engines} base models share a machine")
    if settings.pod_snapshot:
        raise _refused(settings, "1 with KNAPPER_POD_SNAPSHOT, which would keep one rank of them")
    directory = Path(settings.model_directory)
    if (directory / "config.json").is_file() and computed_by(directory) != "native":
        raise _refused(settings, "1 for a model that transformers computes: native ones alone are spread")


def _refused(settings: Settings, allowed: str) -> InvalidField:
    return InvalidField(variable("devices"), settings.devices, allowed)
