"""A file of quotas, in YAML or JSON: all quotas there are. A tenant or field that it does not name has none.

default: {runs: 5, rank: 32}
tenants:
  alice: {runs: 20, bytes: 50GiB, tokens_a_day: 10M, samples_in_flight: 64, rank: unlimited}
"""

from pathlib import Path

import structlog

from knapper import limits
from knapper.errors import InvalidField, UserError
from knapper.jobs import yaml_document
from knapper.jobs.yaml_document import JobError
from knapper.state import quotas
from knapper.state.quotas import QuotaBook, Quotas

log = structlog.get_logger()


def read(path: Path) -> Quotas:
    """The quotas of the file. Raises UserError, which names the line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidField("the file of quotas", str(path), "a file that can be read", str(error)) from error
    return parse(path, data)


def parse(path: Path, data: bytes) -> Quotas:
    """Raises UserError, which names the line. `path`: for its message."""
    if not data.strip():
        return Quotas()
    try:
        document = yaml_document.read(data, limits.quotas_file_bytes_max)
    except JobError as error:
        raise UserError(f"{path}, line {error.line}: {str(error).partition(': ')[2]}") from error
    try:
        return quotas.parse(document.content)
    except InvalidField as error:
        line = document.line(yaml_document.path_of(error.field or ""))
        raise UserError(f"{path}, line {line}: {error}") from error


class QuotaFile:
    """Keeps the store's quotas equal to the file. Called often, it reads a file, and writes only changes."""

    def __init__(self, path: Path, book: QuotaBook) -> None:
        self._path = path
        self._book = book
        self._applied: bytes | None = None
        self._refused: bytes | None = None

    async def apply(self) -> bool:
        """True if the file changed the quotas. Raises UserError for the first content; a later wrong one is logged."""
        try:
            data = self._path.read_bytes()
        except OSError as error:
            data = str(error).encode()
            if self._applied is None:
                raise InvalidField("KNAPPER_QUOTAS", str(self._path), "a file that can be read", str(error)) from error
        if data in (self._applied, self._refused):
            return False
        try:
            quotas = read(self._path)
        except UserError as error:
            if self._applied is None:
                raise
            self._refused = data
            log.error("the file of quotas is wrong: those before it stay in force", reason=str(error))
            return False
        before = await self._book.newest()
        after = await self._book.change(lambda _: quotas)
        self._applied, self._refused = data, None
        return before != after
