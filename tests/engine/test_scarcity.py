"""Sampling when memory is scarce: a request that does not fit alone fails; all others have the same bits, later."""

import asyncio
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers.lora import Lora
from knapper.engine.sampling.sampler import EngineSampler
from knapper.errors import OutOfMemory
from knapper.wire.progress import TokenEvent
from knapper.wire.types import SampleOutput, SampleRequest
from tests.engine.faults import Operators, cpu_error, gpu_error, on
from tests.engine.runs import tiny_trainer
from tests.engine.sampling.test_scheduler import AdapterDict, House, prompt_of, request, same, until

POISON = 260  # a token; three of them in a row are what some test's pass cannot compute
Embedding = Callable[[Callable[[Tensor], None]], None]
Answers = list[SampleOutput | BaseException]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture
def embedding(monkeypatch: pytest.MonkeyPatch) -> Embedding:
    """Every pass begins by embedding its tokens: what is set here sees them before, and raises as an allocator does."""
    real = F.embedding

    def set_before(before: Callable[[Tensor], None]) -> None:
        def embed(tokens_N: Tensor, weight: Tensor, *rest: Any) -> Tensor:
            before(tokens_N)
            return real(tokens_N, weight, *rest)

        monkeypatch.setattr(F, "embedding", embed)

    return set_before


def poisonous(tokens_N: Tensor) -> bool:
    return bool((tokens_N.unfold(0, 3, 1) == POISON).all(-1).any()) if len(tokens_N) >= 3 else False


def requests_of(count: int, max_tokens: int = 40) -> list[SampleRequest]:
    return [
        request(
            adapter=["", "adapter-1", "adapter-2"][index % 3],
            prompt=prompt_of(4 + 7 * index, seed=index),
            seed=index,
            max_tokens=max_tokens + index,
            num_samples=1 + index % 2,
            temperature=[1.0, 0.0, 0.7][index % 3],
            tenant=f"tenant-{index % 4}",
        )
        for index in range(count)
    ]


def bad(length: int = 30, **fields: object) -> SampleRequest:
    return request(prompt=np.full(length, POISON, dtype=np.int32), **{"max_tokens": 5, **fields})


def same_scores(one: SampleOutput, other: SampleOutput) -> bool:
    if one.prompt_logprobs is None or other.prompt_logprobs is None:
        return one.prompt_logprobs is other.prompt_logprobs
    return np.array_equal(one.prompt_logprobs, other.prompt_logprobs, equal_nan=True)


def alike(answers_given: Answers, wanted: list[SampleOutput]) -> bool:
    return len(answers_given) == len(wanted) and all(
        isinstance(one, SampleOutput)
        and all(same(a, b) for a, b in zip(one.sequences, other.sequences, strict=True))
        and same_scores(one, other)
        for one, other in zip(answers_given, wanted, strict=True)
    )


async def answers(house: House, requests: list[SampleRequest]) -> Answers:
    return list(await asyncio.gather(*map(house.sampler.sample, requests), return_exceptions=True))


def nothing_left(house: House) -> bool:
    return house.sampler.active == house.sampler.waiting == house.sampler._scheduler._cache.tokens == 0


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "needs"),
    [
        (gpu_error, "it needs 1024 GiB at once; "),
        (cpu_error, "it needs 400 MiB at once; "),
        (MemoryError, "it needs more than the "),
    ],
)
def test_a_prompt_that_does_not_fit_fails_alone(
    house: House, embedding: Embedding, error: Callable[[], Exception], needs: str
) -> None:
    """It arrives while sequences of other tenants decode; later requests are served too."""
    small = requests_of(12)
    undisturbed = house.run(*small)

    def before(tokens_N: Tensor) -> None:
        if poisonous(tokens_N):
            raise error()

    async def story() -> Answers:
        early = asyncio.ensure_future(answers(house, small[:9]))
        await until(lambda: house.sampler.active >= 9)
        large = asyncio.ensure_future(answers(house, [bad(400)]))
        await asyncio.sleep(0)
        late = await answers(house, small[9:])
        return [*await early, *late, *await large]

    embedding(before)
    *others, failed = house.within(story())
    assert alike(others, undisturbed)
    assert isinstance(failed, OutOfMemory)
    assert failed.status < 500, "a gateway asks again for what is 500 or more"
    assert "a prompt of 400 tokens with up to 5 sampled ones does not fit into the server's memory" in str(failed)
    assert needs in str(failed)
    assert "Send a shorter prompt, or lower sampling_params.max_tokens" in str(failed)
    assert nothing_left(house)
    assert house.sampler.counters.failed == 1
    assert house.sampler.counters.parked == 0


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("error", [gpu_error, lambda: ValueError("a defect")], ids=["memory", "defect"])
def test_prompts_of_one_pass_are_computed_apart_when_it_breaks(
    house: House, embedding: Embedding, error: Callable[[], Exception], scored: bool
) -> None:
    small = [request(prompt=one.prompt, seed=one.seed, prompt_logprobs=scored, num_samples=2) for one in requests_of(5)]
    undisturbed = house.run(*small)
    house.sampler._scheduler._prefiller.trim(0)
    passes: list[int] = []

    def before(tokens_N: Tensor) -> None:
        if poisonous(tokens_N):
            passes.append(len(tokens_N))
            raise error()

    embedding(before)
    *others, failed = house.within(answers(house, [*small, bad(prompt_logprobs=scored)]))
    assert max(passes) > 30, "they shared a pass at first"
    assert alike(others, undisturbed)
    assert isinstance(failed, OutOfMemory if error is gpu_error else ValueError)
    assert nothing_left(house)


