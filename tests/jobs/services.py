"""A place for jobs in memory, with a clock that the test turns, and files as users put them there."""

import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from knapper.catalogue.served_models import Catalogue
from knapper.errors import InvalidField, NotFound, TooLarge
from knapper.events.cloudevents import Event
from knapper.exchange import Blob, Entries, ListedObject, Signed
from knapper.ids import LOCAL_TENANT
from knapper.jobs.notifications import Notifier
from knapper.jobs.services import JobServices
from knapper.state.model_record import ModelRecord
from knapper.store import Store
from knapper.store.memory import MemoryStore


@dataclass(frozen=True)
class OpenedBytes:
    entry: ListedObject
    data: bytes

    async def read(self, begin: int, end: int) -> AsyncIterator[bytes]:
        yield self.data[begin:end]

    def close(self) -> None:
        pass


@dataclass
class Folder:
    """An exchange in memory: what is published, and nothing more."""

    files: dict[str, bytes] = field(default_factory=dict)

    bucket, prefix = "local", ""

    async def read(self, name: str, bytes_max: int) -> Blob | None:
        data = self.files.get(name)
        if data is not None and len(data) > bytes_max:
            raise TooLarge(f"{name} has {len(data)} bytes; allowed: {bytes_max}")
        return None if data is None else Blob(data, hashlib.sha256(data).hexdigest())

    async def list(self, prefix: str) -> Entries:
        named = sorted(name for name in self.files if name.startswith(prefix))
        return [
            ListedObject(
                name,
                hashlib.sha256(self.files[name]).hexdigest(),
                len(self.files[name]),
                hashlib.sha256(self.files[name]).hexdigest(),
                2e9,
            )
            for name in named
        ]

    async def open(self, name: str) -> "OpenedBytes | None":
        data = self.files.get(name)
        return None if data is None else OpenedBytes((await self.list(name))[0], data)

    async def publish(self, name: str, data: bytes) -> None:
        self.files[name] = data

    async def extend(self, name: str, data: bytes) -> None:
        await self.publish(name, data)

    async def compose(self, name: str, parts: Sequence[str], sha256: str) -> None:
        for part in parts:
            if part not in self.files:
                raise NotFound(f"{part} is not there")
        whole = b"".join(self.files[part] for part in parts)
        if hashlib.sha256(whole).hexdigest() != sha256:
            raise InvalidField("sha256", sha256, hashlib.sha256(whole).hexdigest())
        self.files[name] = whole

    async def presign(self, method: Literal["GET", "PUT"], name: str, bytes_max: int) -> Signed | None:
        return None

    async def remove(self, name: str) -> None:
        self.files.pop(name, None)

    def put(self, job: str, files: Mapping[str, str | bytes]) -> None:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            self.files[f"inbox/{LOCAL_TENANT}/{job}/{name}"] = data


@dataclass
class Clock:
    at: float = 1_000_000.0

    def __call__(self) -> float:
        self.at += 0.001
        return self.at


async def serve(store: Store, model: str = "tiny", directory: str = "") -> None:
    record = ModelRecord(
        name=model, directory=directory, tokenizer_id=directory, context=512, vocab=268, arch="LlamaForCausalLM",
        dtype="float32", trainable=True, sampleable=True, train_step_url="http://t", sample_url="http://s",
    )  # fmt: skip
    await Catalogue(store).publish(record)


def services() -> tuple[JobServices, Folder, Clock]:
    """A place whose bells nobody hears."""
    folder, clock = Folder(), Clock()
    return JobServices(MemoryStore(), folder, Notifier(_lost, clock), clock), folder, clock


async def _lost(event: Event) -> None:
    pass


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
