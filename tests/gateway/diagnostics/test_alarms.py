"""Faults that are planted in loops as tinker-cookbook has them are named within a step; clean loops raise no alarm."""

import asyncio
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

from gateway.diagnostics.monitor import Accepted, declared_staleness
from gateway.diagnostics.sample_index import SampleIndex, SampleSource
from knapper.diagnostics import rules
from knapper.diagnostics.weights import SavedWeights
from knapper.engine.training.losses import LOSSES
from knapper.ids import Tenant
from knapper.state.drawn_samples import OBJECTS_MAX, DrawnSamplesLog, DrawnTogether
from knapper.state.journal.records import Alarm, Drawn
from tests.gateway.diagnostics.loops import TENANT, Bench, Loop, Sampler, told

SAMPLED = [name for name, loss in LOSSES.items() if "logprobs" in loss.required]
STEPS = [pytest.param(24), pytest.param(1000, marks=pytest.mark.long)]


async def _iteration(bench: Bench, loop: Loop, sampler: Sampler, substeps: int = 1) -> list[Alarm]:
    """Samples two groups, and trains on them in so many substeps, as the synchronous loop does."""
    data = [*await bench.draw(sampler, 4), *await bench.draw(sampler, 4)]
    raised = []
    for part in np.array_split(np.arange(len(data)), substeps):
        raised += await loop.step([data[index] for index in part])
    return raised


async def _warm(bench: Bench, loop: Loop, iterations: int = 3) -> Sampler:
    """Clean iterations; the sampler after them."""
    sampler = await loop.save()
    for _ in range(iterations):
        assert await _iteration(bench, loop, sampler) == []
        sampler = await loop.save()
    return sampler


# ---- clean


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("loss", SAMPLED)
@pytest.mark.parametrize("substeps", [1, 4])
def test_synchronous_loops_raise_none(loss: str, substeps: int, steps: int) -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        loop.loss, sampler = loss, loop.base()  # a new adapter changes nothing: its first samples are the base's
        while loop.steps < steps:
            assert await _iteration(bench, loop, sampler, substeps) == []
            sampler = await loop.save()
        assert set(loop.known) == {1.0}, "every rollout's sampler was known"

    told(story)


@pytest.mark.parametrize("steps", STEPS)
def test_supervised_epochs_raise_none(steps: int) -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        loop.loss = "cross_entropy"
        batches = [await bench.draw(loop.base(), 2) for _ in range(4)]
        while loop.steps < steps:
            for index in bench.random.permutation(len(batches)):
                assert await loop.step(batches[index]) == []

    told(story)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("loss", ["ppo", "cispo"])
def test_epochs_of_minibatches_over_one_batch_raise_none(loss: str, steps: int) -> None:
    """Shuffled anew, so that one epoch may begin with the minibatch with which the last ended."""

    async def story(bench: Bench) -> None:
        loop = await bench.run()
        loop.loss = loss
        while loop.steps < steps:
            sampler = await loop.save()
            minibatches = [await bench.draw(sampler, 4) for _ in range(2)]
            for _ in range(3):
                for index in bench.random.permutation(2):
                    assert await loop.step(minibatches[index]) == []
        assert set(loop.known) == {1.0}

    told(story)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("behind", [1, 3])
def test_asynchronous_loops_raise_none(behind: int, steps: int) -> None:
    """Rollouts begin with the weights that are the newest then, while the trainer works, and are trained on later."""

    async def story(bench: Bench) -> None:
        loop = await bench.run()
        sampler = await loop.save()
        waiting = [await bench.draw(sampler, 4, at=bench.now) for _ in range(behind)]
        while loop.steps < steps:
            began = bench.now
            assert await loop.step(waiting.pop(0)) == []
            waiting.append(await bench.draw(sampler, 4, at=began + 0.1, took_s=1.5))  # beside the step
            sampler = await loop.save()
        assert set(loop.known) == {1.0}

    told(story)


