"""Samples come out the same alone and in a crowd, end where they should, and share the work."""

import asyncio
import itertools
import time
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from knapper import limits
from knapper.engine.executor import Executor
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_grouped import Segments
from knapper.engine.models.decoder import Segment
from knapper.engine.sampling.next_tokens import NonFiniteLogits
from knapper.engine.sampling.sampler import EngineSampler
from knapper.errors import ContextLengthExceeded, NotFound, TooLarge, UserError
from knapper.wire.types import SampledSequence, SampleOutput, SampleRequest, SamplingParams
from tests.engine.models.test_decoder import decoder_of, lora_of
from tests.engine.tiny import context, tiny_model
from tests.engine.training.test_scheduler import held

T = TypeVar("T")


class AdapterDict:
    """Adapters by name, and how often each was loaded."""

    def __init__(self, adapters: dict[str, Lora]) -> None:
        self.adapters = adapters
        self.loads: list[str] = []

    async def load(self, adapter: str) -> Lora:
        self.loads.append(adapter)
        await asyncio.sleep(0)
        if adapter not in self.adapters:
            raise NotFound(f"no adapter {adapter}")
        return self.adapters[adapter]


async def until(reached: Callable[[], bool]) -> None:
    while not reached():  # noqa: ASYNC110  the device's thread sets no event
        await asyncio.sleep(0)


