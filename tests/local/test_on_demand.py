"""Functions run only while they are needed; whoever calls meanwhile waits in their socket, and is not refused."""

import asyncio
import os
import signal
import socket
from pathlib import Path

import httpx
import pytest

from knapper import limits
from tests.local.work import World, gone, make_root, on_demand, until


def test_the_first_call_starts_the_process_and_the_next_ones_find_it(tmp_path: Path) -> None:
    async def story() -> None:
        async with on_demand(make_root(tmp_path)) as world:
            await asyncio.sleep(0.1)
            assert world.roles == {}, "nobody has called"
            pids = await asyncio.gather(*(world.pid() for _ in range(8)))
            assert {*pids, await world.pid("sample")} == {world.roles["engine"]}
            assert list(world.roles) == ["engine"]

    asyncio.run(story())


def test_isolated_functions_have_a_process_each(tmp_path: Path) -> None:
    async def story() -> None:
        async with on_demand(make_root(tmp_path), isolated=True) as world:
            training, sampling = await asyncio.gather(world.pid("train_step"), world.pid("sample"))
            assert training != sampling
            assert world.roles == {"train_step": training, "sample": sampling}

    asyncio.run(story())


@pytest.mark.parametrize("isolated", [False, True])
def test_method_path_query_headers_and_body_arrive(tmp_path: Path, isolated: bool) -> None:
    async def story() -> None:
        async with on_demand(make_root(tmp_path), isolated=isolated) as world:
            answer = await world.client.put(world.urls["sample"] + "a/b?c=d", content=b"12345", headers={"ce-id": "x"})
            got = answer.json()
            assert (got["function"], got["method"], got["body"]) == ("sample", "PUT", 5)
            assert (got["query"], got["header"]) == ("c=d", "x")
            assert got["path"].endswith("/a/b")

    asyncio.run(story())


def test_a_client_that_leaves_is_noticed_by_the_function(tmp_path: Path) -> None:
    async def story() -> None:
        async with on_demand(make_root(tmp_path)) as world:
            async with world.frames() as lines:
                assert await anext(lines) == "first"
            await until((world.notes / "left").exists)

    asyncio.run(story())