def test_rollouts_that_begin_between_a_step_and_the_save_after_it_raise_none() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        sampler = await loop.save()
        waiting = [await bench.draw(sampler, 4)]
        for _ in range(12):
            assert await loop.step(waiting.pop(0)) == []
            began, old = bench.now + 0.05, sampler
            bench.now += 0.1  # its client hears of the step
            sampler = await loop.save()
            waiting.append(await bench.draw(old, 4, at=began, took_s=2.0))

    told(story)


def test_staleness_that_is_declared_raises_none() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run(metadata='{"staleness": "2"}')
        for _ in range(4):
            sampler = await loop.save()
            for _ in range(3):
                assert await _iteration(bench, loop, sampler) == []

    told(story)
    assert [declared_staleness(text) for text in ('{"staleness": "3"}', "{}", '{"staleness": "x"}', "[]")] == [
        3,
        0,
        0,
        0,
    ]


def test_a_pass_that_fails_is_no_doubled_step() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        sampler = await _warm(bench, loop)
        await loop.forward_backward(await bench.draw(sampler, 4), fails=True)
        assert await loop.optim_step() == []

    told(story)


def test_a_new_stage_from_a_checkpoint_raises_none() -> None:
    async def story(bench: Bench) -> None:
        first = await bench.run()
        first.loss = "cross_entropy"
        for _ in range(3):
            assert await first.step(await bench.draw(first.base(), 4)) == []
        state = await first.save_state()
        second = await bench.run(source=state.bundle)
        second.logits = state.logits.copy()
        sampler = Sampler(state.logits, state.bundle)  # the same weights, by the other run's name
        assert await _iteration(bench, second, sampler) == []
        assert await _iteration(bench, second, await second.save()) == []

    told(story)


def test_a_run_that_resumes_with_its_optimizer_raises_none() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        await _warm(bench, loop)
        state, step = await loop.save_state(), loop.steps
        batch = await bench.draw(await loop.save(), 4)
        assert await loop.step(batch) == []
        await loop.load(state, step, optimizer=True)
        assert await loop.step(batch) == [], "the checkpoint is from before this batch"

    told(story)


def test_samples_that_nobody_knows_raise_none() -> None:
    """As after a restart of the gateway, or of a client that makes its own."""

    async def story(bench: Bench) -> None:
        loop = await bench.run()
        sampler = await _warm(bench, loop)
        data = await bench.draw(Sampler(sampler.logits + bench.random.normal(size=32), sampler.bundle), 4)
        bench.monitor.samples._sources.clear()
        assert await loop.step(data) == []

    told(story)


# ---- planted


def test_a_stale_sampler_is_named_at_the_first_step_that_it_draws_for() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        sampler = await _warm(bench, loop)
        assert await _iteration(bench, loop, sampler) == []
        (alarm,) = await _iteration(bench, loop, sampler)
        assert alarm.name == "stale_sampler"
        assert alarm.message == (
            "all 8 rollouts of step 5 were drawn by weights that are 1 updates old while newer ones were there and "
            "nothing was being trained: the sampler is stale. Make a new sampling client after each optim_step "
            "(save_weights_and_get_sampling_client). If this is meant, say so when you create the run: "
            "user_metadata={'staleness': '1'}"
        )
        assert bench.monitor.take_notice(loop.run) == f"{loop.run}: {alarm.message}"
        assert bench.monitor.take_notice(loop.run) == ""
        assert await _iteration(bench, loop, sampler) == [], "it has been said"
        assert await _iteration(bench, loop, await loop.save()) == []
        assert [alarm.name for alarm in await _iteration(bench, loop, sampler)] == ["stale_sampler"], "again"

    told(story)


def test_an_adapter_that_never_reached_the_sampler_is_named() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        assert await _iteration(bench, loop, loop.base()) == []
        (alarm,) = await _iteration(bench, loop, loop.base())
        assert alarm.name == "stale_sampler"
        assert "the base model, without this run's adapter," in alarm.message

    told(story)


