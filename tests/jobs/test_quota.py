"""A job over its tenant's quota pauses, wakes nobody, and goes on when there is more, with the same adapter."""

import pytest

from knapper.ids import LOCAL_TENANT, RunId, SessionId, TinkerPath, make_run_id
from knapper.jobs import control, revive
from knapper.jobs.names import Start
from knapper.jobs.revive import Seen
from knapper.state.checkpoints import Checkpoints
from knapper.state.daily_tokens import DailyTokens
from knapper.state.ledger import Accounts
from knapper.state.quotas import QuotaBook
from knapper.state.sessions import DAY_S, Finish, Session, Sessions
from knapper.state.tenant_index import Register
from tests.jobs.test_works import JOBS, house
from tests.jobs.works import House, Works, run

__all__ = ["house"]


async def allow(works: Works, **values: int | None) -> None:
    await QuotaBook(works.store, works.clock).change(lambda newest: newest.changed(LOCAL_TENANT, values))
    works.clock.at += 31  # what was looked at is looked at again


async def used(works: Works) -> int:
    accounts = Accounts(works.store, works.clock, works.clock, str)
    return await DailyTokens.over(works.store, accounts, works.clock).recorded(LOCAL_TENANT)


async def paused(works: Works, begun: Start) -> str:
    """The reason, once the job waits for its quota and nothing is under way for it."""
    while not (now := await control.now(works.store, begun)).reason.startswith(control.PAUSED):
        assert now.state == "running", now
        if not works.waits():
            for event in await revive.due(works.services, Seen(), quiet_s=0):
                await works.post(event)
        await works.deliver()
        works.clock.at += 31
    await works.drain()
    return (await control.now(works.store, begun)).reason


async def adapter(works: Works, begun: Start, name: str) -> bytes:
    await works.run(begun)
    assert (await control.now(works.store, begun)).state == "completed"
    return works.adapter(name)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_out_of_tokens_pauses_until_there_are_more(house: House, name: str) -> None:
    undisturbed = Works(house)
    whole = run(lambda: started_and_done(undisturbed, name))

    async def story() -> None:
        works = Works(house)
        await allow(works, tokens_a_day=1)
        works.clock.at -= 31
        begun = await works.submit(JOBS[name], name)
        reason = await paused(works, begun)
        assert reason.startswith(f"{control.PAUSED}: tenant local has used ")
        assert "allowed: 1 a day. The job goes on by itself when the next day has begun, at 00:00 UTC. " in reason
        seen = Seen()
        for _ in range(3):
            assert await revive.due(works.services, seen, quiet_s=0) == [], "nobody is woken to find that out"
            works.clock.at += 60
        assert seen.paused
        spent = await used(works)
        assert spent >= 1
        await allow(works, tokens_a_day=10**9)
        events = await revive.due(works.services, seen, quiet_s=3600)
        assert events, "at once, without the wait for a stalled job"
        assert (await control.now(works.store, begun)).reason == ""
        for event in events:
            await works.post(event)
        assert await adapter(works, begun, name) == whole

    run(story)


async def started_and_done(works: Works, name: str) -> bytes:
    return await adapter(works, await works.submit(JOBS[name], name), name)


def test_a_new_day_lets_a_job_go_on_and_each_day_has_its_own_tokens(house: House) -> None:
    async def story() -> None:
        works = Works(house)
        begun = await works.submit(JOBS["sft"], "sft")
        await allow(works, tokens_a_day=1)
        await paused(works, begun)
        before = await used(works)
        works.clock.at += DAY_S
        assert await used(works) == 0
        for event in await revive.due(works.services, Seen(), quiet_s=0):
            await works.post(event)
        await paused(works, begun)
        assert 0 < await used(works) <= 2 * before

    run(story)


def test_a_job_waits_for_a_run_to_end(house: House) -> None:
    async def story() -> None:
        works = Works(house)
        session = SessionId("ses-" + "a" * 32)
        record = Session(session=session, tenant=LOCAL_TENANT, created_at=works.clock())
        run_id: RunId = make_run_id(session, 0)
        await Register(works.store).add_run(record, run_id)
        await allow(works, runs=1)
        begun = await works.submit(JOBS["sft"], "sft")
        reason = await paused(works, begun)
        assert "has 1 open training runs, and this job needs 1; allowed: 1. The job goes on by itself when" in reason
        assert await revive.due(works.services, Seen(), quiet_s=0) == []
        await Sessions(works.store).finish(session, Finish(reason="success", detail="", finished_at=works.clock()))
        await adapter(works, begun, "sft")

    run(story)


def test_a_job_waits_for_bytes(house: House) -> None:
    async def story() -> None:
        works = Works(house)
        first = await works.submit(JOBS["sft"], "first")
        await adapter(works, first, "first")
        await allow(works, bytes=1)
        begun = await works.submit(JOBS["sft"], "second")
        assert "the checkpoints of tenant local have " in await paused(works, begun)
        checkpoints = Checkpoints(works.store, works.clock)
        for checkpoint in await checkpoints.listed(LOCAL_TENANT):
            await checkpoints.delete(TinkerPath.parse(checkpoint.path), LOCAL_TENANT)
        works.clock.at += 31
        assert await revive.due(works.services, Seen(), quiet_s=3600) != []

    run(story)


def test_a_rank_above_the_quota_is_an_error_of_job_yaml(house: House) -> None:
    async def story() -> None:
        works = Works(house)
        await allow(works, rank=3)
        with pytest.raises(AssertionError, match=r"lora.rank is 4; allowed: 1 to 3: the quota of tenant local"):
            await works.submit(JOBS["sft"], "sft")

    run(story)
