"""The samples of one request: each of its prompts goes through the sample queue, like every other sample.

A sample that breaks off is retried. It draws the same tokens; those already passed on are not repeated.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from msgspec import UNSET

from gateway.openai.capture import Capture, Drawing, UnkeptTurns
from gateway.openai.models import SampledModel
from gateway.sample_queue import QueuedSample
from gateway.services import Services
from knapper.errors import Gone, KnapperError, Unavailable, Unservable
from knapper.ids import SamplerId, Tenant
from knapper.wire import sample_requests
from knapper.wire.progress import TokenEvent
from knapper.wire.types import Image, SamplingParams

_KEEP_ALIVE_S: Final = 10.0  # proxies close an idle connection; clients skip comments
_RETRY_AFTER_S: Final = 30.0  # for a model that cannot be served


@dataclass(frozen=True)
class SampleOptions:
    """The options for each prompt. `top`, `prompt_top`: the number of alternatives at each sampled and each prompt
    token; `prompt_top` None: the prompt is not scored. `grammar`: what the samples follow, if it is not empty.
    `images`: those of the prompt.
    """

    params: SamplingParams
    choices: int
    top: int = 0
    prompt_top: int | None = None
    grammar: str = ""
    images: tuple[Image, ...] = ()

    def tokens_max(self, prompt: int, context: int) -> int:
        """The most tokens that a prompt of so many, once, and all its choices may have."""
        each = context - prompt if self.params.max_tokens is None else self.params.max_tokens
        return prompt + self.choices * max(0, min(each, context - prompt))


@dataclass(frozen=True)
class KeepAlive:
    """No token was drawn for a while. `reason`: why the samples wait."""

    reason: str


Event = tuple[int, TokenEvent] | QueuedSample | KnapperError


class PendingSamples:
    """The samples of one request. `stream`: also their tokens, as they are drawn. `capture`: keeps them."""

    def __init__(self, gateway: Services, tenant: Tenant, stream: bool, capture: Capture | None) -> None:
        self._gateway = gateway
        self._capture = capture
        self._unkept: UnkeptTurns | None = None
        self._tenant = tenant
        self._stream = stream
        self._entries: list[QueuedSample] = []
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    async def submit(self, model: SampledModel, prompts: list[list[int]], options: SampleOptions) -> None:
        """Queue a sample for each prompt. Raises TooMany when the queue is full, and what admission does."""
        if self._capture is not None:
            self._capture.expect_texts(options.images)
            self._unkept = await self._capture.admit(Drawing(model, options.params, bool(options.grammar), prompts))
        url = self._gateway.sample_url or model.record.sample_url
        seed = options.params.seed
        try:
            for number, prompt in enumerate(prompts):
                call = sample_requests.SampleCall(
                    base_model=model.record.name,
                    adapter=model.adapter,
                    prompt=prompt,
                    params=options.params,
                    seed=int(self._gateway.new_id()[:12], 16) if seed is None else seed,
                    num_samples=options.choices,
                    prompt_logprobs=options.prompt_top is not None,
                    topk_prompt_logprobs=options.prompt_top or 0,
                    topk_sample_logprobs=options.top,
                    stream=self._stream,
                    grammar=options.grammar or UNSET,
                    images=list(options.images) or UNSET,
                )
                address = (SamplerId(f"openai:{self._tenant}"), next(self._gateway.openai.numbers))
                body = await asyncio.to_thread(sample_requests.encode, call)
                on_token = _TokenListener(number, self._events) if self._stream else None
                tokens = options.tokens_max(len(prompt), model.record.context)
                await self._gateway.admission.expect_samples(self._tenant, options.choices, tokens)
                entry = self._gateway.sample_queue.submit(
                    address, self._tenant, options.choices, url, body, on_token, tokens=tokens, wait_if_unservable=False
                )
                self._entries.append(entry)
        except BaseException:
            self.cancel()
            raise

    async def responses(self) -> list[bytes]:
        """The encoded SampleResponse of each prompt, once all are done, and kept if captured. Raises KnapperError."""
        for entry in self._entries:
            await entry.done.wait()
        responses = [_response(entry) for entry in self._entries]
        if self._unkept is not None:
            await self._unkept.keep(responses, self.sampler)
        return responses

    @property
    def sampler(self) -> str:
        """Backend and dtype of what draws them; empty until it answers."""
        return next((entry.sampler for entry in self._entries if entry.sampler), "")

    async def tokens(self) -> AsyncIterator[tuple[int, TokenEvent] | KeepAlive]:
        """(prompt number, token) as tokens are drawn, until all samples are done. Raises KnapperError.

        The last token of each that is captured waits until it is kept: what is not, no client takes for whole.
        """
        tasks = [asyncio.create_task(self._put_end(entry)) for entry in self._entries]
        pending, last = len(tasks), list[tuple[int, TokenEvent]]()
        try:
            while pending:
                try:
                    async with asyncio.timeout(_KEEP_ALIVE_S):
                        event = await self._events.get()
                except TimeoutError:
                    yield KeepAlive(self._wait_reason())
                    continue
                match event:
                    case QueuedSample():
                        _response(event)
                        pending -= 1
                    case KnapperError():
                        raise event
                    case (_, TokenEvent(ending=ending)) if ending and self._unkept is not None:
                        last.append(event)
                    case _:
                        yield event
            if self._unkept is not None:
                await self._unkept.keep([_response(entry) for entry in self._entries], self.sampler)
            for event in last:
                yield event
        finally:
            for task in tasks:
                task.cancel()

    async def _put_end(self, entry: QueuedSample) -> None:
        """Put the finished sample into the queue of its tokens, behind all of them."""
        await entry.done.wait()
        self._events.put_nowait(entry)

    def _wait_reason(self) -> str:
        reasons = [
            self._gateway.sample_queue.queue_state(entry)[1] for entry in self._entries if not entry.done.is_set()
        ]
        return next((reason for reason in reasons if reason), "working")

    def cancel(self) -> None:
        """Cancel unfinished samples and free all results: no client can ask for them again."""
        for entry in self._entries:
            self._gateway.sample_queue.cancel(entry, Gone("the client hung up"))
        self._gateway.sample_queue.release([entry.request_id for entry in self._entries], self._tenant)


class _TokenListener:
    """Passes on the tokens of one prompt. A retry must draw the same tokens as the attempt before it."""

    def __init__(self, number: int, events: asyncio.Queue[Event]) -> None:
        self._number = number
        self._events = events
        self._tokens: dict[int, list[int]] = {}

    def __call__(self, drawn: TokenEvent) -> None:
        tokens = self._tokens.setdefault(drawn.sequence, [])
        if drawn.position == len(tokens):
            tokens.append(drawn.token)
            self._events.put_nowait((self._number, drawn))
        elif tokens[drawn.position] != drawn.token:
            self._events.put_nowait(Unavailable("the sample broke off, and came out otherwise the second time"))


def _response(entry: QueuedSample) -> bytes:
    """The response of a finished sample. Raises its error."""
    if entry.body is None:
        raise Unavailable("the gateway stops")
    if entry.error is not None:
        if entry.error.code == Unservable.code:
            raise Unservable(str(entry.error), _RETRY_AFTER_S)
        raise entry.error
    return entry.body