def test_another_run_s_adapter_is_named() -> None:
    async def story(bench: Bench) -> None:
        loop, other = await bench.run(), await bench.run()
        await _warm(bench, loop)
        wrong = await _warm(bench, other, 1)
        (alarm,) = await _iteration(bench, loop, wrong)
        assert alarm.name == "other_adapter"
        assert f"all 8 rollouts of step 4 were drawn by another adapter: that of {other.run}, step 1." in alarm.message
        assert f"save_weights_and_get_sampling_client of the training client of {loop.run}" in alarm.message

    told(story)


def test_a_wrong_temperature_is_named() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        sampler = await _warm(bench, loop)
        (alarm,) = await loop.step(await bench.draw(sampler, 8, temperature=0.7))
        assert alarm.name == "wrong_temperature"
        assert "all 8 rollouts of step 4 were drawn with temperature 0.7" in alarm.message
        assert "Sample with temperature=1.0" in alarm.message

    told(story)


def test_a_sampler_that_computes_otherwise_is_named() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        sampler = await _warm(bench, loop)
        other = Sampler(sampler.logits + 0.5 * bench.random.normal(size=32), sampler.bundle)
        (alarm,) = await loop.step(await bench.draw(other, 8))
        assert alarm.name == "sampler_trainer_mismatch"
        assert "engine float32 computes otherwise than the trainer" in alarm.message

    told(story)


def test_a_doubled_step_is_named() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        sampler = await _warm(bench, loop)
        data = await bench.draw(sampler, 8)
        assert await loop.step(data) == []
        (alarm,) = await loop.step(data)
        assert alarm.name == "doubled_step"
        assert "step 5 trained on exactly the data of step 4" in alarm.message

    told(story)


def test_a_doubled_optim_step_is_named() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        await _warm(bench, loop)
        (alarm,) = await loop.optim_step()
        assert alarm.name == "doubled_step"
        assert "step 4 has no forward_backward since the step before" in alarm.message

    told(story)


def test_a_doubled_pass_is_named() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        data = await bench.draw(await _warm(bench, loop), 8)
        await loop.forward_backward(data)
        (alarm,) = await loop.step(data)
        assert alarm.name == "doubled_step"
        assert "the same data twice before one optim_step" in alarm.message

    told(story)


@pytest.mark.parametrize("loss", ["importance_sampling", "cross_entropy"])
@pytest.mark.parametrize("new_run", [False, True])
def test_a_fresh_optimizer_after_a_resume_is_named(loss: str, *, new_run: bool) -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        loop.loss = loss
        await _warm(bench, loop)
        state, step = await loop.save_state(), loop.steps
        if new_run:
            loop, logits = await bench.run(source=state.bundle), state.logits.copy()
            loop.logits, loop.loss = logits, loss
        else:
            await loop.load(state, step, optimizer=False)
        (alarm,) = await _iteration(bench, loop, await loop.save())
        assert alarm.name == "fresh_optimizer"
        assert f"goes on from a checkpoint of step {step} with a fresh optimizer" in alarm.message
        assert "create_training_client_from_state_with_optimizer" in alarm.message

    told(story)


def test_the_batch_that_a_checkpoint_contains_is_named_when_it_is_trained_on_again() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        sampler = await _warm(bench, loop)
        data = await bench.draw(sampler, 8)
        assert await loop.step(data) == []
        state, step = await loop.save_state(), loop.steps
        await loop.load(state, step, optimizer=True)
        (alarm,) = await loop.step(data)
        assert alarm.name == "repeated_data"
        assert (
            "step 5 trained on exactly the data of step 4, which the checkpoint that was loaded contains"
            in alarm.message
        )

    told(story)


