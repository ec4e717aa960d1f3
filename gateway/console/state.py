"""What the console's pages share in one gateway."""

from collections.abc import Callable
from dataclasses import dataclass

from gateway.console.history import Histories
from gateway.console.job_steps import JobSteps
from gateway.console.live import Watches
from gateway.console.session import BrowserSessions
from knapper.store import Store


@dataclass(frozen=True)
class Console:
    """`admin`: the tenant that sees all tenants, empty for none."""

    sessions: BrowserSessions
    histories: Histories
    job_steps: JobSteps
    watches: Watches
    admin: str

    @staticmethod
    def open(
        store: Store, admin: str, clock: Callable[[], float], now: Callable[[], float], new_id: Callable[[], str]
    ) -> "Console":
        """`clock`: seconds since the epoch; `now`: monotonic seconds; `new_id`: 128 random bits in hexadecimal."""
        return Console(BrowserSessions(store, clock, new_id), Histories(store), JobSteps(store), Watches(now), admin)