def test_a_prompt_that_fits_alone_waits_until_nobody_decodes(house: House, embedding: Embedding) -> None:
    """Others go past it meanwhile, but not for ever: as many sequences as there are slots."""
    large, long = bad(200, max_tokens=20), request(max_tokens=300, prompt=prompt_of(5, seed=1))
    passing = [request(seed=seed, max_tokens=6) for seed in range(40)]
    undisturbed = house.run(large, long, *passing)
    house.sampler._scheduler._prefiller.trim(0)
    at_first = house.sampler.counters.finished
    order: list[str] = []
    before_it: list[int] = []

    def before(tokens_N: Tensor) -> None:
        if poisonous(tokens_N):
            if house.sampler.active:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB.")
            before_it.append(house.sampler.counters.finished - at_first)

    async def named(name: str, one: SampleRequest) -> SampleOutput:
        output = await house.sampler.sample(one)
        order.append(name)
        return output

    async def story() -> Answers:
        first = asyncio.ensure_future(named("long", long))
        await until(lambda: house.sampler.active == 1)
        held = asyncio.ensure_future(named("large", large))
        await until(lambda: house.sampler.waiting == 1)
        rest = await asyncio.gather(*(named(f"passing-{one.seed}", one) for one in passing))
        return [await held, await first, *rest]

    embedding(before)
    assert alike(house.within(story()), undisturbed)
    assert order[0].startswith("passing"), "they need not wait for it"
    assert before_it == [16 + 1], "there are 16 slots: so many texts may pass it; and the long one was there before"


# -- steps -------------------------------------------------------------------------------------------------------------


def test_when_a_step_lacks_memory_the_youngest_wait_and_all_come_out_the_same(
    house: House, embedding: Embedding
) -> None:
    requests = requests_of(10)
    undisturbed = house.run(*requests)
    steps: list[int] = []

    def before(tokens_N: Tensor) -> None:
        decoding = house.sampler.active == len(tokens_N)
        if decoding and len(tokens_N) > 4:
            raise gpu_error()
        if decoding:
            steps.append(len(tokens_N))

    async def story() -> Answers:
        ended: list[int] = []

        async def one(number: int) -> SampleOutput:
            output = await house.sampler.sample(requests[number])
            ended.append(number)
            return output

        outputs: Answers = list(await asyncio.gather(*map(one, range(10)), return_exceptions=True))
        assert ended[0] in (0, 1, 2), "the oldest went on"
        return outputs

    embedding(before)
    assert alike(house.within(story()), undisturbed)
    assert house.sampler.counters.parked > 0
    assert max(steps) > 1, "those that fit decode together"
    assert nothing_left(house)


def test_a_text_whose_step_does_not_fit_alone_fails_alone(house: House, embedding: Embedding) -> None:
    """Its 60th token never fits, even alone; all other requests have their usual outputs."""
    requests = requests_of(6, max_tokens=30)
    large = request(prompt=prompt_of(50, seed=50), max_tokens=200, seed=50)
    undisturbed = house.run(*requests)

    def before(tokens_N: Tensor) -> None:
        sequences = house.sampler._scheduler._batch.sequences.values()
        if len(tokens_N) == len(sequences) and any(len(text.tokens) >= 60 for text in sequences):
            raise cpu_error()

    embedding(before)
    *others, failed = house.within(answers(house, [*requests, large]))
    assert alike(others, undisturbed)
    assert isinstance(failed, OutOfMemory)
    assert "a prompt of 50 tokens with up to 200 sampled ones does not fit" in str(failed)
    assert nothing_left(house)
    assert alike(house.run(*requests), undisturbed), "what comes later is served"  # type: ignore[arg-type]


