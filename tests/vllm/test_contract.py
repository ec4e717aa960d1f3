"""vLLM keeps the torch sampler's contract; `make test-vllm` runs this, in an environment that has vLLM."""

import asyncio
import os
import signal
from typing import Any

import numpy as np
import pytest
import torch

from knapper.engine import checkpoint_format
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_grouped import Segment, Segments
from knapper.engine.models.decoder import Decoder
from knapper.errors import InvalidField, Unavailable, UserError
from knapper.wire.progress import TokenEvent
from tests.engine.models.test_decoder import decoder_of
from tests.engine.sampling.test_scheduler import prompt_of, request
from tests.vllm.house import House, bundle

pytestmark = pytest.mark.timeout(240)
TOLERANCE = 5e-5  # float32, sampler against trainer; docs/vllm.md has what was measured
SHAPES: dict[str, dict[str, Any]] = {
    "all": {"rank": 4},
    "attention": {"rank": 16, "train_mlp": False, "train_unembed": False},
    "mlp": {"rank": 3, "train_attn": False, "train_unembed": False},
    "unembed": {"rank": 8, "train_attn": False, "train_mlp": False},
}


@pytest.fixture(scope="session")
def trainer(house: House) -> Decoder:
    return decoder_of(house.model)


@pytest.fixture(scope="session")
def adapters(house: House) -> dict[str, Lora]:
    return {name: house.save(name, seed=n, **shape).lora() for n, (name, shape) in enumerate(SHAPES.items(), 1)}


def logits(trainer: Decoder, tokens: list[int], lora: Lora | None) -> torch.Tensor:
    """(T, V): by one pass, as training computes it."""
    adapt = [Segment(0, len(tokens), lora)]
    with torch.no_grad():
        return trainer.logits(trainer.hidden(torch.tensor(tokens), [len(tokens)], adapt), Segments(adapt))


def test_log_probabilities_are_the_trainers_in_one_batch_of_all_shapes(
    house: House, trainer: Decoder, adapters: dict[str, Lora]
) -> None:
    """The base model, two adapters at once and more that wait; tempered, with prompts scored."""
    requests = [
        request(
            adapter=bundle(name) if name else "", prompt=prompt_of(40 + n, seed=n), seed=n, num_samples=2,
            max_tokens=20, temperature=temperature, prompt_logprobs=True, topk_prompt_logprobs=2,
            topk_sample_logprobs=3,
        )
        for n, (name, temperature) in enumerate((name, t) for t in (0.0, 0.6, 1.0, 1.7) for name in ("", *adapters))
    ]  # fmt: skip
    for sample_request, output in zip(requests, house.run(*requests), strict=True):
        lora = adapters.get(sample_request.adapter.split("/")[1]) if sample_request.adapter else None
        for sequence in output.sequences:
            whole = [*sample_request.prompt.tolist(), *sequence.tokens.tolist()]
            logits_TV = logits(trainer, whole, lora)
            plain = logits_TV.log_softmax(-1)
            own = plain[:-1].gather(1, torch.tensor(whole[1:])[:, None])[: sample_request.prompt.size - 1, 0]
            assert output.prompt_logprobs is not None
            np.testing.assert_allclose(output.prompt_logprobs[1:], own.numpy(), atol=TOLERANCE)
            drawn = (logits_TV / (sample_request.params.temperature or 1.0)).log_softmax(-1)[
                sample_request.prompt.size - 1 : -1
            ]
            wanted = drawn.gather(1, torch.from_numpy(sequence.tokens).long()[:, None])[:, 0]
            np.testing.assert_allclose(sequence.logprobs, wanted.numpy(), atol=TOLERANCE)
            assert sequence.topk is not None
            np.testing.assert_allclose(sequence.topk.logprobs, drawn.topk(3).values.numpy(), atol=TOLERANCE)


def test_an_adapter_that_its_process_hands_over_is_sampled_without_its_file_in_the_store(
    house: House, trainer: Decoder
) -> None:
    async def offered() -> None:
        house.sampler.offer(state.spec, checkpoint_format.export(state, with_optimizer=False))
        while house.adapters.offered:  # noqa: ASYNC110  nobody waits for it but this test
            await asyncio.sleep(0.01)

    state = house.save("handed", seed=77)
    asyncio.run(house.store.delete(bundle("handed") + checkpoint_format.ADAPTER))  # as if it were still on its way
    house.within(offered())
    [output] = house.run(request(adapter=bundle("handed"), prompt=prompt_of(20), max_tokens=8, seed=3))
    [sequence] = output.sequences
    whole = [*prompt_of(20).tolist(), *sequence.tokens.tolist()]
    wanted = logits(trainer, whole, state.lora()).log_softmax(-1)[19:-1]
    wanted_T = wanted.gather(1, torch.from_numpy(sequence.tokens).long()[:, None])[:, 0]
    np.testing.assert_allclose(sequence.logprobs, wanted_T.numpy(), atol=TOLERANCE)


