"""The contract of `knapper.engine.sampling.sampler`, kept by vLLM: equal answers, within the bounds of docs/vllm.md.

A request of n samples is n texts of vLLM's, each with a seed of its own; they share the prompt in vLLM's cache.
"""

import asyncio
import hashlib
import math
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from knapper import limits
from knapper.engine.models.config import Facts
from knapper.engine.sampling import validation
from knapper.engine.sampling.next_tokens import NonFiniteLogits
from knapper.engine.sampling.stop import StopCriteria
from knapper.errors import ContextLengthExceeded, InvalidField, Unavailable
from knapper.vllm import prompts
from knapper.vllm.adapters import AdapterFiles
from knapper.vllm.core import TEMPERATURES, Adapter, Ask, Core, TokenDelta, Top
from knapper.vllm.device_time import Shares
from knapper.vllm.engine import CoreLifecycle
from knapper.vllm.fair_queue import SlotQueue
from knapper.wire.progress import Ending, TokenEvent
from knapper.wire.types import SampledSequence, SampleOutput, SampleRequest


@dataclass
class VllmCounters:
    """Since the sampler began."""

    prefilled_tokens: int = 0  # prompt tokens, those that the cache had included
    decoded_tokens: int = 0
    finished: int = 0  # requests
    failed: int = 0
    cancelled: int = 0


@dataclass(eq=False)
class _Job:
    """One request, and what came of it so far."""

    request: SampleRequest
    adapter: Adapter | None
    stops: StopCriteria
    ends: tuple[int, ...]
    tokens_max: int
    listen: Callable[[TokenEvent], None] | None
    sequences: dict[int, SampledSequence] = field(default_factory=dict)
    prompt: TokenDelta | None = None
    cached: int = 0
    device_s: float = 0.0  # its texts' shares of the wall clock


class VllmSampler:
    """As many texts at once as the engine's core has slots for; the rest wait in turn."""

    def __init__(
        self,
        engine: CoreLifecycle,
        shelf: AdapterFiles,
        facts: Facts,
        tokenizer: Tokenizer,
        turns: SlotQueue,
        shares: Shares,
    ) -> None:
        self.counters = VllmCounters()
        self._shares = shares
        self._engine, self._shelf, self._facts, self._tokenizer, self._turns = engine, shelf, facts, tokenizer, turns
        self._requests = 0

    @property
    def active(self) -> int:
        """Texts that decode."""
        return self._turns.active

    async def sample(self, request: SampleRequest, listen: Callable[[TokenEvent], None] | None = None) -> SampleOutput:
        """The samples of one request: the same tokens for the same request, as far as rounding allows.

        The log-probabilities are those of the distribution that each token was drawn from; those of the prompt are
        untempered. Cancelling the caller frees the slots. `listen` hears each token as it comes.
        Raises InvalidField or UserError for what cannot be asked, NonFiniteLogits for broken weights, Unavailable when
        too many wait, CoreEnded when vLLM ended under the request.
        """
        self._check(request)
        if self._requests >= limits.samples_waiting_max:
            raise Unavailable(f"{self._requests} sample requests wait; allowed: {limits.samples_waiting_max}")
        self._requests += 1
        try:
            output = await self._sample(request, listen)
            self.counters.finished += 1
            return output
        except asyncio.CancelledError:
            self.counters.cancelled += 1
            raise
        except Exception:
            self.counters.failed += 1
            raise
        finally:
            self._requests -= 1

    def _check(self, request: SampleRequest) -> None:
        validation.check(request, self._facts)
        low, high = TEMPERATURES
        if request.params.temperature != 0 and not low <= request.params.temperature <= high:
            allowed = f"0 to {limits.greedy_temperature_max:g} (greedy), or {low:g} to {high:g} with the vLLM sampler"
            raise InvalidField("sampling_params.temperature", request.params.temperature, allowed)
        if request.prompt_alt_tokens_k:
            allowed = "0 with the vLLM sampler, which draws no alternatives to a prompt's tokens"
            raise InvalidField("prompt_alt_tokens_k", request.prompt_alt_tokens_k, allowed)
        if request.target_prompt_logprobs is not None:
            allowed = "none with the vLLM sampler, which scores only a prompt's own and its likeliest tokens"
            raise InvalidField("target_prompt_logprobs", "given", allowed)
        prompt, context = int(request.prompt.size), self._facts.context
        if prompt >= context:
            raise ContextLengthExceeded(prompt, context - 1, context, " with the vLLM sampler")

    async def _sample(self, request: SampleRequest, listen: Callable[[TokenEvent], None] | None) -> SampleOutput:
        params = request.params
        async with AsyncExitStack() as held:
            core = await held.enter_async_context(self._engine.use())
            adapter = None
            if request.adapter:
                adapter = (await held.enter_async_context(self._shelf.take(request.adapter))).adapter
                await self._engine.load(core, adapter)
            room = self._facts.context - int(request.prompt.size)
            ends = (*(() if params.ignore_eos else self._facts.eos), *params.stop_tokens)
            job = _Job(
                request=request,
                adapter=adapter,
                stops=StopCriteria(ends, params.stop_strings, self._tokenizer),
                ends=ends,
                tokens_max=room if params.max_tokens is None else min(params.max_tokens, room),
                listen=listen,
            )
            self.counters.prefilled_tokens += int(request.prompt.size)
            await self._texts(core, job)
            return _output(job)

    async def _texts(self, core: Core, job: _Job) -> None:
        """All texts of the job, each when it is its turn. The first that fails ends the others."""
        wanted = job.request.num_samples if job.tokens_max else 1
        tasks: list[asyncio.Task[None]] = []
        try:
            for number in range(wanted):
                leave = await self._turns.take(job.request.tenant, job.adapter.content if job.adapter else "")
                tasks.append(asyncio.create_task(self._charged(core, job, number)))
                tasks[-1].add_done_callback(leave)
                if any(task.done() and task.exception() for task in tasks):
                    break
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _charged(self, core: Core, job: _Job, number: int) -> None:
        """A text; its share of the time is the job's."""
        end = self._shares.begin()
        try:
            await self._text(core, job, number)
        finally:
            job.device_s += end()

    async def _text(self, core: Core, job: _Job, number: int) -> None:
        request, params = job.request, job.request.params
        ask = Ask(
            prompt=request.prompt.tolist(),
            seed=_seed(request.seed, number),
            tokens_max=max(1, job.tokens_max),
            temperature=params.temperature,
            top_k=-1 if params.top_k >= self._facts.vocab_size else params.top_k,
            top_p=params.top_p,
            ends=job.ends,
            top=request.topk_sample_logprobs,
            prompt_top=prompts.wanted(request) if number == 0 else None,
            whole=job.listen is None and not params.stop_strings,
        )
        text = _Text(job, number)
        async with aclosing(core.generate(ask, job.adapter)) as pieces:
            async for piece in pieces:
                if piece.prompt is not None:
                    job.prompt = piece
                job.cached = max(job.cached, piece.cached)
                for token, logprob, top in zip(piece.tokens, piece.logprobs, piece.tops, strict=True):
                    if job.tokens_max == 0:
                        break
                    self.counters.decoded_tokens += 1
                    if text.take(token, logprob, top):
                        return
        text.finish(stopped=False)