def test_a_defect_in_a_step_fails_nobody_but_whose_it_is(house: House, embedding: Embedding) -> None:
    requests = requests_of(6, max_tokens=30)
    undisturbed = house.run(*requests)
    large = request(prompt=prompt_of(50, seed=50), max_tokens=200, seed=50)

    def before(tokens_N: Tensor) -> None:
        sequences = house.sampler._scheduler._batch.sequences.values()
        if len(tokens_N) == len(sequences) and any(
            text.group.request is large and len(text.tokens) > 9 for text in sequences
        ):
            raise ValueError("of one text")

    embedding(before)
    *others, failed = house.within(answers(house, [*requests, large]))
    assert alike(others, undisturbed)
    assert isinstance(failed, ValueError)
    assert nothing_left(house)


def test_who_listens_badly_fails_alone(house: House) -> None:
    requests = requests_of(4)
    undisturbed = house.run(*requests)

    def deaf(drawn: TokenEvent) -> None:
        if drawn.position == 7:
            raise RuntimeError("Event loop is closed")

    async def story() -> Answers:
        bad = house.sampler.sample(request(seed=77, max_tokens=30), deaf)
        return list(await asyncio.gather(*map(house.sampler.sample, requests), bad, return_exceptions=True))

    *others, failed = house.within(story())
    assert alike(others, undisturbed)
    assert isinstance(failed, RuntimeError)
    assert nothing_left(house)


def test_a_listener_hears_each_token_once_though_its_text_was_parked(house: House, embedding: Embedding) -> None:
    events: list[TokenEvent] = []
    requests = requests_of(5)

    def before(tokens_N: Tensor) -> None:
        if house.sampler.active == len(tokens_N) > 2 and house.sampler.counters.steps > 5:
            raise gpu_error()

    async def story() -> SampleOutput:
        others = asyncio.ensure_future(answers(house, requests))
        await until(lambda: house.sampler.waiting + house.sampler.active >= 5)
        output = await house.sampler.sample(request(seed=9, max_tokens=30), events.append)
        await others
        return output

    embedding(before)
    output = house.within(story())
    assert house.sampler.counters.parked > 0
    assert [drawn.token for drawn in events] == output.sequences[0].tokens.tolist()
    assert [drawn.position for drawn in events] == list(range(30))


def test_a_parked_text_can_be_cancelled(house: House, embedding: Embedding) -> None:
    def before(tokens_N: Tensor) -> None:
        if house.sampler.active == len(tokens_N) > 1:
            raise gpu_error()

    async def story() -> SampleOutput:
        first = asyncio.ensure_future(house.sampler.sample(request(max_tokens=300)))
        second = asyncio.ensure_future(house.sampler.sample(request(max_tokens=300, seed=8)))
        await until(lambda: house.sampler.counters.parked > 0)
        second.cancel()
        output = await first
        with pytest.raises(asyncio.CancelledError):
            await second
        return output

    embedding(before)
    assert house.within(story()).sequences[0].tokens.size == 300
    assert nothing_left(house)
    assert house.sampler.counters.cancelled == 1


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:Could not find a config file")
@pytest.mark.parametrize("kind", ["gpt_neox", "cohere2", "vaultgemma"])
def test_texts_of_a_model_of_transformers_come_out_the_same_too(
    tmp_path: Path, embedding: Embedding, kind: str
) -> None:
    """Some of its caches slide, and all are left half grown by a step that breaks: such sequences begin again."""
    house = House(tmp_path / "native")
    house.decoder = tiny_trainer(tmp_path / "model", kind).decoder  # type: ignore[assignment]
    lora_targets = house.decoder.config.lora_targets
    draw = torch.Generator().manual_seed(1)
    a = {target.name: torch.randn(4, target.inputs, generator=draw) * 0.1 for target in lora_targets}
    b = {target.name: torch.randn(target.outputs, 4, generator=draw) * 0.1 for target in lora_targets}
    adapter_dict = AdapterDict({"adapter": Lora(a, b, 1.0)})
    house.sampler = EngineSampler(
        house.decoder, house.device, adapter_dict, None, slots_max=16, kv_tokens_max=4096, now=time.monotonic
    )
    requests = [
        request(adapter=["", "adapter"][n % 2], prompt=prompt_of(4 + 5 * n, seed=n) % 60, seed=n, max_tokens=20 + n)
        for n in range(6)
    ]
    undisturbed = house.run(*requests)
    calls, steps = itertools.count(), house.sampler.counters.steps

    def before(tokens_N: Tensor) -> None:
        late = house.sampler.counters.steps > steps + 8
        if tokens_N.numel() == 1 and late and house.sampler.active > 2 and next(calls) % 7 > 4:
            raise gpu_error()

    embedding(before)
    assert alike(house.within(answers(house, requests)), undisturbed)
    assert house.sampler.counters.parked > 3
    assert nothing_left(house)


