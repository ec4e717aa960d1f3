"""Samples for one request: each of its prompts goes the way of all samples, queue and fairness included.

A sample that breaks off is asked for again. It gives the same tokens; those that were heard before are not told twice.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from gateway.openai.models import Chosen
from gateway.sample_queue import QueuedSample
from gateway.services import Services
from knapper.errors import Gone, KnapperError, Unavailable, Unservable
from knapper.ids import SamplerId, Tenant
from knapper.wire import sample_requests
from knapper.wire.progress import TokenEvent
from knapper.wire.types import SamplingParams

_QUIET_S: Final = 10.0  # proxies close a connection on which nothing comes; clients skip comments

_AGAIN_S: Final = 30.0  # a model that cannot be served is tried again so often


@dataclass(frozen=True)
class Question:
    """What is asked about each prompt. `top`: alternatives at each sampled token; `prompt_top`: None: no scores."""

    params: SamplingParams
    choices: int
    top: int = 0
    prompt_top: int | None = None


@dataclass(frozen=True)
class Quiet:
    """Nothing was drawn for a while. `reason`: what is waited for."""

    reason: str


Heard = tuple[int, TokenEvent] | QueuedSample | KnapperError


class PendingSamples:
    """The samples of `prompts` under way, and the tokens heard so far if `stream`."""

    def __init__(self, gateway: Services, tenant: Tenant, stream: bool) -> None:
        self._gateway = gateway
        self._tenant = tenant
        self._stream = stream
        self._entries: list[QueuedSample] = []
        self._heard: asyncio.Queue[Heard] = asyncio.Queue()

    async def ask(self, chosen: Chosen, prompts: list[list[int]], question: Question) -> None:
        """Take all on. Raises TooMany when the queue is full."""
        url = self._gateway.sample_url or chosen.model.sample_url
        seed = question.params.seed
        try:
            for number, prompt in enumerate(prompts):
                call = sample_requests.SampleCall(
                    base_model=chosen.model.name,
                    adapter=chosen.adapter,
                    prompt=prompt,
                    params=question.params,
                    seed=int(self._gateway.new_id()[:12], 16) if seed is None else seed,
                    num_samples=question.choices,
                    prompt_logprobs=question.prompt_top is not None,
                    topk_prompt_logprobs=question.prompt_top or 0,
                    topk_sample_logprobs=question.top,
                    stream=self._stream,
                )
                address = (SamplerId(f"openai:{self._tenant}"), next(self._gateway.openai.numbers))
                body = await asyncio.to_thread(sample_requests.encode, call)
                listen = _Ear(number, self._heard) if self._stream else None
                entry = self._gateway.samples.submit(
                    address, self._tenant, question.choices, url, body, listen, patient=False
                )
                self._entries.append(entry)
        except BaseException:
            self.end()
            raise

    async def answers(self) -> list[bytes]:
        """The samples of each prompt, as SampleResponse, once all are there. Raises KnapperError."""
        for entry in self._entries:
            await entry.done.wait()
        return [_answer(entry) for entry in self._entries]

    async def drawn(self) -> AsyncIterator[tuple[int, TokenEvent] | Quiet]:
        """Each token with the number of its prompt, as it comes; ends when all have ended. Raises KnapperError."""
        ends = [asyncio.create_task(self._tell_end(entry)) for entry in self._entries]
        left = len(ends)
        try:
            while left:
                try:
                    heard = await asyncio.wait_for(self._heard.get(), _QUIET_S)
                except TimeoutError:
                    yield Quiet(self._waits_for())
                    continue
                match heard:
                    case QueuedSample():
                        _answer(heard)
                        left -= 1
                    case KnapperError():
                        raise heard
                    case _:
                        yield heard
        finally:
            for task in ends:
                task.cancel()

    async def _tell_end(self, entry: QueuedSample) -> None:
        """Into the same queue as the tokens, so behind all of them."""
        await entry.done.wait()
        self._heard.put_nowait(entry)

    def _waits_for(self) -> str:
        reasons = [self._gateway.samples.queue_state(entry)[1] for entry in self._entries if not entry.done.is_set()]
        return next((reason for reason in reasons if reason), "working")

    def end(self) -> None:
        """Cancel what is not finished, and keep no results: nobody will ask for them again."""
        for entry in self._entries:
            self._gateway.samples.cancel(entry, Gone("the client hung up"))
        self._gateway.samples.release([entry.request_id for entry in self._entries], self._tenant)


class _Ear:
    """Hears the tokens of one prompt. Those of a second attempt must begin as those of the first."""

    def __init__(self, number: int, heard: asyncio.Queue[Heard]) -> None:
        self._number = number
        self._heard = heard
        self._tokens: dict[int, list[int]] = {}

    def __call__(self, drawn: TokenEvent) -> None:
        tokens = self._tokens.setdefault(drawn.sequence, [])
        if drawn.position == len(tokens):
            tokens.append(drawn.token)
            self._heard.put_nowait((self._number, drawn))
        elif tokens[drawn.position] != drawn.token:
            self._heard.put_nowait(Unavailable("the sample broke off, and came out otherwise the second time"))


def _answer(entry: QueuedSample) -> bytes:
    """Of an entry that is done. Raises its error."""
    if entry.body is None:
        raise Unavailable("the gateway stops")
    if entry.error is not None:
        if entry.error.code == Unservable.code:
            raise Unservable(str(entry.error), _AGAIN_S)
        raise entry.error
    return entry.body
