"""The files of a checkpoint, for whoever may read it: listed, and each whole or in ranges, so that downloads resume."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import ranges
from gateway.rest import responses
from gateway.rest.checkpoints import path_of
from gateway.rest.weights import index_of
from gateway.services import services_of
from gateway.tenants import tenant_of
from knapper.errors import NotFound, UserError
from knapper.exchange import ListedObject
from knapper.state.checkpoints import Checkpoint
from knapper.state.journal import bundles
from knapper.state.journal.records import Index, Part


async def list_files(request: Request) -> Response:
    """Name, size and SHA-256 of each, with what the checkpoint is: the tenant's own, or a public one."""
    checkpoint, index = await _readable(request)
    files = [{"name": part.name, "size": part.size, "sha256": part.sha256.hex()} for part in index.parts]
    return JSONResponse({**responses.checkpoint(checkpoint), "files": files})


async def get_file(request: Request) -> Response:
    """One file's bytes, or the requested range of them; its ETag is its SHA-256."""
    checkpoint, index = await _readable(request)
    name = request.path_params["file"]
    part = next((part for part in index.parts if part.name == name), None)
    if part is None:
        names = ", ".join(part.name for part in index.parts)
        raise NotFound(f"checkpoint {checkpoint.path} has no file {name[:80]!r}; there are: {names}")
    gateway, file = services_of(request), _Verified(part, checkpoint.saved_at)
    answer = ranges.respond(request, file, name)
    if answer.status_code in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        await gateway.audit.read(tenant_of(request), checkpoint.path, "download")
        file.content = await bundles.read_part(gateway.store, checkpoint.bundle, index, name)
    return answer


async def _readable(request: Request) -> tuple[Checkpoint, Index]:
    """Raises NotFound, or UserError for an encrypted one, whose files only a signed link gives."""
    gateway, tenant = services_of(request), tenant_of(request)
    checkpoint = await gateway.checkpoints.resolve(path_of(request), tenant)
    if checkpoint.recipients:
        raise UserError(
            f"checkpoint {checkpoint.path} is encrypted for its recipients (age_encryption_recipients); allowed: "
            "get_external_weights_urls, or `tinker checkpoint download`"
        )
    return checkpoint, await index_of(gateway, checkpoint)


@dataclass
class _Verified:
    """A file as `ranges` takes it. `content`: all of it, verified before the first byte is sent."""

    part: Part
    modified_at: float
    content: bytes = b""

    @property
    def entry(self) -> ListedObject:
        digest = self.part.sha256.hex()
        return ListedObject(self.part.name, digest, self.part.size, digest, self.modified_at)

    async def read(self, begin: int, end: int) -> AsyncIterator[bytes]:
        yield self.content[begin:end]

    def close(self) -> None:
        """Nothing is open."""