# -- anywhere ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [gpu_error, cpu_error])
def test_wherever_memory_is_lacking_for_a_moment_nothing_changes(house: House, error: Callable[[], Exception]) -> None:
    """One operator after another fails once, or some in a row: in passes, scores, draws, or while pools grow."""
    scored = request(prompt=prompt_of(60, seed=8), prompt_logprobs=True, num_samples=2, max_tokens=8)
    requests = [*requests_of(2, max_tokens=10), scored]
    undisturbed = house.run(*requests)
    house.sampler._scheduler._prefiller.trim(0)
    counted = Operators(lambda _number, _name: False, error)
    with on(house.device, counted):
        assert alike(house.run(*requests), undisturbed)  # type: ignore[arg-type]
    rng = np.random.default_rng(5)
    for at in sorted(rng.integers(1, counted.count, 12).tolist()):
        house.sampler._scheduler._prefiller.trim(0)
        broken = Operators(lambda number, _name, at=at: number == at, error)  # type: ignore[misc]  # a default binds it
        with on(house.device, broken):
            outputs = house.within(answers(house, requests))
        assert broken.broken == 1
        assert alike(outputs, undisturbed), f"operator {at} of {counted.count}"
        assert nothing_left(house)


def test_while_memory_is_lacking_nobody_gets_other_bits(house: House) -> None:
    """Each operator may fail: a served request has its undisturbed output, and only memory errors occur."""
    requests = requests_of(5, max_tokens=10)
    undisturbed = house.run(*requests)
    house.sampler._scheduler._prefiller.trim(0)
    counted = Operators(lambda _number, _name: False, gpu_error)
    with on(house.device, counted):
        house.run(*requests)
    rate = 5 / counted.count  # of an operator's failing: some five in each history, however many operators there are
    served = failed = 0
    for seed in range(8):
        house.sampler._scheduler._prefiller.trim(0)
        rng = np.random.default_rng(seed)
        broken = Operators(lambda _number, _name, rng=rng: bool(rng.random() < rate), gpu_error)  # type: ignore[misc]  # a default binds it
        with on(house.device, broken):
            outputs = house.within(answers(house, requests))
        failed += broken.broken
        for one, wanted in zip(outputs, undisturbed, strict=True):
            assert isinstance(one, OutOfMemory) or alike([one], [wanted]), f"seed {seed}"
        served += sum(isinstance(one, SampleOutput) for one in outputs)
        assert nothing_left(house)
    assert served > 20, "of 40: most are"
    assert failed > 8, "one history in a hundred and fifty has none"


# -- real --------------------------------------------------------------------------------------------------------------

_CHILD = """
import json, resource, sys
from pathlib import Path
import torch
from tests.engine.sampling.test_scheduler import House, prompt_of, request
from tests.engine.test_scarcity import alike, answers
from tests.engine.wide_keys import wide_model

torch.set_num_threads(1)
house = House(Path(sys.argv[1]), kv_tokens_max=1 << 20, make=lambda at: wide_model(at, layers=4))
small = [request(seed=seed, prompt=prompt_of(3 + seed, seed=seed), max_tokens=30) for seed in range(12)]
undisturbed = house.run(*small)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (300 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
*others, failed = house.within(answers(house, [*small, request(prompt=prompt_of(30_000), max_tokens=5)]))
print(json.dumps([alike(others, undisturbed), f"{type(failed).__name__}: {failed}"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_a_prompt_that_the_allocator_has_no_memory_for_fails_alone(tmp_path: Path) -> None:
    """In a process of its own, whose address space ends 300 MiB above what it has; the prompt's keys take 1 GB."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=100, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    others_alike, failed = json.loads(done.stdout.splitlines()[-1])
    assert others_alike
    assert failed.startswith("OutOfMemory: a prompt of 30000 tokens with up to 5 sampled ones does not fit into the")
    assert re.search(r"it needs 9\d\d MiB at once; \d+ MiB are free\. Send a shorter prompt", failed), failed