class _Text:
    """One sample of a request."""

    def __init__(self, job: _Job, number: int) -> None:
        self._job, self._number = job, number
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._tops: list[Top] = []

    def take(self, token: int, logprob: float, top: Top) -> bool:
        """Add a token. True when the text ends with it; the job then has its sequence. Raises NonFiniteLogits."""
        request = self._job.request
        if not math.isfinite(logprob):
            weights = f"adapter {request.adapter}" if request.adapter else f"model {request.base_model}"
            raise NonFiniteLogits(
                f"{weights} gives logits that are not finite: broken weights. Use an earlier checkpoint"
            )
        self._tokens.append(token)
        self._logprobs.append(logprob)
        top = [each for each in top if each[1] > -math.inf]  # those that top_k or top_p cut off
        self._tops.append(top)
        stopped = self._job.stops.ended(self._tokens)
        full = len(self._tokens) >= self._job.tokens_max
        if self._job.listen is not None:
            ending: Ending = "stop" if stopped else "length" if full else ""
            self._job.listen(TokenEvent(self._number, len(self._tokens) - 1, token, logprob, ending, top))
        if stopped or full:
            self.finish(stopped)
        return stopped or full

    def finish(self, stopped: bool) -> None:
        k = self._job.request.topk_sample_logprobs
        self._job.sequences[self._number] = SampledSequence(
            tokens=np.array(self._tokens, dtype=np.int32),
            logprobs=np.array(self._logprobs, dtype=np.float32),
            stopped=stopped,
            topk=prompts.table(self._tops, k) if k else None,
        )


def _output(job: _Job) -> SampleOutput:
    count = job.request.num_samples
    sequences = [job.sequences[number if job.tokens_max else 0] for number in range(count)]
    told = prompts.told(job.request, job.prompt) if job.prompt is not None else {}
    return SampleOutput(sequences, prompt_cache_hit_tokens=job.cached, device_s=job.device_s, **told)


def _seed(seed: int, number: int) -> int:
    """Of a request's text: requests whose seeds follow each other have no text in common."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
