"""The sweep as an operator runs it: a week later the old records go, and the run is the same."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from knapper.journal import names
from knapper.journal.accept import Acceptor
from knapper.journal.run import Holder, Run
from knapper.store.directory import DirectoryStore
from tests.journal.test_run import nothing
from tests.sim.history import CREATION, RUN, TERMS, Step, digest_of, send
from tests.sim.ledger import LedgerMachine


def test_the_command_deletes_old_records_below_the_second_newest_snapshot(tmp_path: Path) -> None:
    store, machine = DirectoryStore(tmp_path / "store"), LedgerMachine()

    async def train() -> str:
        acceptor = Acceptor(store, lambda: 0.0)  # long ago
        await acceptor.create(CREATION, b"create")
        run = await Run.claim(store, RUN, machine, Holder("h", "", TERMS), lambda: 0.0)
        for seq in range(1, 7):
            await send(acceptor, Step(seq, "optim_step", b"{}"))
            await run.apply_pending(lambda: False, nothing)
            if seq % 2 == 0:
                await run.snapshot()  # after 2, 4 and 6
        return await digest_of(machine, run)

    async def operations() -> list[int]:
        return [names.last_number(name) for name in await store.list(names.operations(RUN))]

    before = asyncio.run(train())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KNAPPER_")}
    command = [sys.executable, "-m", "knapper.cli", "sweep", "--data", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)

    assert done.stdout.startswith(f"{RUN}: ")
    assert asyncio.run(operations()) == [0, 5, 6]
    again = asyncio.run(Run.claim(store, RUN, machine, Holder("h2", "", TERMS), lambda: 0.0))
    assert asyncio.run(digest_of(machine, again)) == before
