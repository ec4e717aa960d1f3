"""How many samples each tenant has in flight, and the most tokens that they may have."""

from collections import Counter

from knapper.ids import Tenant


class TenantLoad:
    """A request for several samples counts as so many."""

    def __init__(self) -> None:
        self._samples: Counter[Tenant] = Counter()
        self._tokens: Counter[Tenant] = Counter()

    def add(self, tenant: Tenant, samples: int, tokens: int) -> None:
        self._samples[tenant] += samples
        self._tokens[tenant] += tokens

    def remove(self, tenant: Tenant, samples: int, tokens: int) -> None:
        self.add(tenant, -samples, -tokens)

    def samples(self, tenant: Tenant) -> int:
        return self._samples[tenant]

    def tokens(self, tenant: Tenant) -> int:
        return self._tokens[tenant]
