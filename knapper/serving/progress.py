"""A sample, streamed token by token."""

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
    """Each token when it is drawn, then the whole output. Closing the iterator cancels the sample.

    An error before the first token is raised; a later one is the last frame.
    """
    loop = asyncio.get_running_loop()
    tokens: asyncio.Queue[TokenEvent | None] = asyncio.Queue()

    def on_token(token: TokenEvent) -> None:
        loop.call_soon_threadsafe(tokens.put_nowait, token)

    work = asyncio.ensure_future(sampler.sample(sample, on_token))
    work.add_done_callback(lambda _: tokens.put_nowait(None))  # behind every token: the loop keeps their order
    sent = 0
    try:
        while (token := await tokens.get()) is not None:
            sent += 1
            yield token
        output = work.result()
        yield FinishedEvent(proto.encode_sample_response(output), output.device_s)
    except KnapperError as error:
        if not sent:
            raise
        yield FailedEvent(error.status, str(error), error.code, error.category, error.field)
    finally:
        if work.cancel():
            log.info("client left: its sample is cancelled", prompt_tokens=int(sample.prompt.size), told=sent)


async def stream(first: StreamEvent, remaining: AsyncIterator[StreamEvent]) -> AsyncIterator[bytes]:
    """The frames as bytes, each at once."""
    yield progress.encode(first)
    async for frame in remaining:
        yield progress.encode(frame)
