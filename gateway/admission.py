"""Admission: whether a tenant's quota allows one more run, operation, sample or file. Asked before work is accepted.

What the store has of a tenant is read at most every half a minute while it works, and never when it does not. In
between, this process adds what it accepted itself. Other gateways show what they have under way by holds, and with n
gateways each hands out at most an n-th of what is left before it looks again: two may exceed a quota by what one
accepted since the other looked, never by a whole quota.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gateway.sample_usage import SampleUsage
from gateway.tenant_load import TenantLoad
from knapper import limits
from knapper.errors import InvalidField, QuotaReached, QuotaUsedUp, TooLarge
from knapper.ids import RunId, Tenant
from knapper.state import usage
from knapper.state.checkpoints import Checkpoints
from knapper.state.daily_tokens import DailyTokens
from knapper.state.holds import HELD_S, RENEWED_S, Holds, UnderWay
from knapper.state.journal.accept import Acceptor
from knapper.state.open_runs import OpenRuns
from knapper.state.quotas import Quota, QuotaBook
from knapper.text import quota_messages

_SOON_S = 5.0  # until samples under way may have given tokens back
_FREED_S = 30.0  # until a user may have deleted something


@dataclass
class _Look:
    """What the store had. `own`: what this process had accepted when the look began. `at`: monotonic seconds."""

    day: int
    recorded: int
    own: int
    at: float


@dataclass
class _Others:
    """The holds of other gateways. `samples`, `tokens`: what this process held then."""

    hold: UnderWay
    samples: int
    tokens: int
    at: float


@dataclass(frozen=True)
class Readers:
    """What admission reads of the store."""

    quotas: QuotaBook
    daily_tokens: DailyTokens
    open_runs: OpenRuns
    checkpoints: Checkpoints
    acceptor: Acceptor


class Admission:
    """`now`: monotonic seconds."""

    def __init__(
        self, readers: Readers, holds: Holds, load: TenantLoad, counted: SampleUsage, now: Callable[[], float]
    ) -> None:
        self._readers = readers
        self._holds = holds
        self._load = load
        self._counted = counted
        self._now = now
        self._trained: Counter[Tenant] = Counter()  # tokens accepted by this process
        self._looks: dict[Tenant, _Look] = {}
        self._others: dict[Tenant, _Others] = {}
        self._stored: dict[Tenant, tuple[float, int]] = {}
        self._refused_at: dict[Tenant, float] = {}
        self._locks: defaultdict[Tenant, asyncio.Lock] = defaultdict(asyncio.Lock)

    # -- asked by handlers ---------------------------------------------------------------------------------------------

    async def expect_rank(self, tenant: Tenant, rank: int) -> None:
        """Raises InvalidField."""
        most = (await self._readers.quotas.of(tenant)).rank
        if most is not None and rank > most:
            raise InvalidField("rank", rank, f"1 to {most}: the quota of tenant {tenant}")

    async def expect_run(self, tenant: Tenant, run: RunId) -> None:
        """Raises QuotaReached, unless the run exists. Call once the run is in the tenant's list."""
        most = (await self._readers.quotas.of(tenant)).runs
        if most is None:
            return
        are_open = set(await self._readers.open_runs.of(tenant)) - {run}
        if len(are_open) >= most and await self._readers.acceptor.missing(run, 0):
            raise QuotaReached(quota_messages.runs(tenant, len(are_open), most), _FREED_S)

    async def take(self, tenant: Tenant, run: RunId, seq: int, tokens: int, *, saves: bool) -> int:
        """Count an operation's tokens; return how many were counted, for `give_back` if it was none to be accepted.

        `saves`: it makes a checkpoint. Raises QuotaUsedUp, unless the operation was accepted before, and TooLarge for
        more tokens than a whole day has.
        """
        try:
            quota = await self._readers.quotas.of(tenant)
            if saves:
                await self._expect_bytes(tenant, quota, 0)
            if tokens:
                await self._expect_tokens(tenant, quota, tokens)
        except QuotaUsedUp:
            if await self._readers.acceptor.missing(run, seq):
                raise
            return 0
        self._trained[tenant] += tokens
        return tokens

    def give_back(self, tenant: Tenant, tokens: int) -> None:
        self._trained[tenant] -= tokens

    async def expect_samples(self, tenant: Tenant, samples: int, tokens: int) -> None:
        """Raises QuotaReached or QuotaUsedUp; InvalidField or TooLarge for what the quota can never allow.

        Samples are submitted right after it, before anything else is awaited. `tokens`: the most that they may have.
        """
        quota = await self._readers.quotas.of(tenant)
        if quota.samples_in_flight is not None:
            await self._expect_in_flight(tenant, quota.samples_in_flight, samples)
        await self._expect_tokens(tenant, quota, tokens)
        if quota.samples_in_flight is not None:  # others may have come while tokens were looked at
            await self._expect_in_flight(tenant, quota.samples_in_flight, samples)

    async def expect_bytes(self, tenant: Tenant, size: int) -> None:
        """Raises QuotaUsedUp if `size` more bytes are too many."""
        await self._expect_bytes(tenant, await self._readers.quotas.of(tenant), size)

    async def counts_tokens(self, tenant: Tenant) -> bool:
        return (await self._readers.quotas.of(tenant)).tokens_a_day is not None

    # -- asked by periodic tasks and reports ---------------------------------------------------------------------------

    async def pauses(self, tenant: Tenant) -> bool:
        """Whether operations may be missing because they were refused: their client sends them again later."""
        quota = await self._readers.quotas.of(tenant)
        try:
            await self._expect_tokens(tenant, quota, 1)
            await self._expect_bytes(tenant, quota, 0)
        except (QuotaUsedUp, TooLarge):
            return True
        return self._now() - self._refused_at.get(tenant, float("-inf")) < limits.sequence_gap_s

    async def renew(self) -> None:
        """Renew the holds of tenants whose samples are under way; release those of tenants that ask for nothing."""
        for tenant in self._holds.due():
            if self._load.samples(tenant):
                await self._holds.renew(tenant, *self._held(tenant))
            elif (others := self._others.get(tenant)) is None or self._now() - others.at >= HELD_S:
                await self._holds.release(tenant)

    async def close(self) -> None:
        for tenant in list(self._others):
            await self._holds.release(tenant)

    async def report(self, tenant: Tenant) -> dict[str, Any]:
        """The quota of the tenant and what it has used of it, field by field; `quota` null is no limit."""
        quota = await self._readers.quotas.of(tenant)
        look, others = await self._look(tenant), await self._holds.of_others(tenant)
        used = {
            "runs": len(await self._readers.open_runs.of(tenant)),
            "bytes": await self._stored_bytes(tenant),
            "tokens_a_day": self._used(tenant, look),
            "samples_in_flight": self._load.samples(tenant) + others.samples,
            "rank": None,
        }
        report: dict[str, Any] = {
            name: {"quota": getattr(quota, name), "used": number} for name, number in used.items()
        }
        return report | {"seconds_left": round(self._readers.daily_tokens.seconds_left, 3)}

    # -- tokens --------------------------------------------------------------------------------------------------------

    async def _expect_tokens(self, tenant: Tenant, quota: Quota, tokens: int) -> None:
        most = quota.tokens_a_day
        if most is None:
            return
        if tokens > most:
            raise TooLarge(quota_messages.too_many_tokens(tenant, tokens, most))
        look, others = await self._fresh_look(tenant), await self._fresh_others(tenant)
        left = most - self._used(tenant, look) - self._load.tokens(tenant) - others.hold.tokens
        handed_out = self._used(tenant, look) + self._load.tokens(tenant) - look.recorded - others.tokens
        if others.hold.gateways > 1 and 0 < tokens <= left < (handed_out + tokens) * others.hold.gateways:
            look, others = await self._look(tenant), await self._look_at_others(tenant)
        used, held = self._used(tenant, look), self._load.tokens(tenant) + others.hold.tokens
        if used + held + tokens <= most:
            return
        self._refused_at[tenant] = self._now()
        if used + tokens <= most:
            raise QuotaUsedUp(quota_messages.tokens_held(tenant, used, held, most), _SOON_S)
        left_s = self._readers.daily_tokens.seconds_left
        raise QuotaUsedUp(quota_messages.tokens(tenant, used, tokens, most, left_s), left_s + 1.0)

    def _used(self, tenant: Tenant, look: _Look) -> int:
        return look.recorded + self._own(tenant) - look.own

    def _own(self, tenant: Tenant) -> int:
        return self._trained[tenant] + self._counted.tokens(tenant)

    async def _fresh_look(self, tenant: Tenant) -> _Look:
        look = self._looks.get(tenant)
        if look is None or look.day != self._readers.daily_tokens.day:
            return await self._look(tenant)
        if self._now() - look.at < limits.quota_usage_fresh_s or self._locks[tenant].locked():
            return look
        return await self._look(tenant)

    async def _look(self, tenant: Tenant) -> _Look:
        """Read what is recorded; first of all record what this process has counted."""
        began, asked = self._looks.get(tenant), self._now()
        async with self._locks[tenant]:
            if (look := self._looks.get(tenant)) is not None and look is not began and look.at >= asked:
                return look  # another request has just looked
            day, own, at = self._readers.daily_tokens.day, self._own(tenant), self._now()
            await self._counted.flush()
            self._looks[tenant] = _Look(day, await self._readers.daily_tokens.recorded(tenant), own, at)
            return self._looks[tenant]

    # -- samples -------------------------------------------------------------------------------------------------------

    async def _expect_in_flight(self, tenant: Tenant, most: int, samples: int) -> None:
        if samples > most:
            raise InvalidField("num_samples", samples, f"at most {most} at the same time: the quota of tenant {tenant}")
        others = await self._fresh_others(tenant)
        left = most - self._load.samples(tenant) - others.hold.samples
        handed_out = self._load.samples(tenant) - others.samples
        if others.hold.gateways > 1 and samples <= left < (handed_out + samples) * others.hold.gateways:
            others = await self._look_at_others(tenant)
        in_flight = self._load.samples(tenant) + others.hold.samples
        if in_flight + samples > most:
            raise QuotaReached(quota_messages.samples(tenant, in_flight, samples, most))

    def _held(self, tenant: Tenant) -> tuple[int, int]:
        """(samples, tokens) that no record has yet."""
        return self._load.samples(tenant), self._load.tokens(tenant)

    async def _fresh_others(self, tenant: Tenant) -> _Others:
        others = self._others.get(tenant)
        return (
            others if others is not None and self._now() - others.at < RENEWED_S else await self._look_at_others(tenant)
        )

    async def _look_at_others(self, tenant: Tenant) -> _Others:
        """Show the other gateways what is under way here, and then look at what they show."""
        samples, tokens = self._held(tenant)
        at = self._now()
        await self._holds.renew(tenant, samples, tokens)
        self._others[tenant] = _Others(await self._holds.of_others(tenant), samples, tokens, at)
        return self._others[tenant]

    # -- bytes ---------------------------------------------------------------------------------------------------------

    async def _expect_bytes(self, tenant: Tenant, quota: Quota, size: int) -> None:
        if quota.bytes is None:
            return
        at, stored = self._stored.get(tenant, (float("-inf"), 0))
        if self._now() - at >= RENEWED_S:
            stored = await self._stored_bytes(tenant)
            self._stored[tenant] = self._now(), stored
        if stored + size > quota.bytes or stored >= quota.bytes:
            self._refused_at[tenant] = self._now()
            raise QuotaUsedUp(quota_messages.stored(tenant, stored, size, quota.bytes), _FREED_S)

    async def _stored_bytes(self, tenant: Tenant) -> int:
        return usage.stored_bytes(await self._readers.checkpoints.labels(tenant))
