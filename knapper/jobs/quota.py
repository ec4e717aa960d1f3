"""A tenant's quota, as its jobs meet it: a job over it pauses, and goes on when there is more."""

from collections.abc import Callable
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


class JobQuota:
    """`clock`: seconds since the epoch, which may step."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._quotas = QuotaBook(store, clock)
        accounts = Accounts(store, clock, clock, str)  # it only reads
        self._daily_tokens = DailyTokens.over(store, accounts, clock)
        self._open_runs = OpenRuns(store, clock)
        self._checkpoints = Checkpoints(store, clock)
        self._clock = clock
        self._looks: dict[Tenant, tuple[float, int, int]] = {}  # time, tokens, bytes

    async def expect(self, tenant: Tenant) -> None:
        """Before work on a job. Raises QuotaUsedUp once today's tokens, or the bytes of checkpoints, are used up."""
        quota = await self._quotas.of(tenant)
        if quota.tokens_a_day is None and quota.bytes is None:
            return
        tokens, stored = await self._look(tenant)
        left_s = self._daily_tokens.seconds_left
        if quota.tokens_a_day is not None and tokens >= quota.tokens_a_day:
            raise QuotaUsedUp(quota_messages.tokens_of_job(tenant, tokens, quota.tokens_a_day, left_s), left_s)
        if quota.bytes is not None and stored >= quota.bytes:
            raise QuotaUsedUp(quota_messages.stored(tenant, stored, 0, quota.bytes))

    async def expect_runs(self, tenant: Tenant, runs: list[RunId]) -> None:
        """Before the runs of a job are made. Raises QuotaUsedUp while too many others are open."""
        most = (await self._quotas.of(tenant)).runs
        if most is None:
            return
        others = set(await self._open_runs.of(tenant)) - set(runs)
        if len(others) + len(runs) > most:
            raise QuotaUsedUp(quota_messages.runs_of_job(tenant, len(others), len(runs), most))

    async def rank(self, tenant: Tenant) -> int | None:
        """The highest rank, None for no limit."""
        return (await self._quotas.of(tenant)).rank

    async def _look(self, tenant: Tenant) -> tuple[int, int]:
        """(tokens of today, bytes of checkpoints), at most half a minute old, and of this day."""
        at, tokens, stored = self._looks.get(tenant, (float("-inf"), 0, 0))
        now, day_began = self._clock(), self._daily_tokens.day_began
        if abs(now - at) >= limits.quota_usage_fresh_s or at < day_began:
            tokens = await self._daily_tokens.recorded(tenant)
            stored = usage.stored_bytes(await self._checkpoints.labels(tenant))
            if len(self._looks) >= _CACHED:
                self._looks.clear()
            self._looks[tenant] = now, tokens, stored
        return tokens, stored
