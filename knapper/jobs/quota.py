"""A tenant's quota, as its jobs meet it: a job over it pauses, and goes on when there is more."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from knapper import limits
from knapper.errors import QuotaUsedUp
from knapper.ids import RunId, Tenant
from knapper.state import usage
from knapper.state.checkpoints import Checkpoints
from knapper.state.daily_tokens import DailyTokens
from knapper.state.ledger import Accounts
from knapper.state.open_runs import OpenRuns
from knapper.state.quotas import QuotaBook
from knapper.store import Store
from knapper.text import quota_messages

_CACHED: Final = 1024


@dataclass
class _Look:
    """What the store had at that time, and the tokens that jobs of this process have trained on since."""

    at: float
    tokens: int
    stored: int  # bytes of checkpoints


class JobQuota:
    """`clock`: seconds since the epoch, which may step."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._at = clock()
        self._quotas = QuotaBook(store, lambda: self._at)
        accounts = Accounts(store, clock, clock, str)  # it only reads
        self._daily_tokens = DailyTokens.over(store, accounts, clock)
        self._open_runs = OpenRuns(store, clock)
        self._checkpoints = Checkpoints(store, clock)
        self._clock = clock
        self._looks: dict[Tenant, _Look] = {}

    async def expect(self, tenant: Tenant, at: float, tokens: int = 0) -> None:
        """Before work on a job, at this time.

        `tokens`: that it will train on. Raises QuotaUsedUp once today's tokens or the bytes of checkpoints are used up.
        """
        self._at = at
        quota = await self._quotas.of(tenant)
        if quota.tokens_a_day is None and quota.bytes is None:
            return
        look = await self._fresh_look(tenant)
        if quota.tokens_a_day is not None and look.tokens >= quota.tokens_a_day:
            left_s = self._daily_tokens.seconds_left
            raise QuotaUsedUp(quota_messages.tokens_of_job(tenant, look.tokens, quota.tokens_a_day), left_s)
        if quota.bytes is not None and look.stored >= quota.bytes:
            raise QuotaUsedUp(quota_messages.stored(tenant, look.stored, 0, quota.bytes))
        look.tokens += tokens

    async def expect_runs(self, tenant: Tenant, runs: list[RunId]) -> None:
        """After `expect`, before the runs of a job are made. Raises QuotaUsedUp while too many others are open."""
        most = (await self._quotas.of(tenant)).runs
        if most is None:
            return
        others = set(await self._open_runs.of(tenant)) - set(runs)
        if len(others) + len(runs) > most:
            raise QuotaUsedUp(quota_messages.runs_of_job(tenant, len(others), len(runs), most))

    async def rank(self, tenant: Tenant) -> int | None:
        """The highest rank, None for no limit."""
        self._at = self._clock()
        return (await self._quotas.of(tenant)).rank

    async def _fresh_look(self, tenant: Tenant) -> "_Look":
        """At most half a minute old, and of this day."""
        look, now = self._looks.get(tenant), self._at
        if look is None or abs(now - look.at) >= limits.quota_usage_fresh_s or look.at < self._daily_tokens.day_began:
            if len(self._looks) >= _CACHED:
                self._looks.clear()
            stored = usage.stored_bytes(await self._checkpoints.labels(tenant))
            look = self._looks[tenant] = _Look(now, await self._daily_tokens.recorded(tenant), stored)
        return look
