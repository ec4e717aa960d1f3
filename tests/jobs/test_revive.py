"""A job whose bells were all lost goes on: the tick finds who has something to do, and nobody else is woken."""

import pytest

from knapper.events import cloudevents
from knapper.jobs import control, revive
from knapper.jobs.revive import Seen
from tests.jobs.test_works import JOBS, house
from tests.jobs.works import House, Malice, Works, run

__all__ = ["house"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_hears_no_bell_but_the_ticks_ends(house: House, name: str) -> None:
    async def story() -> None:
        works = Works(house, malice=Malice())
        begun = await works.submit(JOBS[name])
        works.silence()
        seen, wakened = Seen(), 0
        for _ in range(60):
            if not await control.runs(works.store, begun):
                break
            rung = await revive.due(works.services, seen, quiet_s=0)
            assert rung, "a job with work undone is rung for"
            assert len({event.id for event in rung}) == len(rung)
            for event in rung:
                assert event.model
                wakened += 1
                await works.post(event)
            await works.drain_once()
        assert (await control.now(works.store, begun)).state == "completed"
        assert await revive.due(works.services, seen, quiet_s=0) == [], "an ended job wakes nobody"
        assert wakened < 40

    run(story)


def test_a_job_is_rung_for_only_after_it_has_not_moved_for_a_while(
    house: House,
) -> None:
    async def story() -> None:
        works = Works(house)
        await works.submit(JOBS["rl"])
        works.silence()
        seen = Seen()
        assert await revive.due(works.services, seen, quiet_s=60) == []
        works.clock.at += 59
        assert await revive.due(works.services, seen, quiet_s=60) == []
        works.clock.at += 2
        assert [event.type for event in await revive.due(works.services, seen, quiet_s=60)] == [cloudevents.JOB_STARTED]
        assert await revive.due(works.services, seen, quiet_s=60) == [], "and again only after as long"

    run(story)


def test_whoever_has_nothing_to_do_is_not_woken(house: House) -> None:
    """Sampled and not scored: reward's bell alone."""

    async def story() -> None:
        works = Works(house)
        await works.submit(JOBS["rl"])
        await works.deliver()  # sample
        works.silence()
        types = [event.type for event in await revive.due(works.services, Seen(), quiet_s=0)]
        assert types == [cloudevents.ROLLOUTS_SAMPLED]

    run(story)


def test_a_job_goes_on_at_the_first_look_where_the_broker_began_with_the_gateway(house: House) -> None:
    """`knapper up` that is started again: what its broker had to deliver died with it."""

    async def story() -> None:
        works = Works(house)
        await works.submit(JOBS["rl"])
        works.silence()
        seen = Seen(broker_began=True)
        assert [event.type for event in await revive.due(works.services, seen, quiet_s=60)] == [cloudevents.JOB_STARTED]
        assert await revive.due(works.services, seen, quiet_s=60) == [], "from then on as ever"
        works.clock.at += 61
        assert [event.type for event in await revive.due(works.services, seen, quiet_s=60)] == [cloudevents.JOB_STARTED]

    run(story)
