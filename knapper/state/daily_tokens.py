"""The tokens that a tenant has used since midnight in UTC: trained, prefilled and sampled, as `knapper usage` has them.

They are counted from the journals, the ledger and the records of samples, so an operation counts once, whatever is
sent, computed or replayed again, and no process that is killed loses a count.
"""

from collections.abc import Callable
from dataclasses import dataclass

from knapper.ids import Tenant
from knapper.state.ledger import Accounts
from knapper.state.sessions import DAY_S
from knapper.state.usage import HOUR_S, SampledTotals, Window
from knapper.store import Store


@dataclass(frozen=True)
class DailyTokens:
    """`clock`: seconds since the epoch."""

    accounts: Accounts
    sampled: SampledTotals
    clock: Callable[[], float]

    @staticmethod
    def over(store: Store, accounts: Accounts, clock: Callable[[], float]) -> "DailyTokens":
        return DailyTokens(accounts, SampledTotals(store), clock)

    @property
    def day(self) -> int:
        """Days since the epoch."""
        return int(self.clock() // DAY_S)

    @property
    def day_began(self) -> float:
        return self.day * DAY_S

    @property
    def seconds_left(self) -> float:
        """Until the next day begins."""
        return (self.day + 1) * DAY_S - self.clock()

    async def recorded(self, tenant: Tenant) -> int:
        """What the store has of today."""
        hours = int(DAY_S // HOUR_S)
        window = Window(self.day * hours, (self.day + 1) * hours)
        trained = await self.accounts.used(tenant, window, all_of_them=True)
        return sum(tokens for tokens, _ in trained.values()) + await self.sampled.within(tenant, window)
