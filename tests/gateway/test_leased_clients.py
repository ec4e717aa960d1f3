"""Requests go straight to a function's process while the dispatcher lends its address, and nobody notices otherwise."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from gateway.leased_clients import Shortcuts
from tests.local.work import World, dispatching, gone, make_root, until


class Caller:
    """Asks the function as the gateway does."""

    def __init__(self, world: World, client: aiohttp.ClientSession) -> None:
        self.service = f"{world.client.base_url}".rstrip("/") + "/train_step"
        self.shortcuts = Shortcuts(client, asyncio.get_running_loop().time)
        self._client = client

    @property
    def lent(self) -> bool:
        with self.shortcuts.use(self.service) as url:
            return url != self.service

    async def pid(self) -> int:
        with self.shortcuts.use(self.service) as url:
            async with self._client.post(url) as answer:
                self.shortcuts.heard(url, answer.headers)
                return int((await answer.json())["pid"])


@asynccontextmanager
async def calling(world: World) -> AsyncIterator[Caller]:
    await world.pid()  # it serves
    async with aiohttp.ClientSession(headers=world.client.headers) as client:
        caller = Caller(world, client)
        try:
            yield caller
        finally:
            await caller.shortcuts.close()


@pytest.mark.parametrize("isolated", [False, True])
def test_the_second_request_goes_past_the_dispatcher_to_the_same_process(tmp_path: Path, isolated: bool) -> None:
    async def story() -> None:
        async with dispatching(make_root(tmp_path), isolated=isolated) as world, calling(world) as caller:
            first = await caller.pid()
            await until(lambda: caller.lent)
            passed = world.dispatcher.forwarded
            assert await caller.pid() == first
            assert world.dispatcher.forwarded == passed

    asyncio.run(story())


def test_a_process_whose_address_is_lent_is_in_use_and_idle_once_nobody_uses_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with dispatching(make_root(tmp_path), idle_s=0.1) as world, calling(world) as caller:
            first = await caller.pid()
            await until(lambda: caller.lent)
            for _ in range(10):
                await asyncio.sleep(0.05)
                assert await caller.pid() == first, "it was stopped for idleness while it was used"
            await until(lambda: gone(first) and world.roles == {})
            assert not caller.lent
            assert await caller.pid() != first

    asyncio.run(story())


def test_after_a_kill_requests_pass_through_the_dispatcher_which_starts_another(tmp_path: Path) -> None:
    async def story() -> None:
        async with dispatching(make_root(tmp_path)) as world, calling(world) as caller:
            first = await caller.pid()
            await until(lambda: caller.lent)
            os.kill(first, signal.SIGKILL)
            await until(lambda: gone(first))
            try:
                second = await caller.pid()
            except aiohttp.ClientError:  # the address was still believed in: a failure there ends that
                second = await caller.pid()
            assert second != first

    asyncio.run(story())


def test_only_addresses_of_this_machine_are_taken(tmp_path: Path) -> None:
    async def story() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            line = b"http://169.254.169.254/latest\n"
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + line)
            await writer.drain()
            asked.set()
            await reader.read()
            writer.close()

        asked = asyncio.Event()
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        service = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/train_step"
        async with aiohttp.ClientSession() as client:
            shortcuts = Shortcuts(client, asyncio.get_running_loop().time)
            shortcuts.heard(service, {"knapper-lease": "/lease/train_step"})
            await asked.wait()
            for _ in range(20):
                await asyncio.sleep(0.01)
                with shortcuts.use(service) as url:
                    assert url == service
            await shortcuts.close()
        server.close()

    asyncio.run(story())
