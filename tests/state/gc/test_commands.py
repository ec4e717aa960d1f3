"""`knapper sweep` and `knapper runs delete`, as an operator types them, beside a server or without one."""

import asyncio
import os
import subprocess
import time
from pathlib import Path

import pytest

from knapper.errors import NotFound
from knapper.state import layout
from knapper.store.directory import DirectoryStore
from tests import command
from tests.sim.history import digest_of
from tests.state.gc.bench import Bench, Clock


def knapper(data: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("KNAPPER_")}
    return command.knapper(*arguments, "--data", str(data), environment={**inherited, **settings})


def test_sweep_deletes_at_once_what_nothing_needs_and_the_run_is_the_same(tmp_path: Path) -> None:
    bench = Bench(DirectoryStore(tmp_path / "store"), Clock(time.time() - 7200.0))

    async def train() -> str:
        await bench.begin()
        for _ in range(3):
            await bench.step()
            await bench.held.snapshot()
        await bench.apply("save_weights", path="kept")
        await bench.apply("save_weights", path="latest")
        await bench.apply("save_weights", path="latest", overwrite=True)
        return await digest_of(bench.machine, bench.held)

    async def after() -> tuple[list[int], int, int, str]:
        operations = [layout.last_number(name) for name in await bench.names(layout.operations(bench.run))]
        snapshots, files = await bench.bundles(layout.snapshots(bench.run)), await bench.bundles()
        await bench.claim("second")
        return operations, len(snapshots), len(files), await digest_of(bench.machine, bench.held)

    before = asyncio.run(train())
    done = knapper(tmp_path, "sweep")
    assert done.stdout.startswith(f"{bench.session}: "), done.stderr
    operations, snapshots, files, digest = asyncio.run(after())
    assert operations == [0, *range(7, 13)]
    assert snapshots == 2
    assert files == 3 + 2, "a gateway knows which superseded samplers are used; checkpoints have two"
    assert digest == before
    assert knapper(tmp_path, "sweep").stdout == "nothing to delete: every object is needed\n"


def test_a_run_that_the_operator_deletes_is_gone_with_all_that_is_of_it(tmp_path: Path) -> None:
    bench = Bench(DirectoryStore(tmp_path / "store"), Clock(time.time()), tenant="ada")

    async def train() -> None:
        await bench.begin()
        for _ in range(3):
            await bench.step()
            await bench.held.snapshot()
        await bench.apply("save_weights", path="kept")

    asyncio.run(train())
    done = knapper(tmp_path, "runs", "delete", bench.run)
    assert done.stdout.startswith(f"training run {bench.run} of tenant ada deleted: "), done.stderr
    left = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in left) < 1000, [(path, path.stat().st_size) for path in left]
    with pytest.raises(NotFound, match="was deleted on"):
        asyncio.run(bench.claim("late"))
    again = knapper(tmp_path, "runs", "delete", bench.run)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("run", ["ses-" + "0" * 32 + ":train:7", "../etc"])
def test_a_run_that_there_is_not_cannot_be_deleted(tmp_path: Path, run: str) -> None:
    done = knapper(tmp_path, "runs", "delete", run)
    assert done.returncode == 1
    assert done.stderr.startswith(f"knapper: training run {run!r} does not exist")
