"""Files uploaded in parts, before a job takes them: in the exchange, where no incomplete file starts anything.

Each part is an object under its file's hash. So repeating a part changes nothing, an interrupted client asks which
parts have arrived, and the server keeps no state of an upload.
"""

from dataclasses import dataclass

from knapper import limits
from knapper.errors import InvalidField, NotFound, TooMany
from knapper.exchange import Exchange
from knapper.ids import Tenant
from knapper.jobs import names
from knapper.state import layout


@dataclass(frozen=True)
class File:
    """The complete file. `size`: bytes, at least one."""

    tenant: Tenant
    sha256: str
    size: int

    @staticmethod
    def parse(tenant: Tenant, sha256: str, size: str) -> "File":
        """Parse the values of a URL. Raises InvalidField."""
        allowed = f"1 to {limits.job_upload_bytes_max} bytes"
        if not (size.isascii() and size.isdecimal() and len(size) < 20):
            raise InvalidField("size", size, allowed)
        if not 1 <= int(size) <= limits.job_upload_bytes_max:
            raise InvalidField("size", int(size), allowed, "Leave rows out, or copy the folder into the server's inbox")
        return File(tenant, names.sha256(sha256), int(size))

    @property
    def prefix(self) -> str:
        return layout.staged(self.tenant, self.sha256, self.size)

    @property
    def parts(self) -> dict[int, int]:
        """Size by offset, in order."""
        step = limits.upload_part_bytes
        return {offset: min(step, self.size - offset) for offset in range(0, self.size, step)}

    def part(self, offset: int) -> str:
        """The object's name."""
        return f"{self.prefix}{offset:012d}"

    def offset(self, value: str) -> int:
        """Raises InvalidField unless a part begins there."""
        offset = int(value) if value.isascii() and value.isdecimal() and len(value) < 20 else -1
        if offset not in self.parts:
            raise InvalidField("offset", value, f"a multiple of {limits.upload_part_bytes} below {self.size}")
        return offset


async def received(exchange: Exchange, file: File) -> set[int]:
    """Offsets of the parts that have arrived."""
    sizes = {entry.name: entry.size for entry in await exchange.list(file.prefix)}
    return {offset for offset, size in file.parts.items() if sizes.get(file.part(offset)) == size}


async def take(exchange: Exchange, file: File, offset: int, data: bytes) -> None:
    """Store a part; durable on return. Raises InvalidField for a wrong size, TooMany over the tenant's quota."""
    if len(data) != file.parts[offset]:
        raise InvalidField("the part's size", len(data), f"{file.parts[offset]} bytes at offset {offset}")
    await expect_capacity(exchange, file.tenant, len(data), file.part(offset))
    await exchange.publish(file.part(offset), data)


async def expect_capacity(exchange: Exchange, tenant: Tenant, size: int, instead_of: str = "") -> None:
    """Raises TooMany if `size` more bytes exceed the tenant's quota."""
    staged = sum(entry.size for entry in await exchange.list(layout.uploads_of(tenant)) if entry.name != instead_of)
    if staged + size > limits.uploads_bytes_max:
        raise TooMany(
            f"{staged} bytes of files were sent that no job has taken; allowed: {limits.uploads_bytes_max}; submit "
            f"their jobs, or wait until they expire, a day or two after they came"
        )


async def expect_whole(exchange: Exchange, name: str, file: File) -> None:
    """Raises NotFound, naming the first part that is missing."""
    arrived = await received(exchange, file)
    missing = [offset for offset in file.parts if offset not in arrived]
    if missing:
        raise NotFound(
            f"{name} is not whole: {len(missing)} of {len(file.parts)} parts are missing, the first at {missing[0]}; "
            f"send them to /api/v1/uploads/{file.sha256}/{file.size}/<offset>"
        )


async def assemble(exchange: Exchange, file: File, name: str) -> None:
    """Put the whole file under the name. For a wrong hash, deletes the parts and raises InvalidField."""
    try:
        await exchange.compose(name, [file.part(offset) for offset in file.parts], file.sha256)
    except InvalidField:
        await forget(exchange, file)
        raise


async def forget(exchange: Exchange, file: File) -> None:
    for entry in await exchange.list(file.prefix):
        await exchange.remove(entry.name)


async def expire(exchange: Exchange, now: float) -> int:
    """Delete the parts that no job has taken in time; return how many. `now`: seconds since the epoch."""
    old = [entry for entry in await exchange.list(layout.UPLOADS) if entry.modified_at + limits.upload_s <= now]
    for entry in old:
        await exchange.remove(entry.name)
    return len(old)