def test_rewards_that_teach_nothing_are_named_after_sixteen_groups_and_chance_is_not() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        sampler = await _warm(bench, loop)
        silent = [await bench.draw(sampler, 2) for _ in range(rules.SILENT_GROUPS)]
        for group in silent:
            for datum in group:
                datum.inputs["advantages"][:] = 0.0
        assert await loop.step([datum for group in silent[:-1] for datum in group]) == [], "one group less"
        assert await loop.step(await bench.draw(await loop.save(), 4)) == [], "and these teach"
        whole = [await bench.draw(await loop.save(), 2) for _ in silent]
        for group in whole:
            for datum in group:
                datum.inputs["advantages"][:] = 0.0
        (alarm,) = await loop.step([datum for group in whole for datum in group])
        assert alarm.name == "degenerate_groups"
        assert "step 6 learned nothing: in the last 16 groups all completions of a prompt have" in alarm.message

    told(story)


# ---- whose samples, and how many


def test_another_tenant_s_samples_are_never_matched() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        sampler = await _warm(bench, loop)
        data = await bench.draw(sampler, 4, temperature=0.5)
        sources = bench.monitor.samples._sources
        sources[Tenant("stranger")] = sources.pop(TENANT)
        assert await loop.step(data) == []

    told(story)


def test_samples_are_known_to_the_gateway_that_comes_after_and_to_the_one_beside() -> None:
    async def story(bench: Bench) -> None:
        loop = await bench.run()
        sampler = await _warm(bench, loop)
        data = await bench.draw(sampler, 4, temperature=0.5)
        await bench.monitor.drawn.flush()
        bench.restart()
        working = asyncio.create_task(bench.monitor.work())
        await bench.monitor.note_accepted(loop.run, loop.seq, Accepted("optim_step"))
        (alarm,) = await loop.step(data)
        assert alarm.name == "wrong_temperature"
        assert loop.known[-1] == 1.0
        bench.now += 60.0
        assert await loop.step(await bench.draw(sampler, 4)) == [], "how old they are is not known there"
        working.cancel()

    told(story)


def test_what_is_stored_of_samples_is_bounded_and_read_once() -> None:
    async def story(bench: Bench) -> None:
        log, drawn = DrawnSamplesLog(bench.store), Drawn(run="", seq=0, step=0, digest="", datums=0)
        for n in range(OBJECTS_MAX + 5):
            group = DrawnTogether(drawn=drawn, fingerprints=[n.to_bytes(8, "big")])
            await log.append(TENANT, float(n), f"{n:032x}", [group])
        groups, newest = await log.after(TENANT, "")
        assert [group.fingerprints[0][-1] for group in groups] == list(range(5, OBJECTS_MAX + 5))
        assert await log.after(TENANT, newest) == ([], newest)
        assert await log.after(Tenant("stranger"), "") == ([], "")

    told(story)


def test_what_is_remembered_of_samples_is_bounded_and_the_largest_tenant_gives_way() -> None:
    index, source = SampleIndex(4), SampleSource(SavedWeights(), "engine float32", 1.0, False, 0.0, 1.0)
    small, large = Tenant("small"), Tenant("large")
    index.add(small, [b"s"], source)
    index.add(large, [bytes([n]) for n in range(9)], source)
    assert len(index) == 4
    assert index.find(small, (b"s",)) == [source]
    assert index.find(large, (bytes([8]),)) == [source]
    assert index.find(large, (bytes([0]),)) == index.find(large, (b"s",)) == []


def test_the_limit_is_far_above_what_rounding_makes() -> None:
    """bfloat16 keeps eight bits: a log-probability of -4 is off by up to 2^-7 then."""
    assert 0.5 * (2.0**-7) ** 2 < rules.KL_EXACT < rules.KL_LIMIT / 10


def test_the_page_has_every_alarm() -> None:
    page = Path("docs/alarms.md").read_text()
    told = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert told == set(re.findall(r"\"(\w+)\"\]? ?[:=] ", inspect.getsource(rules.alarms)))
