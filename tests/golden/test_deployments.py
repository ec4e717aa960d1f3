"""A store that an older knapper wrote goes on under this one: state, checkpoint and sampler are what they were."""

import asyncio
from pathlib import Path

import pytest

from knapper.engine.run_machine import TrainingMachine
from knapper.ids import TinkerPath
from knapper.state.checkpoints import Checkpoints
from knapper.state.gc.collector import Collector
from knapper.state.gc.lookups import Retention
from knapper.state.journal import bundles
from knapper.state.journal.records import decode
from knapper.state.sessions import Sampler
from tests.golden import deployment
from tests.sim.history import RUN


@pytest.mark.parametrize("path", sorted(deployment.FILES.iterdir()), ids=lambda path: path.stem)
def test_an_older_store_goes_on(path: Path, tmp_path: Path) -> None:
    store, digest = deployment.opened(path)

    async def story(machine: TrainingMachine) -> None:
        run = await deployment.claimed(store, machine)
        assert run.applied == 4
        assert await deployment.digest_of(machine, run) == digest
        await Collector(store, Retention(1.0, 1.0, 1.0, 1e12, 1e12), lambda: 2e9, lambda: 0.0).sweep()
        run = await deployment.claimed(store, machine)
        assert await deployment.digest_of(machine, run) == digest, "the collector took something that a recovery needs"
        saved = TinkerPath(RUN, "weights", "golden")
        checkpoint = await Checkpoints(store, lambda: 1e9).resolve(saved, "local")
        _, files = await bundles.read(store, checkpoint.bundle)
        state = await machine.create(run.creation.spec, files, True)
        assert run.state is not None
        assert await machine.serialize(state) == await machine.serialize(run.state)
        [name] = await store.list("samplers/")
        sampler = decode(await store.get(name) or b"", Sampler, name)
        assert set((await bundles.read(store, sampler.bundle))[1]) == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }

    with deployment.machine(tmp_path / "tiny") as machine:
        asyncio.run(story(machine))


def test_there_is_a_store_to_read() -> None:
    assert [*deployment.FILES.glob("*.zip")]
