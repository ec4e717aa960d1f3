"""Models that a directory declares: one JSON file a model, which the gateway publishes in the catalogue.

On a cluster the directory is a mounted ConfigMap, which `knapper deploy add` writes: deploying needs no access to the
store, and the files change under a running gateway. `knapper up` has no such directory: it publishes its model.
"""

from pathlib import Path

import msgspec

from knapper import limits
from knapper.catalogue.served_models import Catalogue
from knapper.errors import InvalidField
from knapper.state.model_record import ModelRecord


def encode(record: ModelRecord) -> str:
    """The text of a model's file, from which `read` gives an equal record."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2).decode() + "\n"


def read(directory: Path) -> list[ModelRecord]:
    """The directory's models, by file name. Raises InvalidField for a file that is no model."""
    try:
        paths = sorted(path for path in directory.glob("*.json") if not path.name.startswith("."))
    except OSError as error:
        raise InvalidField("KNAPPER_MODELS", str(directory), "a directory that can be read", str(error)) from error
    if len(paths) > limits.models_declared_max:
        raise InvalidField(
            "KNAPPER_MODELS", str(directory), f"at most {limits.models_declared_max} files, and there are {len(paths)}"
        )
    records = [_record(path) for path in paths]
    names = [record.name for record in records]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise InvalidField("KNAPPER_MODELS", str(directory), "one file a model", f"{double!r} is declared twice")
    return records


def _record(path: Path) -> ModelRecord:
    try:
        with path.open("rb") as file:
            data = file.read(limits.model_record_bytes_max + 1)
        if len(data) > limits.model_record_bytes_max:
            raise InvalidField("KNAPPER_MODELS", str(path), f"a file of at most {limits.model_record_bytes_max} bytes")
        return msgspec.json.decode(data, type=ModelRecord)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        allowed = "a model as `knapper deploy add --dry-run` prints it"
        raise InvalidField("KNAPPER_MODELS", str(path), allowed, str(error)) from error


class Declared:
    """Keeps the catalogue equal to the directory. Called often, it writes only changes."""

    def __init__(self, directory: Path, catalogue: Catalogue) -> None:
        self._directory = directory
        self._catalogue = catalogue
        self._published: list[ModelRecord] | None = None

    async def in_store(self) -> bool:
        """Whether all that this process published is in the store. False: another store lies there now."""
        return all([await self._catalogue.has_record(record.name) for record in self._published or []])

    async def publish(self) -> list[str]:
        """The names that are served now, if that changed; else nothing. Raises KnapperError, and then tries again."""
        records = read(self._directory)
        if records == self._published:
            return []
        await self._catalogue.serve_exactly(records)
        self._published = records
        return [record.name for record in records]
