"""A pod lets go before its memory is copied, and goes on as another process: nothing is lost or doubled."""

import asyncio
import os
import pty
import signal
import socket
import time
import tty
from collections.abc import Iterator
from pathlib import Path

import pytest

from knapper.events.cloudevents import Done, Hint
from knapper.store.directory import DirectoryStore
from tests.gateway.pods import Pod, Two, claimed, committed, two
from tests.gateway.test_pods import LAST, expect_calm

QUIESCED, WENT_ON = "quiesced", "goes on, as another process"


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with two(tmp_path_factory.mktemp("snapshots"), routed=True) as running:
        yield running


@pytest.fixture(scope="module")
def calm(pods: Two) -> tuple[str, list[bytes]]:
    async def story() -> tuple[str, list[bytes]]:
        run = await pods.make("calm")
        await pods.accept(run, range(1, LAST))
        await pods.accept_save(run, LAST)
        await pods.a.ring(run, Hint())
        return await pods.weights(run), await pods.answers(run, LAST)

    return asyncio.run(story())


def told(pod: Pod, number: signal.Signals, words: str) -> None:
    """Send the signal, and wait until the pod has done what it asks."""
    times = pod.log.read_text().count(words)
    pod.send(number)
    expect_words(pod, words, times + 1)


def expect_words(pod: Pod, words: str, times: int = 1) -> None:
    end = time.monotonic() + 60
    while pod.log.read_text().count(words) < times:
        assert time.monotonic() < end, pod.said()
        time.sleep(0.02)


def test_a_quiesced_pod_has_let_go_another_goes_on_and_it_comes_back_as_another_process(
    pods: Two, calm: tuple[str, list[bytes]]
) -> None:
    async def story() -> None:
        run = await pods.make("quiesced")
        await pods.accept(run, range(1, 8))
        first = claimed((await pods.a.ring(run, Hint()))[2])
        assert first is not None
        told(pods.a, signal.SIGUSR1, QUIESCED)
        try:
            await pods.accept(run, range(8, LAST))
            status, detail, _ = await pods.a.ring(run, await pods.hint(run, "direct"))
            assert (status, "not_holder" in detail) == (503, True)
            second = claimed((await pods.b.ring(run, await pods.hint(run, "lost")))[2])
            assert second is not None
            assert (second.epoch, second.address) == (first.epoch + 1, pods.b.address)
        finally:
            told(pods.a, signal.SIGUSR2, WENT_ON)
        await pods.accept_save(run, LAST)
        status, detail, _ = await pods.a.ring(run, await pods.hint(run, "service"))
        assert (status, pods.b.address in detail) == (503, True), "it holds nothing any more, and knows who does"
        third = claimed((await pods.a.ring(run, await pods.hint(run, "lost")))[2])
        assert third is not None
        assert third.epoch == second.epoch + 1
        assert third.holder.partition("/")[0] != first.holder.partition("/")[0], "another process, by its name"
        await expect_calm(pods, run, calm)

    asyncio.run(story())


def test_a_pod_that_is_quiesced_in_its_work_ends_the_operation_and_goes_on_from_there(
    pods: Two, calm: tuple[str, list[bytes]]
) -> None:
    async def story(index: int) -> None:
        run = await pods.make(f"busy{index}")
        await pods.a.ring(run, Hint())
        await pods.accept(run, range(1, LAST))
        await pods.accept_save(run, LAST)
        working = asyncio.create_task(pods.a.ring(run, await pods.hint(run, "direct")))
        await asyncio.sleep(0.01 * index)
        await asyncio.to_thread(told, pods.a, signal.SIGUSR1, QUIESCED)
        _, _, frames = await working
        assert not frames or isinstance(frames[-1], Done), "the slice ended, and did not break off"
        told(pods.a, signal.SIGUSR2, WENT_ON)
        status, _, _ = await pods.a.ring(run, await pods.hint(run, "direct"))
        assert status == 503, "it is not the process any more that held the run"
        await pods.a.ring(run, await pods.hint(run, "lost"))
        await expect_calm(pods, run, calm)

    for index in range(5):
        asyncio.run(story(index))


def test_a_pod_asks_for_its_snapshot_once_it_is_loaded_and_a_copy_has_the_address_of_its_own_pod(
    tmp_path: Path, calm: tuple[str, list[bytes]]
) -> None:
    """The sandbox's file is played by a terminal: it is written to, and read until the process goes on."""
    sandbox, file = pty.openpty()
    tty.setraw(file)
    (tmp_path / "checkpoint").symlink_to(os.ttyname(file))
    pod = Pod("pod", tmp_path, routed=True, KNAPPER_POD_SNAPSHOT=str(tmp_path / "checkpoint"))
    pods = Two(DirectoryStore(pod.data / "store"), pod.data, pod, pod)

    async def story(address: str) -> None:
        run = await pods.make("restored")
        await pods.accept(run, range(1, LAST))
        _, said, frames = await pod.ring(run, Hint())
        first = claimed(frames)
        assert first is not None, said
        assert committed(frames) == list(range(LAST))
        assert first.address == address
        # Restored again, from an image that somebody else asked for: with the claim in memory.
        os.write(sandbox, b"restore\n")
        await asyncio.to_thread(expect_words, pod, WENT_ON, 2)
        await pods.accept_save(run, LAST)
        second = claimed((await pod.ring(run, await pods.hint(run, "lost")))[2])
        assert second is not None
        assert second.epoch == first.epoch + 1
        assert second.holder.partition("/")[0] != first.holder.partition("/")[0]
        await expect_calm(pods, run, calm)

    try:
        pod.start()
        assert os.read(sandbox, 2) == b"1\n"
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", pod.port)) != 0, "it listens in the image already"
        copied = "http://10.0.0.7:8012"
        (tmp_path / "spec_environ").write_bytes(f"KNAPPER_HOLDER_ADDRESS={copied}\0HOSTNAME=other\0".encode())
        os.write(sandbox, b"restore\n")
        pod.wait()
        asyncio.run(story(copied))
    finally:
        pod.stop()
        os.close(sandbox)
        os.close(file)
    assert "Traceback" not in pod.said()
