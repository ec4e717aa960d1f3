"""Answers are found by whoever looks for the first time, whatever the newest record is."""

import asyncio

import pytest

from knapper.errors import UserError
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.records import Commit
from knapper.state.journal.results import Results
from knapper.state.journal.run import Holder, Run
from knapper.store.memory import MemoryStore
from tests.sim.history import CREATION, RUN, TERMS, Step, send
from tests.sim.ledger import LedgerMachine


async def nothing(_n: int, _commit: Commit) -> None:
    return None


def test_an_answer_behind_the_fences_of_later_claims_is_found() -> None:
    """A gateway and a train_step that both died: the run is claimed before the new gateway first looks."""

    async def story() -> None:
        store = MemoryStore()
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        await send(acceptor, Step(1, "optim_step", b"{}"))
        fenced = Results(store)
        run = await Run.claim(store, RUN, LedgerMachine(), Holder("h0", "", TERMS), lambda: 0.0)
        assert await fenced.find(RUN, 0) is None
        assert not await run.apply_pending(lambda: False, nothing)
        for n in range(3):
            await Run.claim(store, RUN, LedgerMachine(), Holder(f"h{n + 1}", "", TERMS), lambda: 0.0)
        results = Results(store)
        assert await results.find(RUN, 1) is not None
        assert results.applied(RUN) == 1
        assert await results.find(RUN, 2) is None
        assert await fenced.find(RUN, 1) is not None

    asyncio.run(story())


def test_a_retried_sampler_save_with_the_sdk_s_next_number_is_the_same_save() -> None:
    async def story() -> None:
        acceptor = Acceptor(MemoryStore(), lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        for number in (3, 4):
            body = b'{"seq_id":1,"sampling_session_seq_id":%d}' % number
            await send(acceptor, Step(1, "save_weights_for_sampler", body))
        with pytest.raises(UserError, match="was used before"):
            await send(acceptor, Step(1, "save_weights_for_sampler", b'{"seq_id":1,"path":"a"}'))

    asyncio.run(story())
