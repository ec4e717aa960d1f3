"""A sample, told token by token to whoever asked for it."""

import asyncio
from collections.abc import AsyncIterator

import structlog

from knapper.errors import KnapperError
from knapper.serving.sampler import SamplerProtocol
from knapper.wire import progress, proto
from knapper.wire.progress import FailedEvent, FinishedEvent, StreamEvent, TokenEvent
from knapper.wire.types import SampleRequest

log = structlog.get_logger()


async def frames(sampler: SamplerProtocol, sample: SampleRequest) -> AsyncIterator[StreamEvent]:
    """Each token when it is drawn, then the whole answer. Closing it ends the sample.

    An error before the first token is raised; a later one is the last frame.
    """
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[TokenEvent | None] = asyncio.Queue()

    def listen(drawn: TokenEvent) -> None:
        loop.call_soon_threadsafe(heard.put_nowait, drawn)

    work = asyncio.ensure_future(sampler.sample(sample, listen))
    work.add_done_callback(lambda _: heard.put_nowait(None))  # behind every token: the loop keeps their order
    told = 0
    try:
        while (drawn := await heard.get()) is not None:
            told += 1
            yield drawn
        output = work.result()
        yield FinishedEvent(proto.encode_sample_response(output), output.device_s)
    except KnapperError as error:
        if not told:
            raise
        yield FailedEvent(error.status, str(error), error.code, error.category, error.field)
    finally:
        if work.cancel():
            log.info("client left: its sample is cancelled", prompt_tokens=int(sample.prompt.size), told=told)


async def stream(first: StreamEvent, rest: AsyncIterator[StreamEvent]) -> AsyncIterator[bytes]:
    """The frames as bytes, each at once."""
    yield progress.encode(first)
    async for frame in rest:
        yield progress.encode(frame)