def test_cut_distributions_are_renormalised(house: House, trainer: Decoder) -> None:
    [output] = house.run(request(temperature=0.8, top_k=5, top_p=0.9, max_tokens=30, topk_sample_logprobs=6))
    [sequence] = output.sequences
    assert sequence.topk is not None
    chances = np.where(sequence.topk.logprobs > -1000, np.exp(sequence.topk.logprobs), 0)
    np.testing.assert_allclose(chances.sum(-1), 1.0, atol=1e-4)
    assert (sequence.topk.logprobs[:, 5] < -1000).all()


def test_seeds_reproduce_and_samples_differ(house: House) -> None:
    first, again, other = (house.run(request(num_samples=3, max_tokens=15, seed=seed))[0] for seed in (5, 5, 6))
    sampled = [[tuple(each.tokens.tolist()) for each in output.sequences] for output in (first, again, other)]
    assert sampled[0] == sampled[1]
    assert len({*sampled[0], *sampled[2]}) == 6


def test_stops_stay_in_the_output(house: House) -> None:
    [free] = house.run(request(max_tokens=12))
    tokens = free.sequences[0].tokens.tolist()
    first = tokens.index(tokens[6])
    [stopped] = house.run(request(max_tokens=12, stop_tokens=(tokens[6],)))
    assert stopped.sequences[0].tokens.tolist() == tokens[: first + 1]
    assert stopped.sequences[0].stopped
    text = house.tokenizer.decode(tokens[4:6], skip_special_tokens=False)
    [by_text] = house.run(request(max_tokens=12, stop_strings=(text,)))
    end = by_text.sequences[0].tokens.tolist()
    assert end == tokens[: len(end)]
    assert len(end) <= 6
    assert by_text.sequences[0].stopped
    assert text in house.tokenizer.decode(end, skip_special_tokens=False)


def test_tokens_are_heard_as_they_come(house: House) -> None:
    events: list[TokenEvent] = []
    output = house.within(house.sampler.sample(request(num_samples=2, max_tokens=9), events.append))
    for number, sequence in enumerate(output.sequences):
        assert [each.token for each in events if each.sequence == number] == sequence.tokens.tolist()
        assert [each.ending for each in events if each.sequence == number] == [""] * 8 + ["length"]


def test_who_leaves_frees_the_slots(house: House) -> None:
    async def story() -> None:
        started = asyncio.Event()
        long = request(num_samples=40, max_tokens=400)
        task = asyncio.ensure_future(house.sampler.sample(long, lambda _: started.set()))
        await started.wait()
        task.cancel()
        await asyncio.wait([task])
        assert house.sampler.active == 0
        await house.sampler.sample(request(max_tokens=2))

    house.within(story())


def test_a_tiny_temperature_is_greedy(house: House) -> None:
    greedy, *others = house.run(*(request(temperature=t, max_tokens=12) for t in (0.0, 1e-12, 1e-6)))
    for other in others:
        assert other.sequences[0].tokens.tolist() == greedy.sequences[0].tokens.tolist()
        np.testing.assert_allclose(other.sequences[0].logprobs, greedy.sequences[0].logprobs, atol=1e-5)


def test_what_it_cannot_do_is_refused_by_name(house: House) -> None:
    for fields, complaint in (
        ({"temperature": 3.0}, "temperature is 3.0; allowed: 0 to 1e-06 .greedy., or 0.01 to 2"),
        ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k is 2; allowed: 0 with the vLLM sampler"),
        ({"grammar": "{}", "ignore_eos": False}, "grammar is .given.; allowed: none with the vLLM sampler"),
    ):
        with pytest.raises(InvalidField, match=complaint):
            house.run(request(**fields))
    house.save("wide", rank=17)
    with pytest.raises(UserError, match="KNAPPER_SAMPLER=torch"):
        house.run(request(adapter=bundle("wide")))


def test_adapters_beyond_the_shelf_come_back_as_they_were(house: House) -> None:
    names = [f"many-{n}" for n in range(6)]
    for n, name in enumerate(names):
        house.save(name, seed=100 + n)
    requests = [request(adapter=bundle(name), temperature=0.0, max_tokens=6) for name in names]
    before = [output.sequences[0].tokens.tolist() for output in house.run(*requests)]
    assert len({tuple(each) for each in before}) == 6
    assert [house.run(sample_request)[0].sequences[0].tokens.tolist() for sample_request in requests] == before


@pytest.mark.long
def test_a_core_that_dies_is_answered_and_healed(house: House) -> None:
    async def story() -> None:
        started = asyncio.Event()
        long = asyncio.ensure_future(
            house.sampler.sample(request(num_samples=8, max_tokens=450), lambda _: started.set())
        )
        await started.wait()
        before = house.engine.starts
        assert house.engine.core is not None
        os.kill(house.engine.core.pids[0], signal.SIGKILL)
        with pytest.raises(Unavailable, match="the vLLM engine ended"):
            await long
        output = await house.sampler.sample(request(max_tokens=3))
        assert output.sequences[0].tokens.size == 3
        assert house.engine.starts == before + 1

    house.within(story())


def test_the_seconds_of_samples_add_up_to_the_time_in_which_there_was_any(house: House) -> None:
    before = house.device_time.device_s
    outputs = house.run(request(seed=1, num_samples=3), request(seed=2, max_tokens=3))
    assert all(output.device_s > 0 for output in outputs)
    assert sum(output.device_s for output in outputs) == pytest.approx(house.device_time.device_s - before)
