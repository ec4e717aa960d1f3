"""Local adapter files: as saved, once for the same content, least recently used evicted first."""

import asyncio
import os
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch

from knapper import limits
from knapper.engine import checkpoint_format
from knapper.engine.models.config import ModelConfig
from knapper.errors import Corrupt, NotFound, UserError
from knapper.state.journal import bundles
from knapper.state.journal.records import Spec
from knapper.store.memory import MemoryStore
from knapper.vllm import adapters
from knapper.vllm.adapters import AdapterFiles
from knapper.vllm.core import Adapter
from tests.engine.tiny import tiny_model
from tests.vllm.house import adapter_state, bundle

SPEC = Spec(
    run="one", tenant="local", base_model="tiny", rank=4, alpha=8.0, seed=1, train_attn=True, train_mlp=True,
    train_unembed=True,
)  # fmt: skip


class Bench:
    def __init__(self, directory: Path) -> None:
        self.store = MemoryStore()
        self.facts = ModelConfig.read(tiny_model(directory / "model"))
        self.forgotten: list[int] = []
        self.memory = directory / "memory"
        self.memory.mkdir()
        self.adapter_files = self.open()

    def open(self, dtype: torch.dtype = torch.float32) -> AdapterFiles:
        return AdapterFiles(
            self.store, self.facts, self.memory, self.forget, lambda spec: adapters.refusal(spec, 16), dtype
        )

    async def forget(self, adapter: Adapter) -> None:
        self.forgotten.append(adapter.number)

    async def save(self, name: str, spec: Spec = SPEC) -> dict[str, bytes]:
        files = checkpoint_format.export(adapter_state(self.facts, spec), with_optimizer=False)
        await bundles.write(self.store, bundle(name), files, spec=spec, seq=1, epoch=1)
        return {each: bytes(content) for each, content in files.items()}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_it_lies_there_as_saved_and_equal_ones_are_one(bench: Bench) -> None:
    async def story() -> None:
        saved = await bench.save("a")
        await bench.save("twin")
        await bench.save("other", msgspec.structs.replace(SPEC, seed=2))
        async with bench.adapter_files.take(bundle("a")) as a, bench.adapter_files.take(bundle("twin")) as twin:
            assert {path.name: path.read_bytes() for path in a.adapter.directory.iterdir()} == saved
            assert a.adapter == twin.adapter
            async with bench.adapter_files.take(bundle("other")) as other:
                assert other.adapter.content != a.adapter.content
                assert other.adapter.number != a.adapter.number
        together = await asyncio.gather(*(take(bench.adapter_files, bundle("a")) for _ in range(5)))
        assert {each.number for each in together} == {a.adapter.number}

    asyncio.run(story())


def test_what_is_changed_gone_or_of_another_shape_is_refused(bench: Bench) -> None:
    async def story() -> None:
        files = await bench.save("changed")
        await bench.store.delete(bundle("changed") + checkpoint_format.ADAPTER)
        await bench.store.put_if_absent(
            bundle("changed") + checkpoint_format.ADAPTER, bytes(len(files[checkpoint_format.ADAPTER]))
        )
        with pytest.raises(Corrupt, match="bytes that are others"):
            await take(bench.adapter_files, bundle("changed"))
        with pytest.raises(NotFound, match="deleted or expired"):
            await take(bench.adapter_files, bundle("gone"))
        await bench.save("wide", msgspec.structs.replace(SPEC, rank=17))
        with pytest.raises(UserError, match="rank 17; this vLLM sampler has room for ranks up to 16"):
            await take(bench.adapter_files, bundle("wide"))

    asyncio.run(story())


def test_the_longest_unused_goes_and_what_is_used_stays(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "adapters_cached_max", 2)

    async def story() -> None:
        for n in range(4):
            await bench.save(f"a{n}", msgspec.structs.replace(SPEC, seed=10 + n))
        async with bench.adapter_files.take(bundle("a0")) as used:
            a1 = await take(bench.adapter_files, bundle("a1"))
            await take(bench.adapter_files, bundle("a2"))
            assert bench.forgotten == [a1.number]
            assert not a1.directory.exists()
            assert used.adapter.directory.exists()
        again = await take(bench.adapter_files, bundle("a1"))
        assert again.content == a1.content
        assert again.number != a1.number

    asyncio.run(story())


def test_a_save_of_this_process_is_laid_there_while_it_is_stored_and_sampled_once_it_is_durable(bench: Bench) -> None:
    async def story() -> None:
        state = adapter_state(bench.facts, SPEC)
        files = checkpoint_format.export(state, with_optimizer=False)
        bench.adapter_files.offer(SPEC, files)
        async with asyncio.timeout(10):
            while bench.adapter_files.offered:  # noqa: ASYNC110  nobody waits for it but this test
                await asyncio.sleep(0.01)
        [laid] = bench.memory.glob("*/*")
        with pytest.raises(NotFound):  # its bundle is not stored yet: nobody may know its name
            await take(bench.adapter_files, bundle("a"))
        await bundles.write(bench.store, bundle("a"), files, spec=SPEC, seq=1, epoch=1)
        await bench.store.delete(bundle("a") + checkpoint_format.ADAPTER)  # to see whether it is read
        assert (await take(bench.adapter_files, bundle("a"))).directory == laid

    asyncio.run(story())


def test_an_offer_that_cannot_be_taken_leaves_its_samples_as_they_were(bench: Bench) -> None:
    async def story() -> None:
        wide = msgspec.structs.replace(SPEC, rank=17)
        bench.adapter_files.offer(
            wide, checkpoint_format.export(adapter_state(bench.facts, wide), with_optimizer=False)
        )
        broken = checkpoint_format.export(adapter_state(bench.facts, SPEC), with_optimizer=False)
        bench.adapter_files.offer(msgspec.structs.replace(SPEC, rank=5), broken)
        while bench.adapter_files.offered:  # noqa: ASYNC110  nobody waits for it but this test
            await asyncio.sleep(0.01)
        assert list(bench.memory.glob("*/*")) == []
        await bench.save("a")
        assert (await take(bench.adapter_files, bundle("a"))).directory.exists()

    asyncio.run(story())


def test_it_lies_there_in_the_dtype_of_the_base(bench: Bench) -> None:
    async def story() -> None:
        saved = safetensors.torch.load((await bench.save("a"))[checkpoint_format.ADAPTER])
        adapter = await take(bench.open(torch.bfloat16), bundle("a"))
        laid = safetensors.torch.load((adapter.directory / checkpoint_format.ADAPTER).read_bytes())
        assert laid.keys() == saved.keys()
        assert all(torch.equal(laid[name], saved[name].bfloat16()) for name in saved)

    asyncio.run(story())


def test_what_a_killed_process_left_in_memory_is_swept(bench: Bench) -> None:
    left = bench.memory / "knapper-adapters-x"
    left.mkdir()
    stranger = bench.memory / "something"
    stranger.mkdir()
    other = bench.open()
    assert list(bench.memory.iterdir()) == [stranger]  # and the new one has none until an adapter comes
    other.close()


def test_two_processes_with_one_pid_leave_each_other_their_adapters(bench: Bench) -> None:
    """Containers that share a memory file system: a later process sees only whether a directory is locked."""
    directory, descriptor = adapters._locked_directory(bench.memory)
    (directory / "1").mkdir()
    bench.open().close()
    assert (directory / "1").is_dir()
    os.close(descriptor)  # as when its process ends
    bench.open().close()
    assert not directory.exists()


async def take(adapter_files: AdapterFiles, name: str) -> Adapter:
    async with adapter_files.take(name) as fetched:
        return fetched.adapter
