"""Functions run only while they are needed, and their answers come through as they are made."""

import asyncio
import os
import signal
from pathlib import Path

import httpx
import pytest

from knapper import limits
from tests.local.work import dispatching, gone, make_root, until


def test_the_first_request_starts_the_process_and_the_next_ones_find_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with dispatching(make_root(tmp_path)) as world:
            assert (await world.client.get("/")).json() == {"engine": "stopped", "reward": "stopped"}
            pids = await asyncio.gather(*(world.pid() for _ in range(8)))
            assert len({*pids, await world.pid("/sample")}) == 1
            assert (await world.client.get("/")).json() == {"engine": "running", "reward": "stopped"}

    asyncio.run(story())


def test_isolated_functions_have_a_process_each(tmp_path: Path) -> None:
    async def story() -> None:
        async with dispatching(make_root(tmp_path), isolated=True) as world:
            training, sampling = await asyncio.gather(world.pid("/train_step"), world.pid("/sample"))
            assert training != sampling
            assert world.roles == {"train_step": training, "sample": sampling}

    asyncio.run(story())


@pytest.mark.parametrize("isolated", [False, True])
def test_method_path_query_headers_and_body_arrive(tmp_path: Path, isolated: bool) -> None:
    async def story() -> None:
        async with dispatching(make_root(tmp_path), isolated=isolated) as world:
            answer = await world.client.put("/sample/a/b?c=d", content=b"12345", headers={"ce-id": "x"})
            got = answer.json()
            assert (got["function"], got["method"], got["body"]) == ("sample", "PUT", 5)
            assert (got["query"], got["header"]) == ("c=d", "x")
            assert got["path"].endswith("/a/b")

    asyncio.run(story())


def test_frames_pass_as_they_come(tmp_path: Path) -> None:
    async def story() -> None:
        async with dispatching(make_root(tmp_path)) as world:
            async with world.client.stream("POST", "/train_step/frames") as answer:
                lines = answer.aiter_lines()
                assert await anext(lines) == "first"  # the function now waits for `go`: nothing was held back
                (world.notes / "go").touch()
                assert await anext(lines) == "second"

    asyncio.run(story())


def test_a_client_that_leaves_is_noticed_by_the_function(tmp_path: Path) -> None:
    async def story() -> None:
        async with dispatching(make_root(tmp_path)) as world:
            async with world.client.stream("POST", "/train_step/frames") as answer:
                assert await anext(answer.aiter_lines()) == "first"
            await until((world.notes / "left").exists)

    asyncio.run(story())


def test_an_idle_process_is_stopped_and_the_next_request_starts_another(tmp_path: Path) -> None:
    async def story() -> None:
        async with dispatching(make_root(tmp_path), idle_s=0.2) as world:
            first = await world.pid()
            await until(lambda: gone(first) and world.roles == {})
            second = await world.pid()
            assert second != first

    asyncio.run(story())


def test_a_process_with_a_request_in_flight_is_not_idle(tmp_path: Path) -> None:
    async def story() -> None:
        async with dispatching(make_root(tmp_path), idle_s=0.1) as world:
            async with world.client.stream("POST", "/train_step/frames") as answer:
                lines = answer.aiter_lines()
                assert await anext(lines) == "first"
                await asyncio.sleep(0.5)  # several times the idle time
                assert (await world.client.get("/")).json() == {"engine": "running", "reward": "stopped"}
                (world.notes / "go").touch()
                assert await anext(lines) == "second"

    asyncio.run(story())


def test_after_kill_9_in_the_middle_of_an_answer_the_next_request_finds_a_new_process(tmp_path: Path) -> None:
    async def story() -> None:
        async with dispatching(make_root(tmp_path)) as world:
            with pytest.raises(httpx.RemoteProtocolError):
                async with world.client.stream("POST", "/train_step/frames") as answer:
                    async for _ in answer.aiter_lines():
                        os.kill(world.roles["engine"], signal.SIGKILL)
            assert (await world.client.post("/train_step")).status_code == 200
            assert len(world.deliveries()) == 2  # a broken answer is not asked for again: the caller knows

    asyncio.run(story())


def test_a_request_whose_process_dies_before_it_answers_is_delivered_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with dispatching(make_root(tmp_path)) as world:
            answer = await world.client.post("/train_step/die-once", content=b"bell")
            assert answer.status_code == 200
            assert [line.split()[-1] for line in world.deliveries()] == ["bell", "bell"]

    asyncio.run(story())


def test_a_request_that_kills_every_process_is_refused_after_two(tmp_path: Path) -> None:
    async def story() -> None:
        async with dispatching(make_root(tmp_path)) as world:
            answer = await world.client.post("/train_step/die")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert "ended twice" in answer.json()["detail"]
            assert len(world.deliveries()) == 2

    asyncio.run(story())


@pytest.mark.parametrize("isolated", [False, True])
def test_a_function_that_fails_to_import_is_503_then_backs_off_then_recovers(
    tmp_path: Path, isolated: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    async def story() -> None:
        root = make_root(tmp_path)
        (root / "notes" / "broken").touch()
        async with dispatching(root, isolated=isolated) as world:
            first = await world.client.post("/train_step")
            assert (first.status_code, first.json()["code"]) == (503, "unavailable")
            assert "did not start: exit code 3" in first.json()["detail"]
            second = await world.client.post("/train_step")
            assert (second.status_code, second.headers["retry-after"]) == (503, "1")
            assert "the next attempt is in" in second.json()["detail"]
            assert world.roles == {}
            (root / "notes" / "broken").unlink()
            while (await world.client.post("/train_step")).status_code == 503:  # noqa: ASYNC110  what a client does
                await asyncio.sleep(0.05)

    asyncio.run(story())
    assert "RuntimeError: the weights are broken" in capfd.readouterr().err


def test_a_body_of_the_limit_passes_and_one_byte_more_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(limits, "body_bytes_max", 100_000)

    async def story() -> None:
        async with dispatching(make_root(tmp_path)) as world:
            assert (await world.client.post("/sample", content=bytes(100_000))).json()["body"] == 100_000
            answer = await world.client.post("/sample", content=bytes(100_001))
            assert (answer.status_code, answer.json()["code"]) == (413, "too_large")

    asyncio.run(story())


@pytest.mark.parametrize("path", ["/rewards", "/train_stepp", "/trainstep/x"])
def test_an_unknown_function_is_404_and_starts_nothing(tmp_path: Path, path: str) -> None:
    async def story() -> None:
        async with dispatching(make_root(tmp_path)) as world:
            answer = await world.client.post(path)
            assert answer.status_code == 404
            assert "/train_step, /sample" in answer.json()["detail"]
            assert world.roles == {}

    asyncio.run(story())
