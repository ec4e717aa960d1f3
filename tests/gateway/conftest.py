"""A gateway whose clock the test advances; modules that need no clock have a `running` of their own."""

from collections.abc import Iterator

import pytest

from tests.gateway.running import Running, gateway
from tests.gateway.saved import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def running(clock: Clock) -> Iterator[Running]:
    with gateway(clock=clock, monotonic=clock) as running:
        yield running
