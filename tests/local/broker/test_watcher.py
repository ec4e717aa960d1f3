"""Files in a folder become the events of a bucket: each content once, never half of one, found after a rest too."""

import asyncio
import hashlib
import inspect
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from knapper.errors import TooMany
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.exchange.directory import DirectoryExchange
from knapper.local.broker import watcher
from knapper.local.broker.watcher import Watcher


@pytest.fixture
def shallow() -> Iterator[None]:
    """A stack that is soon used up, so that folders need not be so deep that nothing can delete them."""
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 250)
    yield
    sys.setrecursionlimit(usual)


@asynccontextmanager
async def watch_task(root: Path) -> AsyncIterator[list[Event]]:
    heard: list[Event] = []

    async def post(event: Event) -> None:
        cloudevents.as_binary(*event.encode())  # as the process does
        heard.append(event)

    stop = asyncio.Event()
    task = asyncio.create_task(Watcher(root, post).watch(stop))
    yield heard
    stop.set()
    await task


async def until(heard: list[Event], count: int) -> None:
    async with asyncio.timeout(20):
        while len(heard) < count:  # noqa: ASYNC110  the watcher tells a plain list
            await asyncio.sleep(0.02)


async def only(heard: list[Event], count: int) -> None:
    """So many come, and then no more for longer than a look takes."""
    await until(heard, count)
    await asyncio.sleep(0.8)
    assert len(heard) == count, [each.subject for each in heard]


def put(root: Path, name: str, data: bytes) -> Path:
    path = root / "inbox" / "local" / "job" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_what_lies_there_and_what_comes_is_told_once_for_each_content(tmp_path: Path) -> None:
    async def story() -> None:
        put(tmp_path, "before.jsonl", b"{}")
        async with watch_task(tmp_path) as heard:
            await until(heard, 1)
            path = put(tmp_path, "job.yaml", b"kind: rl")
            await until(heard, 2)
            path.write_bytes(b"kind: sft")
            await until(heard, 3)
            put(tmp_path, ".hidden", b"x")
            (path.parent / "linked").symlink_to(path)
            await only(heard, 3)
        event = heard[1]
        assert (event.type, event.subject) == (cloudevents.OBJECT_FINALIZED, "objects/inbox/local/job/job.yaml")
        assert event.source == "//storage.googleapis.com/projects/_/buckets/local"
        data = json.loads(event.data)
        assert data["generation"] == hashlib.sha256(b"kind: rl").hexdigest()
        assert (data["name"], data["bucket"], data["size"]) == ("inbox/local/job/job.yaml", "local", "8")
        assert len({each.id for each in heard}) == 3

    asyncio.run(story())


def test_a_file_that_still_grows_is_not_told_of(tmp_path: Path) -> None:
    async def story() -> None:
        async with watch_task(tmp_path) as heard:
            path = put(tmp_path, "data.jsonl", b"")
            whole = b""
            for _ in range(12):
                whole += b"0123456789"
                path.write_bytes(whole)
                await asyncio.sleep(0.1)
            await only(heard, 1)
        assert json.loads(heard[0].data)["generation"] == hashlib.sha256(whole).hexdigest()

    asyncio.run(story())


def test_a_broker_that_is_full_hears_of_a_file_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "_LOOK_S", 0.1)
    heard: list[Event] = []
    full = iter([True, True, False, False])

    async def post(event: Event) -> None:
        if next(full):
            raise TooMany("4096 events are under way")
        heard.append(event)

    async def story() -> None:
        stop = asyncio.Event()
        task = asyncio.create_task(Watcher(tmp_path, post).watch(stop))
        put(tmp_path, "job.yaml", b"kind: rl")
        await until(heard, 1)
        put(tmp_path, "data.jsonl", b"{}")
        await only(heard, 2)
        stop.set()
        await task

    asyncio.run(story())


def test_files_that_nobody_can_be_told_of_hide_no_others(tmp_path: Path, shallow: None) -> None:
    """Names that are no text, or no line; a time that no calendar has; a folder so deep that no name reaches there."""

    async def story() -> None:
        put(tmp_path, "a first", b"x")
        folder = tmp_path / "inbox" / "local" / "job"
        (folder / os.fsdecode(b"\xff\xfe.yaml")).write_bytes(b"x")
        (folder / "two\nlines\x1b[31m").write_bytes(b"x")
        (folder / ("long" * 60)).write_bytes(b"x")
        os.utime(put(tmp_path, "far", b"x"), (2**42, 2**42))
        os.utime(put(tmp_path, "past", b"x"), (-(2**37), -(2**37)))
        deep = os.open(folder, os.O_RDONLY)
        for _ in range(400):
            os.mkdir("d", dir_fd=deep)
            below = os.open("d", os.O_RDONLY, dir_fd=deep)
            os.close(deep)
            deep = below
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=deep))
        os.close(deep)
        async with watch_task(tmp_path) as heard:
            await until(heard, 1)
            put(tmp_path, "z last", b"x")
            async with asyncio.timeout(20):
                while "objects/inbox/local/job/z last" not in [each.subject for each in heard]:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        told = {each.subject.removeprefix("objects/inbox/local/job/") for each in heard}
        assert {"a first", "z last"} <= told
        assert not any("\udcff" in each or "\n" in each for each in told)
        listed = {entry.name for entry in await DirectoryExchange(tmp_path).list("inbox/")}
        assert {"inbox/local/job/a first", "inbox/local/job/z last"} <= listed

    asyncio.run(story())
