"""Who listens to a sample hears each token once, in order, as the answer has it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from knapper.errors import UserError
from knapper.serving import progress as serving
from knapper.wire import progress, proto
from knapper.wire.progress import FailedEvent, FinishedEvent, StreamEvent, TokenEvent
from knapper.wire.types import SampleRequest
from tests.engine.sampling.test_scheduler import House, request, until


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


async def frames_of(house: House, sample: SampleRequest) -> list[StreamEvent]:
    return [frame async for frame in serving.frames(house.sampler, sample)]


def test_the_frames_of_a_stream_are_the_answer(house: House) -> None:
    sample = request(num_samples=3, max_tokens=9, topk_sample_logprobs=2, ignore_eos=True)
    *drawn, whole = house.within(frames_of(house, sample))
    assert isinstance(whole, FinishedEvent)
    assert whole.device_s > 0
    output = proto.decode_sample_response(whole.answer)
    assert output.sequences[0].tokens.tolist() == house.run(sample)[0].sequences[0].tokens.tolist()
    for number, sequence in enumerate(output.sequences):
        tokens = [frame for frame in drawn if isinstance(frame, TokenEvent) and frame.sequence == number]
        assert [frame.position for frame in tokens] == list(range(9))
        assert [frame.token for frame in tokens] == sequence.tokens.tolist()
        assert [frame.logprob for frame in tokens] == sequence.logprobs.tolist()
        assert sequence.topk is not None
        assert [[token for token, _ in frame.alternatives] for frame in tokens] == sequence.topk.tokens.tolist()
        assert [frame.ending for frame in tokens] == [""] * 8 + ["length"]


def test_a_stop_is_told_with_the_token_that_stops(house: House) -> None:
    (free,) = house.run(request(max_tokens=9))
    stop = int(free.sequences[0].tokens[4])
    first = free.sequences[0].tokens.tolist().index(stop)
    *drawn, _ = house.within(frames_of(house, request(max_tokens=9, stop_tokens=(stop,))))
    assert [frame.ending for frame in drawn if isinstance(frame, TokenEvent)] == [""] * first + ["stop"]


def test_tokens_come_before_the_end_and_leaving_frees_the_slot(house: House) -> None:
    async def leave() -> int:
        frames = serving.frames(house.sampler, request(max_tokens=400))
        count = 0
        async for frame in frames:
            assert isinstance(frame, TokenEvent)
            count += 1
            if count == 5:
                break
        await frames.aclose()  # type: ignore[attr-defined]
        await until(lambda: house.sampler.counters.cancelled == 1)
        return count

    assert house.within(leave()) == 5
    assert house.sampler.active == 0
    assert house.sampler.counters.decoded_tokens < 400


def test_an_error_is_raised_before_the_first_token_and_a_frame_after_it(house: House) -> None:
    with pytest.raises(UserError, match="prompt"):
        house.within(frames_of(house, request(prompt=request().prompt[:0])))

    async def break_weights() -> StreamEvent:
        frames = serving.frames(house.sampler, request(max_tokens=400))
        await anext(frames)
        house.decoder.weights.norm.weight.fill_(float("nan"))
        last: StreamEvent | None = None
        async for frame in frames:
            last = frame
        assert last is not None
        return last

    failed = house.within(break_weights())
    assert isinstance(failed, FailedEvent)
    assert (failed.status, failed.code) == (422, "non_finite")


def test_frames_survive_the_way() -> None:
    frames: list[StreamEvent] = [
        TokenEvent(1, 2, 3, -0.5, "stop", [(3, -0.5), (4, float("-inf"))]),
        FinishedEvent(b"\x00\xff", 0.25),
        FailedEvent(422, "a", "b", "user"),
    ]

    async def bytewise() -> list[StreamEvent]:
        async def chunks() -> AsyncIterator[bytes]:
            for byte in b"".join(progress.encode(frame) for frame in frames):
                yield bytes([byte])

        return [frame async for frame in progress.decode(chunks())]

    assert asyncio.run(bytewise()) == frames
