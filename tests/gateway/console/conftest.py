"""A gateway with keys, and browsers of two tenants."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from knapper.ids import Tenant
from knapper.state.api_keys import Keys
from tests.gateway.running import Running, gateway

HTML = {"Accept": "text/html"}
_numbers = itertools.count()


@dataclass
class World:
    running: Running
    browsers: list[httpx.Client] = field(default_factory=list)

    def key(self, tenant: str, note: str = "") -> str:
        secret = hashlib.sha256(f"{tenant} {next(_numbers)}".encode()).hexdigest()
        keys = Keys(self.running.store, self.running.parts.clock)
        made: str = self.running.run(keys.create(Tenant(tenant), note, lambda: secret))[0]
        return made

    def browser(self) -> httpx.Client:
        """With cookies, and without a key."""
        self.browsers.append(httpx.Client(base_url=self.running.url, headers=HTML, timeout=30))
        return self.browsers[-1]

    def signed_in(self, key: str) -> httpx.Client:
        browser = self.browser()
        assert sign_in(browser, key).status_code == 303
        return browser


def sign_in(browser: httpx.Client, key: str, **more: str) -> httpx.Response:
    """By the form of the page."""
    return browser.post("/signin", data={"csrf": csrf(browser.get("/signin")), "key": key, "next": "/", **more})


def csrf(page: httpx.Response) -> str:
    """The token that the page's forms carry."""
    return page.text.partition('data-csrf="')[2].partition('"')[0]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with gateway(keys=True, admin="ops") as running:
        world = World(running)
        yield world
        for browser in world.browsers:
            browser.close()
