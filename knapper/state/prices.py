"""Prices: what usage costs. An operator sets them, for its own accounts: nobody is charged by knapper."""

from dataclasses import dataclass
from typing import Final

from knapper.settings import Settings

MILLION: Final = 10**6
GIB: Final = 2**30


@dataclass(frozen=True)
class Prices:
    """In `currency`: for a million tokens of a kind, a device second, and a GiB stored for a month (720 hours)."""

    currency: str = "USD"
    trained: float = 0.0
    prefilled: float = 0.0
    sampled: float = 0.0
    device_second: float = 0.0
    stored: float = 0.0

    @staticmethod
    def of(settings: Settings) -> "Prices":
        return Prices(
            settings.currency, settings.price_trained, settings.price_prefilled, settings.price_sampled,
            settings.price_device_second, settings.price_stored,
        )  # fmt: skip

    @property
    def any(self) -> bool:
        """Whether anything has a price."""
        return any((self.trained, self.prefilled, self.sampled, self.device_second, self.stored))

    def cost(self, *, trained: int = 0, prefilled: int = 0, sampled: int = 0, device_s: float = 0.0) -> float:
        tokens = trained * self.trained + prefilled * self.prefilled + sampled * self.sampled
        return tokens / MILLION + device_s * self.device_second

    def a_month(self, stored_bytes: int) -> float:
        """The cost of keeping so many bytes for a month."""
        return stored_bytes / GIB * self.stored
