"""Which base models are served, by whom and on what terms: numbered records, of which the highest number wins."""

from collections.abc import Callable, Sequence

import msgspec

from knapper.errors import NotFound, Unavailable
from knapper.state import damage
from knapper.state.journal.records import decode, encode
from knapper.state.layout import ObjectKind, last_number
from knapper.state.model_record import ModelRecord, slug
from knapper.store import Store
from knapper.store.cache import LruCache

_attempts_max = 16  # each lost attempt means that another publisher won: they are few


class Catalogue:
    """The models of a store. Records are created, never changed; two publishers at once leave two versions.

    `on_missing` is called when a model is asked for that is not served, and when none is.
    """

    def __init__(self, store: Store, on_missing: Callable[[], None] = lambda: None) -> None:
        self._store = store
        self._on_missing = on_missing
        self._records: LruCache[str, ModelRecord] = LruCache()

    async def models(self) -> list[ModelRecord]:
        """Those served now, by name."""
        served = [record for record in await self._newest() if record.trainable or record.sampleable]
        if not served:
            self._on_missing()
        return served

    async def find(self, base_model: str) -> ModelRecord:
        """The served model of this name or directory. Raises NotFound, which lists what is served."""
        served = await self.models()
        for record in served:
            if base_model and base_model in (record.name, record.directory):
                return record
        if newest := await self._newest_name(slug(base_model)):
            await self._read(newest)  # raises if it is damaged, and was left out for that
        names = ", ".join(repr(record.name) for record in served) or "none"
        self._on_missing()
        raise NotFound(f"base_model {base_model!r} is not served here; served: {names}. "
                       "Use one of them, or start knapper with --model")  # fmt: skip

    async def has_record(self, base_model: str) -> bool:
        """Whether the model was ever published in this store: of one that nobody serves any more there is a record."""
        return bool(await self._newest_name(slug(base_model)))

    async def publish(self, record: ModelRecord) -> bool:
        """Make this the newest version; True if that needed a new one."""
        for _ in range(_attempts_max):
            newest = await self._newest_name(slug(record.name))
            if newest and await damage.unless(self._read(newest), None) == record:  # a damaged one is overtaken
                return False
            n = last_number(newest) + 1 if newest else 0
            if await self._store.put_if_absent(ObjectKind.MODEL.key(slug(record.name), n), encode(record)):
                return True
        raise Unavailable(f"model {record.name!r}: other processes keep publishing it; stop all but one of them")

    async def serve_only(self, record: ModelRecord) -> None:
        """Publish this model, and say of all others that nobody serves them."""
        await self.serve_exactly([record])

    async def serve_exactly(self, records: Sequence[ModelRecord]) -> None:
        """Publish these models, and say of all others that nobody serves them."""
        names = {record.name for record in records}
        for other in await self.models():
            if other.name not in names:
                await self.publish(
                    msgspec.structs.replace(other, trainable=False, sampleable=False, train_step_url="", sample_url="")
                )
        for record in records:
            await self.publish(record)

    async def _newest(self) -> list[ModelRecord]:
        newest: dict[str, str] = {}
        for name in await self._store.list(ObjectKind.MODEL.under()):  # in order, so the last of a slug wins
            newest[name.rpartition("/")[0]] = name
        return sorted(await damage.readable(newest.values(), self._read), key=lambda record: record.name)

    async def _newest_name(self, slug: str) -> str:
        names = await self._store.list(ObjectKind.MODEL.under(slug))
        return names[-1] if names else ""

    async def _read(self, name: str) -> ModelRecord:
        async def load() -> ModelRecord:
            data = await self._store.get(name)
            if data is None:
                raise Unavailable(f"object {name} vanished while it was read; try again")
            return decode(data, ModelRecord, name)

        return await self._records.get(name, load)
