"""Quotas: how much each tenant may have and use. One record for all tenants, so that each gateway reads one object.

A tenant's own quota goes before the default of all tenants, field by field.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Final

from knapper import ids, limits
from knapper.errors import InvalidField, StoreError
from knapper.state import damage
from knapper.state.journal.newest import newest_name
from knapper.state.journal.records import Record, decode, encode
from knapper.state.layout import ObjectKind, last_number
from knapper.store import Store
from knapper.text.quantities import BYTES, COUNTS, whole

UNLIMITED: Final = "unlimited"


@dataclass(frozen=True)
class Quota:
    """What a tenant may have: None is no limit. `runs`: open at the same time. `bytes`: of checkpoints.

    `tokens_a_day`: trained, prefilled and sampled, from midnight to midnight in UTC. `rank`: the highest of an adapter.
    """

    runs: int | None = None
    bytes: int | None = None
    tokens_a_day: int | None = None
    samples_in_flight: int | None = None
    rank: int | None = None


FIELDS: Final = tuple(field.name for field in fields(Quota))
Values = dict[str, int | None]  # by field; None is no limit


class Quotas(Record, frozen=True, kw_only=True):
    """The quotas of all tenants. A field that a tenant does not have is the default's."""

    default: dict[str, int | None] = {}
    tenants: dict[str, dict[str, int | None]] = {}

    def of(self, tenant: str) -> Quota:
        """The quota in force."""
        values = {**self.default, **self.tenants.get(tenant, {})}
        return Quota(**{name: values.get(name) for name in FIELDS})

    def changed(self, tenant: str, values: Mapping[str, int | None]) -> "Quotas":
        """With these fields of the tenant, beside its others. `tenant`: empty for the default."""
        if not tenant:
            return Quotas(default={**self.default, **values}, tenants=self.tenants)
        return Quotas(
            default=self.default, tenants={**self.tenants, tenant: {**self.tenants.get(tenant, {}), **values}}
        )

    def without(self, tenant: str) -> "Quotas":
        """Without any field of the tenant's. `tenant`: empty for the default."""
        if not tenant:
            return Quotas(default={}, tenants=self.tenants)
        return Quotas(default=self.default, tenants={name: own for name, own in self.tenants.items() if name != tenant})


def value(name: str, given: object, field: str = "") -> int | None:
    """The value of a field as people write it: 20, '10M', '50GiB', 'unlimited'. Raises InvalidField for a wrong one.

    `field`: the name that a message gives it.
    """
    field = field or name
    if name not in FIELDS:
        raise InvalidField(field, given, f"no field of this name, only {', '.join(FIELDS)}")
    if given is None or given == UNLIMITED:
        return None
    least, most = (1, limits.rank_max) if name == "rank" else (0, limits.quota_max)
    number = None if isinstance(given, bool) else given if isinstance(given, int) else _parsed(name, given)
    if number is None or not least <= number <= most:
        example = {"bytes": "50GiB", "tokens_a_day": "10M"}.get(name, "")
        forms = f"a whole number from {least} to {most}{f', such as {example},' if example else ''} or {UNLIMITED}"
        raise InvalidField(field, given, forms)
    return number


def _parsed(name: str, given: object) -> int | None:
    return whole(given, BYTES if name == "bytes" else COUNTS) if isinstance(given, str) else None


def parse(content: object) -> Quotas:
    """The quotas of a file: `default` and `tenants`, as in docs/operating.md. Raises InvalidField."""
    top = _mapping(content, "quotas")
    if unknown := [name for name in top if name not in ("default", "tenants")]:
        raise InvalidField(str(unknown[0]), top[unknown[0]], "no field of this name, only default, tenants")
    tenants = _mapping(top.get("tenants"), "tenants")
    return Quotas(
        default=_values(top.get("default"), "default"),
        tenants={ids.tenant(_text(name)): _values(own, f"tenants.{name}") for name, own in tenants.items()},
    )


def _values(content: object, where: str) -> Values:
    return {name: value(_text(name), given, f"{where}.{name}") for name, given in _mapping(content, where).items()}


def _mapping(content: object, where: str) -> dict[str, object]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InvalidField(where, content, "fields with values: `name: value` lines")
    return content


def _text(name: object) -> str:
    return name if isinstance(name, str) else str(name)


class QuotaBook:
    """The newest quotas in the store. Versions are never deleted; one read finds out whether there is a newer one.

    `now`: seconds.
    """

    def __init__(self, store: Store, now: Callable[[], float]) -> None:
        self._store = store
        self._now = now
        self._n: int | None = None  # of the newest version seen
        self._newest = Quotas()
        self._read_at = float("-inf")
        self._lock = asyncio.Lock()

    async def of(self, tenant: str) -> Quota:
        """The tenant's quota, at most some seconds old. Raises StoreError if none was read yet."""
        if abs(self._now() - self._read_at) >= limits.quota_fresh_s and (self._n is None or not self._lock.locked()):
            try:
                await self.newest()
            except StoreError:
                if self._n is None:
                    raise
        return self._newest.of(tenant)

    async def newest(self) -> Quotas:
        """All quotas, as they are now."""
        async with self._lock:
            began = self._now()
            if self._n is None:
                await self._find()
            assert self._n is not None, "found"
            while (data := await self._store.get(ObjectKind.QUOTAS.key(self._n + 1))) is not None:
                self._n += 1
                self._take(self._n, data)
            self._read_at = began
            return self._newest

    async def change(self, edit: Callable[[Quotas], Quotas]) -> Quotas:
        """Store what `edit` makes of the newest quotas, unless it is the same; durable on return."""
        while True:
            edited = edit(await self.newest())
            assert self._n is not None, "read"
            if edited == self._newest or await self._store.put_if_absent(
                ObjectKind.QUOTAS.key(self._n + 1), encode(edited)
            ):
                return edited

    async def _find(self) -> None:
        """Take the newest version, or the one before it that can be read."""
        name = await newest_name(self._store, ObjectKind.QUOTAS.under())
        newest = last_number(name) if name else 0
        for n in range(newest, 0, -1):
            data = await self._store.get(ObjectKind.QUOTAS.key(n))
            if data is not None and self._take(n, data):
                break
        self._n = newest

    def _take(self, n: int, data: bytes) -> bool:
        """False for a damaged version, in whose place the one before it stays in force."""
        try:
            self._newest = decode(data, Quotas, ObjectKind.QUOTAS.key(n))
        except damage.ERRORS as error:
            damage.report(error)
            return False
        return True