def test_an_idle_process_ends_and_the_next_call_starts_another(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def story() -> None:
        async with on_demand(make_root(tmp_path), idle_s=0.2) as world:
            first = await world.pid()
            await until(lambda: gone(first) and world.roles == {})
            second = await world.pid()
            assert second != first

    asyncio.run(story())
    said = capfd.readouterr()
    assert "idle for 0.2 s, scaled to zero" in said.err
    assert "killed by" not in said.out + said.err, "it is no crash"


def test_a_process_with_a_call_under_way_is_not_idle(tmp_path: Path) -> None:
    async def story() -> None:
        async with on_demand(make_root(tmp_path), idle_s=0.1) as world:
            async with world.frames() as lines:
                assert await anext(lines) == "first"
                before = world.roles
                await asyncio.sleep(0.5)  # several times the idle time
                (world.notes / "go").touch()
                assert await anext(lines) == "second"
                assert world.roles == before

    asyncio.run(story())


def test_a_process_that_woke_for_a_caller_who_left_ends_too(tmp_path: Path) -> None:
    async def story() -> None:
        async with on_demand(make_root(tmp_path), idle_s=0.1) as world:
            world.connect().close()
            await until(lambda: "engine" in world.roles)
            woken = world.roles["engine"]
            await until(lambda: gone(woken) and world.roles == {})

    asyncio.run(story())


def test_calls_around_the_moment_at_which_it_ends_are_all_answered_at_the_first_attempt(tmp_path: Path) -> None:
    """By the process that ends, or by the next one: new connections, each with one call."""

    async def call(world: World) -> int:
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            return int((await client.post(world.urls["train_step"])).json()["pid"])

    async def story() -> None:
        async with on_demand(make_root(tmp_path), idle_s=0.1) as world:
            pids = [await call(world)]
            for n in range(6):
                await asyncio.sleep(0.1 + 0.025 * n)  # it ends 0.1 to 0.25 s after an answer
                pids += await asyncio.gather(*(call(world) for _ in range(4)))
            assert len({*pids}) > 2, "it ended in between"
            assert len(world.deliveries()) == len(pids)

    asyncio.run(story())


def test_a_request_that_was_on_its_way_when_the_process_began_to_end_is_answered(tmp_path: Path) -> None:
    """On a connection that was accepted and silent, and on one that was used before."""

    def request(path: str) -> bytes:
        return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode()

    async def until_closed(connection: socket.socket) -> bytes:
        said = b""
        while piece := await asyncio.to_thread(connection.recv, 65536):
            said += piece
        return said

    async def story() -> None:
        async with on_demand(make_root(tmp_path)) as world:
            ending = await world.pid()
            with world.connect() as silent, world.connect() as used:
                used.sendall(request("/train_step/"))
                assert (await asyncio.to_thread(used.recv, 65536)).startswith(b"HTTP/1.1 200")
                await world.pid()  # both are accepted by now
                os.kill(ending, signal.SIGSTOP)
                os.kill(ending, signal.SIGTERM)
                used.sendall(request("/train_step/used"))
                silent.sendall(request("/train_step/silent")[:20])
                os.kill(ending, signal.SIGCONT)
                assert f'"pid":{ending},"path":"/train_step/used"'.encode() in await until_closed(
                    used
                )  # it ends by now
                silent.sendall(request("/train_step/silent")[20:])
                assert f'"pid":{ending},"path":"/train_step/silent"'.encode() in await until_closed(silent)
            await until(lambda: gone(ending))
            assert await world.pid() != ending

    asyncio.run(story())


def test_after_kill_9_in_the_middle_of_an_answer_the_next_call_finds_a_new_process(tmp_path: Path) -> None:
    async def story() -> None:
        async with on_demand(make_root(tmp_path)) as world:
            with pytest.raises(httpx.RemoteProtocolError):
                async with world.frames() as lines:
                    async for _ in lines:
                        os.kill(world.roles["engine"], signal.SIGKILL)
            assert (await world.post()).status_code == 200
            assert len(world.deliveries()) == 2, "what broke off is for its caller to repeat"

    asyncio.run(story())


def test_who_waits_in_the_socket_when_the_process_dies_is_answered_by_the_next_one(tmp_path: Path) -> None:
    async def story() -> None:
        async with on_demand(make_root(tmp_path)) as world:
            first = await world.pid()
            os.kill(first, signal.SIGSTOP)
            async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
                waiting = asyncio.create_task(client.post(world.urls["sample"]))
                await asyncio.sleep(0.2)
                os.kill(first, signal.SIGKILL)
                assert (await waiting).json()["pid"] != first

    asyncio.run(story())


def test_a_function_that_fails_to_import_is_503_then_backs_off_then_recovers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def story() -> None:
        root = make_root(tmp_path)
        (root / "notes" / "broken").touch()
        async with on_demand(root) as world:
            first = await world.post(content=bytes(2_000_000))
            assert (first.status_code, first.json()["code"]) == (503, "unavailable")
            assert "did not start: exit code 3" in first.json()["detail"]
            second = await world.post()
            assert (second.status_code, second.headers["retry-after"]) == (503, "1")
            assert "the next attempt is in" in second.json()["detail"]
            assert world.roles == {}
            codes: list[str] = []
            while len({*codes}) < 2:
                codes.append((await world.post()).json()["code"])
                await asyncio.sleep(0.05)
            assert {*codes} == {"unavailable", "unservable"}, "after the third failure it is told as what stands"
            (root / "notes" / "broken").unlink()
            while (await world.post()).status_code == 503:  # noqa: ASYNC110  what a client does
                await asyncio.sleep(0.05)

    asyncio.run(story())
    assert "RuntimeError: the weights are broken" in capfd.readouterr().err


def test_a_process_that_hangs_at_its_start_is_killed_and_whoever_waits_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "start_s_max", 1.0)

    async def story() -> None:
        root = make_root(tmp_path)
        (root / "notes" / "hangs").touch()
        async with on_demand(root) as world:
            answer = asyncio.create_task(world.post())
            await until(lambda: "engine" in world.roles)
            hanging = world.roles["engine"]
            refused = await answer
            assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
            assert "engine hung: it accepted no call for 1 s" in refused.json()["detail"]
            assert gone(hanging)
            monkeypatch.setattr(limits, "start_s_max", 60.0)
            (root / "notes" / "hangs").unlink()
            while (await world.post()).status_code == 503:  # noqa: ASYNC110  what a client does
                await asyncio.sleep(0.05)

    asyncio.run(story())


def test_a_process_that_is_still_starting_ends_with_the_rest(tmp_path: Path) -> None:
    async def story() -> None:
        root = make_root(tmp_path)
        (root / "notes" / "hangs").touch()
        async with on_demand(root) as world:
            with world.connect():
                await until(lambda: "engine" in world.roles)
                starting = world.roles["engine"]
        assert gone(starting)

    asyncio.run(story())


def test_a_process_that_stops_accepting_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with on_demand(make_root(tmp_path)) as world:
            first = await world.pid()
            monkeypatch.setattr(limits, "start_s_max", 2.0)
            os.kill(first, signal.SIGSTOP)
            async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
                assert "engine hung" in (await client.post(world.urls["train_step"])).json()["detail"]
            assert gone(first)

    asyncio.run(story())


@pytest.mark.parametrize("path", ["", "rewards", "train_stepp/", "trainstep/x"])
def test_an_unknown_function_is_404(tmp_path: Path, path: str) -> None:
    async def story() -> None:
        async with on_demand(make_root(tmp_path)) as world:
            answer = await world.client.post(world.urls["train_step"].removesuffix("train_step/") + path)
            assert answer.status_code == 404

    asyncio.run(story())
