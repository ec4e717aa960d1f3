"""The SDK's public methods, found by looking; and a client whose calls are noted and resolved."""

import asyncio
import inspect
from typing import Any

import tinker

CLIENTS: tuple[type, ...] = (
    tinker.ServiceClient,
    tinker.TrainingClient,
    tinker.SamplingClient,
    tinker.RestClient,
    tinker.AdminClient,
)
_TIMEOUT_S = 60.0


def public(client: type) -> list[str]:
    """`Client.method` of all public methods, in the order of the alphabet."""
    names = [name for name, member in inspect.getmembers(client) if callable(member) and not name.startswith("_")]
    return [f"{client.__name__}.{name}" for name in names]


def twin_of(method: str) -> str:
    """The method that an `_async` one is the deprecated twin of; of another itself."""
    return method.removesuffix("_async")


class Noted:
    """A client, or the class of one: calls are noted in `called`, and what they return is waited for.

    `twins`: the deprecated *_async method is called in the place of each that has one.
    """

    def __init__(self, client: Any, called: set[str], *, twins: bool) -> None:
        self.client = client
        self._called = called
        self._twins = twins
        self._kind = client if isinstance(client, type) else type(client)

    def __getattr__(self, name: str) -> Any:
        if self._twins and hasattr(self._kind, f"{name}_async"):
            name = f"{name}_async"
        method = getattr(self.client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self._called.add(f"{self._kind.__name__}.{name}")
            found = _resolved(method(*arguments, **named))
            return Noted(found, self._called, twins=self._twins) if type(found) in CLIENTS else found

        return call


def _resolved(value: Any) -> Any:
    while True:
        if inspect.iscoroutine(value):
            value = asyncio.run(asyncio.wait_for(value, _TIMEOUT_S))
        elif type(value) not in CLIENTS and callable(
            getattr(value, "result", None)
        ):  # futures of clients are clients too
            value = value.result(_TIMEOUT_S)
        else:
            return value
