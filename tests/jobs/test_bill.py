"""Bills say what `knapper usage` counts, whatever slices, repetitions and kills a job went through."""

import json
from typing import Any

import pytest

from knapper.ids import LOCAL_TENANT
from knapper.jobs import control
from knapper.state import usage
from knapper.state.ledger import Accounts
from knapper.state.prices import Prices
from knapper.state.tenant_index import Register
from knapper.state.usage import Window
from tests.jobs.test_works import JOBS
from tests.jobs.works import House, Malice, Works, run

EVER = Window(0, 10**6)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("tiny"))


async def done(works: Works, *names: str) -> Works:
    """All of these jobs, one after another, each under its own name."""
    for name in names:
        begun = await works.submit(JOBS[name], name)
        await works.run(begun)
        assert (await control.now(works.store, begun)).state == "completed"
        await works.drain()
    return works


def bill(works: Works, name: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(works.output("bill.json", name))
    return told


async def counted(works: Works) -> dict[str, float]:
    """What `knapper usage` says of the tenant, all in all."""
    runs = await Register(works.store).runs(LOCAL_TENANT)
    sampled = [each for _, each in await usage.tokens_sampled(works.store, LOCAL_TENANT, EVER)]
    return {
        "trained": sum((await usage.tokens_trained(works.store, runs, EVER)).values()),
        "train_step": sum((await usage.device_seconds(works.store, runs, EVER)).values()),
        "prompts": sum(each.prompt for each in sampled),
        "sampled": sum(each.sampled for each in sampled),
        "sample": sum(each.device_s for each in sampled),
    }


@pytest.mark.parametrize("slice_s", [30.0, 0.02], ids=["in one slice", "in many slices"])
@pytest.mark.parametrize("malice", [Malice(), Malice(0.2, 5, True, 0.1)], ids=["calm", "wild"])
def test_a_tenants_bills_add_up_to_what_usage_counts(house: House, malice: Malice, slice_s: float) -> None:
    works = run(lambda: done(Works(house, 7, malice, slice_s), *JOBS))
    found = run(lambda: counted(works))
    for part in ("trained", "prompts", "sampled"):
        assert sum(bill(works, name)["tokens"][part] for name in JOBS) == found[part], part
    for part in ("train_step", "sample"):
        seconds = [bill(works, name)["device_seconds"][part] for name in JOBS]
        assert sum(seconds) == pytest.approx(found[part], abs=0.001 * len(JOBS)), part  # each is rounded
    assert found["train_step"] > 0
    assert found["sample"] > 0


@pytest.mark.parametrize("malice", [Malice(), Malice(0.2, 5, True, 0.1)], ids=["calm", "wild"])
def test_what_bills_cost_adds_up_to_what_usage_costs(house: House, malice: Malice) -> None:
    """By the ledger, as `knapper usage` has it: while its journals are there, and when they are accounted for."""
    prices = Prices("EUR", trained=3.5, prefilled=0.5, sampled=11.0, device_second=0.25, stored=0.125)
    works = Works(house, 7, malice, prices=prices)

    async def usage_costs() -> float:
        accounts = Accounts(works.store, works.clock, works.clock, lambda: "x")
        trained = await accounts.used(LOCAL_TENANT, EVER)
        sampled = [each for _, each in await usage.tokens_sampled(works.store, LOCAL_TENANT, EVER)]
        return sum(prices.cost(trained=tokens, device_s=device_s) for tokens, device_s in trained.values()) + sum(
            prices.cost(prefilled=each.prompt, sampled=each.sampled, device_s=each.device_s) for each in sampled
        )

    async def story() -> None:
        await done(works, *JOBS)
        costs = [bill(works, name)["cost"] for name in JOBS]
        assert {cost["currency"] for cost in costs} == {"EUR"}
        total = sum(cost["total"] for cost in costs)
        assert total == pytest.approx(sum(cost["training"] + cost["sampling"] for cost in costs), rel=1e-12)
        assert all(cost["stored_a_month"] > 0 for cost in costs)
        assert await usage_costs() == pytest.approx(total, rel=1e-9)
        works.clock.at += 7200
        await Accounts(works.store, works.clock, works.clock, lambda: "y").update()
        assert await usage_costs() == pytest.approx(total, rel=1e-9)

    run(story)
    assert bill(run(lambda: done(Works(house), "sft")), "sft")["cost"] is None, "without prices"


@pytest.mark.parametrize("name", ["sft", "rl"])
def test_steps_that_took_many_slices_are_told_whole(house: House, name: str) -> None:
    whole = run(lambda: done(Works(house, slice_s=30.0), name))
    cut = run(lambda: done(Works(house, slice_s=0.02), name))
    for works in (whole, cut):
        steps = [json.loads(line) for line in works.output("metrics.jsonl", name).splitlines()]
        told = bill(works, name)
        assert 0 < sum(each["device_seconds"] for each in steps) <= sum(told["device_seconds"].values()) + 0.001
        assert all(each["wall_seconds"] > 0 for each in steps)
        assert [each["at"] for each in steps] == sorted(each["at"] for each in steps)
        wall = told["wall_seconds"]
        assert sum(each["wall_seconds"] for each in steps) <= wall["whole"] + 0.001
        assert wall["busy"] + wall["idle"] == pytest.approx(wall["whole"], abs=0.002)
        assert wall["train_step"] <= wall["busy"] <= wall["whole"]
    assert cut.adapter(name) == whole.adapter(name)