class House:
    """A sampler over a tiny model on a device of its own."""

    def __init__(
        self,
        directory: Path,
        *,
        slots_max: int = 16,
        kv_tokens_max: int = 8192,
        now: Callable[[], float] = time.monotonic,
        make: Callable[[Path], Path] = tiny_model,
        text_tokens_max: int | None = None,
    ) -> None:
        self.decoder = decoder_of(make(directory))
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.adapter_dict = AdapterDict(
            {f"adapter-{seed}": lora_of(self.decoder, seed=seed, rank=3 + seed) for seed in (1, 2, 3)}
        )
        self.device = Executor()
        weakref.finalize(self, self.device.close)
        self.sampler = EngineSampler(
            self.decoder,
            self.device,
            self.adapter_dict,
            self.tokenizer,
            slots_max=slots_max,
            kv_tokens_max=kv_tokens_max,
            now=now,
            text_tokens_max=text_tokens_max,
        )

    def run(self, *requests: SampleRequest) -> list[SampleOutput]:
        async def together() -> list[SampleOutput]:
            return list(await asyncio.gather(*(self.sampler.sample(request) for request in requests)))

        return self.within(together())

    def within(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(asyncio.wait_for(work, 60))

    def logprobs(self, tokens: list[int], lora: Lora | None = None) -> torch.Tensor:
        """(T - 1): of each token after the first, by one pass over the whole sequence."""
        adapt = [Segment(0, len(tokens), lora)]
        with torch.no_grad():
            hidden = self.decoder.hidden(torch.tensor(tokens), [len(tokens)], adapt)
            logits = self.decoder.logits(hidden, Segments(adapt))
        return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def prompt_of(length: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)


def request(**fields: Any) -> SampleRequest:
    """`max_tokens=...` and the like go to the sampling parameters; EOS is ignored unless a test says otherwise."""
    params = {
        name: fields.pop(name)
        for name in list(fields)
        if name in SamplingParams.__dataclass_fields__ and name != "seed"
    }
    params = {"max_tokens": 12, "ignore_eos": True, **params}
    defaults: dict[str, Any] = {"base_model": "tiny", "adapter": "", "prompt": prompt_of(9), "seed": 5}
    return SampleRequest(**{**defaults, **fields}, params=SamplingParams(**params))


def same(first: SampledSequence, second: SampledSequence) -> bool:
    return np.array_equal(first.tokens, second.tokens) and np.array_equal(first.logprobs, second.logprobs)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(house: House) -> None:
    requests = [
        request(
            adapter=["", "adapter-1", "adapter-2", "adapter-3"][index % 4],
            prompt=prompt_of(3 + 17 * (index % 7), seed=index),
            seed=index,
            num_samples=1 + index % 3,
            max_tokens=20 + 10 * (index % 5),
            temperature=[1.0, 0.7, 0.0][index % 3],
            top_p=[1.0, 0.8][index % 2],
        )
        for index in range(12)
    ]
    together = house.run(*requests)
    for sample_request, output in zip(requests, together, strict=True):
        (alone,) = house.run(sample_request)
        assert all(same(a, b) for a, b in zip(alone.sequences, output.sequences, strict=True)), sample_request
    assert house.sampler.active == house.sampler.waiting == 0


def test_samples_of_one_seed_differ_and_each_keeps_its_number(house: House) -> None:
    (three,) = house.run(request(num_samples=3, max_tokens=15))
    sequences = {tuple(sequence.tokens.tolist()) for sequence in three.sequences}
    assert len(sequences) == 3
    (five,) = house.run(request(num_samples=5, max_tokens=15))
    assert all(same(a, b) for a, b in zip(three.sequences, five.sequences, strict=False))
    (other,) = house.run(request(num_samples=3, max_tokens=15, seed=6))
    assert not sequences & {tuple(sequence.tokens.tolist()) for sequence in other.sequences}


def test_decoded_logprobs_equal_those_of_one_pass(house: House) -> None:
    for adapter in ("", "adapter-2"):
        (output,) = house.run(request(adapter=adapter, prompt=prompt_of(30), max_tokens=100, num_samples=2))
        for sequence in output.sequences:
            whole = [*prompt_of(30).tolist(), *sequence.tokens.tolist()]
            expected = house.logprobs(whole, house.adapter_dict.adapters.get(adapter))[29:]
            torch.testing.assert_close(torch.from_numpy(sequence.logprobs), expected, atol=1e-5, rtol=1e-5)


def test_tempered_logprobs_are_those_of_the_tempered_distribution(house: House) -> None:
    (output,) = house.run(request(temperature=0.5, max_tokens=6, topk_sample_logprobs=4))
    (sequence,) = output.sequences
    assert sequence.topk is not None
    whole = [*prompt_of(9).tolist(), *sequence.tokens.tolist()]
    with torch.no_grad():
        hidden = house.decoder.hidden(torch.tensor(whole), [len(whole)], [])
        logits = house.decoder.logits(hidden, Segments([]))[8:-1]
    expected = (logits / 0.5).log_softmax(-1)
    own = expected.gather(1, torch.from_numpy(sequence.tokens).long()[:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(sequence.logprobs), own, atol=2e-5, rtol=1e-5)
    values, tokens = expected.topk(4)
    assert sequence.topk.tokens.tolist() == tokens.tolist()
    torch.testing.assert_close(torch.from_numpy(sequence.topk.logprobs), values, atol=2e-5, rtol=1e-5)


def test_prompt_logprobs_are_untempered_and_start_with_nan(house: House) -> None:
    prompt = prompt_of(150)
    (output,) = house.run(
        request(
            prompt=prompt,
            adapter="adapter-1",
            prompt_logprobs=True,
            topk_prompt_logprobs=3,
            temperature=0.3,
            max_tokens=1,
        )
    )
    assert output.prompt_logprobs is not None
    assert np.isnan(output.prompt_logprobs[0])
    assert output.prompt_logprobs.dtype == np.float32
    expected = house.logprobs(prompt.tolist(), house.adapter_dict.adapters["adapter-1"])
    torch.testing.assert_close(torch.from_numpy(output.prompt_logprobs[1:]), expected, atol=1e-5, rtol=1e-5)
    topk = output.topk_prompt_logprobs
    assert topk is not None
    assert topk.tokens.shape == topk.logprobs.shape == (150, 3)
    assert topk.logprobs[0].tolist() == [-99999.0] * 3
    likeliest = topk.tokens[1:, 0] == prompt[1:]
    assert (np.abs(topk.logprobs[1:, 0] - output.prompt_logprobs[1:])[likeliest] < 1e-6).all()
    assert (topk.logprobs[1:, 0] + 1e-5 >= output.prompt_logprobs[1:]).all()
    (plain,) = house.run(request(prompt=prompt, max_tokens=1))
    assert plain.prompt_logprobs is None
    assert plain.topk_prompt_logprobs is None


def test_no_tokens_only_scores_the_prompt(house: House) -> None:
    (output,) = house.run(request(max_tokens=0, prompt_logprobs=True, num_samples=2, topk_sample_logprobs=2))
    assert [sequence.tokens.size for sequence in output.sequences] == [0, 0]
    assert not output.sequences[0].stopped
    assert output.sequences[0].topk is not None
    assert output.sequences[0].topk.tokens.shape == (0, 2)
    assert output.prompt_logprobs is not None
    assert house.sampler.counters.decoded_tokens == 0


def test_requests_decode_together_and_the_prompt_is_computed_once(house: House) -> None:
    requests = [request(adapter=name, num_samples=4, max_tokens=20) for name in ("", "adapter-1", "adapter-2")]
    house.run(*requests)
    counters = house.sampler.counters
    assert counters.prefilled_tokens == 3 * 9
    assert counters.decoded_tokens == 12 * 20
    assert counters.steps <= 2 * 19  # one request after another would take 3 * 19, one sequence after another 12 * 19
    assert counters.finished == 3


def test_a_late_request_joins_while_another_decodes(house: House) -> None:
    async def story() -> tuple[int, int]:
        long = asyncio.ensure_future(house.sampler.sample(request(max_tokens=400)))
        await until(lambda: house.sampler.counters.steps >= 20)
        await house.sampler.sample(request(max_tokens=10, seed=9))
        at_end_of_short = house.sampler.counters.steps
        await long
        return at_end_of_short, house.sampler.counters.steps

    at_end_of_short, steps = house.within(story())
    assert at_end_of_short < 399
    assert steps == 399  # the short one's nine steps were the long one's too


def test_cancelling_frees_the_slots_at_once(tmp_path: Path) -> None:
    house = House(tmp_path, slots_max=4)

    async def story() -> SampleOutput:
        long = asyncio.ensure_future(house.sampler.sample(request(max_tokens=490, num_samples=8)))
        await until(lambda: house.sampler.active >= 4)
        other = asyncio.ensure_future(house.sampler.sample(request(max_tokens=5)))
        long.cancel()
        output = await other
        with pytest.raises(asyncio.CancelledError):
            await long
        return output

    output = house.within(story())
    counters = house.sampler.counters
    assert output.sequences[0].tokens.size == 5
    assert counters.cancelled == 1
    assert counters.steps < 400
    assert house.sampler.active == house.sampler.waiting == 0
    assert house.sampler._scheduler._cache.tokens == 0


def test_more_samples_than_slots_and_memory_all_come_and_small_requests_go_in_between(tmp_path: Path) -> None:
    house = House(tmp_path, slots_max=4, kv_tokens_max=64 * 3)
    order: list[tuple[str, int]] = []

    async def named(name: str, sample_request: SampleRequest) -> SampleOutput:
        output = await house.sampler.sample(sample_request)
        order.append((name, house.sampler.counters.decoded_tokens))
        return output

    async def story() -> list[SampleOutput]:
        return list(
            await asyncio.gather(
                named("large", request(num_samples=30)), *(named(f"small-{n}", request(seed=n)) for n in range(3))
            )
        )

    large, *_ = house.within(story())
    assert order[-1] == ("large", 33 * 12)
    assert all(tokens < 180 for _, tokens in order[:-1])
    assert house.sampler._scheduler._cache.tokens == 0
    (roomy,) = House(tmp_path / "roomy").run(request(num_samples=30))
    assert all(same(a, b) for a, b in zip(large.sequences, roomy.sequences, strict=True))


def test_a_tenant_with_many_requests_leaves_another_its_half(tmp_path: Path) -> None:
    """Counted in tokens: the modest tenant's are done once the greedy one has had about as many."""
    house = House(tmp_path, slots_max=4)
    done: dict[str, int] = {}

    async def sampled(tenant: str, seed: int) -> None:
        await house.sampler.sample(request(seed=seed, num_samples=4, tenant=tenant))
        done[tenant] = house.sampler.counters.decoded_tokens

    async def story() -> None:
        await asyncio.gather(
            *(sampled("greedy", seed) for seed in range(10)), *(sampled("modest", seed) for seed in range(10, 13))
        )

    house.within(story())
    of_one = 4 * 12
    assert done["greedy"] == 13 * of_one
    assert done["modest"] <= (2 * 3 + 1) * of_one


def test_prompts_wait_in_spare_memory_only_and_are_computed_again_without_it(tmp_path: Path) -> None:
    large = request(prompt=prompt_of(60), num_samples=12, max_tokens=5)  # 64 positions a sequence
    outputs = []
    for kv_tokens_max, prefilled in ((192, 4 * 60), (192 + 60, 60)):
        house = House(tmp_path, slots_max=12, kv_tokens_max=kv_tokens_max)
        outputs += house.run(large)
        assert house.sampler.counters.prefilled_tokens == prefilled
    tight, roomy = outputs
    assert all(same(a, b) for a, b in zip(tight.sequences, roomy.sequences, strict=True))


def test_a_request_that_can_never_fit_is_refused(tmp_path: Path) -> None:
    house = House(tmp_path, kv_tokens_max=128)
    with pytest.raises(TooLarge, match=r"9 tokens with up to 200 sampled ones.*allowed: 128"):
        house.run(request(max_tokens=200))
    assert house.run(request(max_tokens=100))[0].sequences[0].tokens.size == 100


def test_a_context_that_is_no_capacity_can_be_filled(tmp_path: Path) -> None:
    """300 tokens lie between the capacities 256 and 384: what a sequence reserves ends with the context, at 320."""
    house = House(tmp_path, kv_tokens_max=320, make=partial(tiny_model, context=300))
    (output,) = house.run(request(prompt=prompt_of(10), max_tokens=None))
    assert output.sequences[0].tokens.size == 290
    (same_again,) = house.run(request(prompt=prompt_of(10), max_tokens=290))
    assert same(output.sequences[0], same_again.sequences[0])
    roomy = House(tmp_path / "roomy", kv_tokens_max=8192, make=partial(tiny_model, context=300))
    assert same(output.sequences[0], roomy.run(request(prompt=prompt_of(10), max_tokens=291))[0].sequences[0])


def test_where_the_context_does_not_fit_a_text_may_fill_what_there_is(tmp_path: Path) -> None:
    """Of 200 positions 192 are of use; a sequence's last token needs none. One more is refused, with the limit."""
    house = House(tmp_path, kv_tokens_max=200, make=partial(tiny_model, context=300))
    (output,) = house.run(request(prompt=prompt_of(10), max_tokens=None))
    assert output.sequences[0].tokens.size == 183
    assert not output.sequences[0].stopped
    assert same(output.sequences[0], house.run(request(prompt=prompt_of(10), max_tokens=183))[0].sequences[0])
    with pytest.raises(TooLarge, match=r"10 tokens with up to 184 sampled ones needs 256 positions .*allowed: 200"):
        house.run(request(prompt=prompt_of(10), max_tokens=184))
    house.run(request(prompt=prompt_of(192), max_tokens=None))
    with pytest.raises(ContextLengthExceeded, match=r"it has 193; allowed: up to 192, as the server has key/"):
        house.run(request(prompt=prompt_of(193), max_tokens=None))


def test_the_end_token_ends_a_text_and_stays_in_it_unless_it_is_ignored(house: House) -> None:
    (free,) = house.run(request(max_tokens=40))
    end = int(free.sequences[0].tokens[20])
    first = free.sequences[0].tokens.tolist().index(end)
    house.decoder.config = replace(house.decoder.config, eos=(end,))
    (ended, ignored, token) = house.run(
        request(max_tokens=40, ignore_eos=False),
        request(max_tokens=40),
        request(max_tokens=40, stop_tokens=(int(free.sequences[0].tokens[5]),)),
    )
    assert ended.sequences[0].stopped
    assert ended.sequences[0].tokens.tolist() == free.sequences[0].tokens.tolist()[: first + 1]
    assert ended.sequences[0].logprobs.size == first + 1
    assert not ignored.sequences[0].stopped
    assert ignored.sequences[0].tokens.size == 40
    assert token.sequences[0].stopped
    assert token.sequences[0].tokens[-1] == free.sequences[0].tokens[5]


def test_a_stop_string_across_tokens_ends_a_text_and_stays_in_it(house: House) -> None:
    (free,) = house.run(request(max_tokens=60))
    tokens = free.sequences[0].tokens.tolist()
    text = house.tokenizer.decode(tokens, skip_special_tokens=False)
    clean = [at for at in range(10, len(text) - 3) if "\ufffd" not in text[at : at + 3]]
    assert clean, "the random text has no three readable characters in a row: choose another seed"
    stop = text[clean[0] : clean[0] + 3]
    (output,) = house.run(request(max_tokens=60, stop_strings=("never there", stop)))
    ended = output.sequences[0].tokens.tolist()
    assert output.sequences[0].stopped
    assert ended == tokens[: len(ended)]
    assert stop in house.tokenizer.decode(ended, skip_special_tokens=False)
    assert stop not in house.tokenizer.decode(ended[:-1], skip_special_tokens=False)


def test_stop_strings_need_a_tokenizer(house: House) -> None:
    bare = EngineSampler(
        house.decoder, house.device, house.adapter_dict, None, slots_max=4, kv_tokens_max=1024, now=time.monotonic
    )
    with pytest.raises(UserError, match="no tokenizer"):
        house.within(bare.sample(request(stop_strings=("x",))))


def test_max_tokens_none_samples_up_to_the_context(house: House) -> None:
    (output,) = house.run(request(prompt=prompt_of(context - 20), max_tokens=None))
    assert output.sequences[0].tokens.size == 20
    assert not output.sequences[0].stopped
    (output,) = house.run(request(prompt=prompt_of(context - 1), max_tokens=1000))
    assert output.sequences[0].tokens.size == 1


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompt": np.array([], dtype=np.int32)}, "prompt"),
        ({"prompt": np.array([1, 2, 5000], dtype=np.int32)}, r"prompt\[2\] is 5000; allowed: token ids 0 to 267"),
        ({"prompt": np.array([1, -1], dtype=np.int32)}, r"prompt\[1\] is -1"),
        (
            {"prompt": prompt_of(context)},
            f"context length is {context} tokens, .* it has {context}; allowed: up to {context - 1}",
        ),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_samples": limits.num_samples_max + 1}, "num_samples"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.1e6}, "temperature is 1100000.0; allowed: 0 to 1e"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"stop_strings": ("",)}, "stop"),
        ({"stop_tokens": (5000,)}, "stop is 5000"),
        ({"stop_tokens": tuple(range(limits.stop_sequences_max + 1))}, "stop"),
        ({"topk_prompt_logprobs": limits.top_logprobs_max + 1}, "topk_prompt_logprobs"),
        ({"topk_sample_logprobs": -1}, "topk_sample_logprobs"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(house: House, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        house.run(request(**fields))
    assert house.sampler.active == house.sampler.waiting == 0


def test_limits_are_allowed_themselves(house: House) -> None:
    (output,) = house.run(
        request(
            num_samples=limits.num_samples_max,
            max_tokens=1,
            prompt_logprobs=True,
            topk_prompt_logprobs=limits.top_logprobs_max,
            topk_sample_logprobs=limits.top_logprobs_max,
            stop_tokens=tuple(range(limits.stop_sequences_max)),
        )
    )
    assert len(output.sequences) == limits.num_samples_max
    house.run(request(prompt=prompt_of(context), max_tokens=0))


def test_broken_weights_are_an_error_for_their_request_only(house: House) -> None:
    good = house.adapter_dict.adapters["adapter-1"]
    target = "layers.1.down_proj"
    house.adapter_dict.adapters["broken"] = Lora(
        good.a, {**good.b, target: torch.full_like(good.b[target], torch.nan)}, good.scale
    )

    async def story() -> list[SampleOutput | BaseException]:
        return list(
            await asyncio.gather(
                house.sampler.sample(request(adapter="broken", num_samples=3)),
                house.sampler.sample(request(adapter="broken", prompt_logprobs=True)),
                house.sampler.sample(request(adapter="adapter-1")),
                return_exceptions=True,
            )
        )

    first, scored, other = house.within(story())
    for error in (first, scored):
        assert isinstance(error, NonFiniteLogits)
        assert "adapter broken" in str(error)
    assert isinstance(other, SampleOutput)
    assert same(other.sequences[0], house.run(request(adapter="adapter-1"))[0].sequences[0])
    assert house.sampler._scheduler._cache.tokens == 0


def test_an_adapter_is_loaded_once_and_a_failed_load_is_tried_again(house: House) -> None:
    house.run(*[request(adapter="adapter-1", seed=seed) for seed in range(3)])
    house.run(request(adapter="adapter-1"))
    assert house.adapter_dict.loads == ["adapter-1"]
    with pytest.raises(NotFound, match="no adapter late"):
        house.run(request(adapter="late"))
    house.adapter_dict.adapters["late"] = house.adapter_dict.adapters["adapter-2"]
    assert house.run(request(adapter="late"))[0].sequences[0].tokens.size == 12


def test_an_adapter_of_another_model_is_refused(house: House) -> None:
    good = house.adapter_dict.adapters["adapter-1"]
    for target, a, b, complaint in (
        ("layers.9.q_proj", torch.zeros(2, 64), torch.zeros(64, 2), "does not have"),
        ("layers.0.q_proj", torch.zeros(2, 32), torch.zeros(64, 2), "maps 32 to 64; the model's maps 64 to 64"),
    ):
        house.adapter_dict.adapters[target] = Lora({**good.a, target: a}, {**good.b, target: b}, 1.0)
        with pytest.raises(UserError, match=complaint):
            house.run(request(adapter=target))


def test_a_failing_device_is_heard_by_every_caller_and_the_next_request_works(house: House) -> None:
    real = house.decoder.step

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    house.decoder.step = broken  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="out of memory"):
        house.run(request(), request(seed=1))
    house.decoder.step = real  # type: ignore[method-assign]
    assert house.run(request())[0].sequences[0].tokens.size == 12


def test_training_takes_turns_with_decoding(house: House) -> None:
    """Another task of the device has its turns between the sampler's steps: neither waits for the other to finish."""
    seen: list[int] = []

    def training() -> Any:
        for _ in range(20):
            seen.append(house.sampler.counters.steps)
            time.sleep(0.005)  # turns are shared by time, and this one's take longer than a step
            yield

    async def story() -> None:
        long = asyncio.ensure_future(house.sampler.sample(request(max_tokens=200)))
        await until(lambda: house.sampler.counters.steps >= 5)
        await house.device.run(training(), "training")
        await long

    house.within(story())
    assert len(set(seen)) >= 3, "steps between its turns"


def test_bfloat16_samples_are_the_same_alone_and_in_a_crowd(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.decoder = decoder_of(tmp_path, torch.bfloat16)
    house.sampler = EngineSampler(
        house.decoder,
        house.device,
        house.adapter_dict,
        house.tokenizer,
        slots_max=16,
        kv_tokens_max=8192,
        now=time.monotonic,
    )
    requests = [request(adapter=["", "adapter-1"][n % 2], prompt=prompt_of(5 + n, seed=n), seed=n) for n in range(9)]
    for sample_request, output in zip(requests, house.run(*requests), strict=True):
        assert same(house.run(sample_request)[0].sequences[0], output.sequences[0])


def test_the_seconds_of_each_pass_are_divided_over_its_rows(tmp_path: Path) -> None:
    """A clock that counts its calls: every pass takes one second of it."""
    ticks = itertools.count()
    house = House(tmp_path, now=lambda: float(next(ticks)))

    def passes() -> int:
        return house.sampler.counters.prefills + house.sampler.counters.steps

    alone = house.run(request(max_tokens=5, num_samples=2))[0]
    assert alone.device_s == 2 + 4, "the prompt and its first tokens, then four steps"
    short, long = (
        request(prompt=prompt_of(10, seed=1), max_tokens=1),
        request(prompt=prompt_of(30, seed=2), max_tokens=5, num_samples=3),
    )
    before = passes()
    gate = held(house.device)

    async def together() -> list[SampleOutput]:
        tasks = [asyncio.ensure_future(house.sampler.sample(sample_request)) for sample_request in (short, long)]
        await until(lambda: house.sampler.waiting == 2)
        gate.set()
        return list(await asyncio.gather(*tasks))

    outputs = house.within(together())
    assert [output.device_s for output in outputs] == pytest.approx([10 / 40 + 1 / 4, 30 / 40 + 3 / 4 + 4])
    assert passes() - before == 1 + 4
    again = house.run(request(max_tokens=5, num_samples=2))[0]
    assert again.device_s == alone.device_s, "this clock's second for a look at a prompt that is there"
    assert house.sampler.counters.device_s == pytest.approx(sum(each.device_s for each in (alone, *outputs, again)))
