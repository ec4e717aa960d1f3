"""The contract of `knapper.engine.sampling.sampler` by vLLM: equal answers, within the bounds of docs/vllm.md.

A request of n samples is n sequences of vLLM's, each with its own seed; they share the prompt in vLLM's prefix cache.
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
from knapper.engine.images.placed import expect_none
from knapper.engine.models.config import Facts
from knapper.engine.sampling import validation
from knapper.engine.sampling.next_tokens import NonFiniteLogits
from knapper.engine.sampling.stop import StopCriteria
from knapper.errors import ContextLengthExceeded, InvalidField, Unavailable
from knapper.state.journal.machine import Files
from knapper.state.journal.records import Spec
from knapper.vllm import prompts
from knapper.vllm.adapters import AdapterFiles
from knapper.vllm.core import TEMPERATURES, Adapter, Core, SequenceRequest, TokenDelta, Top
from knapper.vllm.device_time import DeviceTime
from knapper.vllm.engine import CoreLifecycle
from knapper.vllm.fair_queue import SlotQueue
from knapper.wire.progress import Ending, TokenEvent
from knapper.wire.types import SampledSequence, SampleOutput, SampleRequest


@dataclass
class VllmCounters:
    """Since the sampler started."""

    prefilled_tokens: int = 0  # prompt tokens, cached ones included
    decoded_tokens: int = 0
    finished: int = 0  # requests
    failed: int = 0
    cancelled: int = 0


@dataclass(eq=False)
class _RequestState:
    """One request in progress."""

    request: SampleRequest
    adapter: Adapter | None
    stops: StopCriteria
    ends: tuple[int, ...]
    tokens_max: int
    listen: Callable[[TokenEvent], None] | None
    sequences: dict[int, SampledSequence] = field(default_factory=dict)
    prompt: TokenDelta | None = None
    cached: int = 0
    device_s: float = 0.0  # its sequences' parts of the wall clock


class VllmSampler:
    """As many sequences at once as the core has slots; the rest wait in turn."""

    def __init__(
        self,
        engine: CoreLifecycle,
        adapters: AdapterFiles,
        facts: Facts,
        tokenizer: Tokenizer,
        slots: SlotQueue,
        device_time: DeviceTime,
    ) -> None:
        self.counters = VllmCounters()
        self._device_time = device_time
        self._engine, self._adapters, self._facts, self._tokenizer, self._slots = (
            engine,
            adapters,
            facts,
            tokenizer,
            slots,
        )
        self._requests = 0

    @property
    def active(self) -> int:
        """Sequences that decode."""
        return self._slots.active

    def offer(self, spec: Spec, files: Files) -> None:
        """Take an adapter that this process saves: see AdapterFiles."""
        self._adapters.offer(spec, files)

    async def sample(self, request: SampleRequest, listen: Callable[[TokenEvent], None] | None = None) -> SampleOutput:
        """The samples of one request: the same tokens for the same request, within rounding.

        A token's log-probability is that of the distribution that it was drawn from; those of the prompt are
        untempered. Cancelling the caller frees the slots. `listen` gets each token as it comes. Raises InvalidField or
        UserError for an invalid request, NonFiniteLogits for broken weights, Unavailable when too many requests wait,
        CoreEnded if vLLM ended during the request.
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
        expect_none(request.images, "prompt")
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
        if request.grammar:
            allowed = "none with the vLLM sampler: vLLM runs without a tokenizer here, and constrains no text then"
            raise InvalidField("grammar", "given", allowed, "Serve the model by the engine's own sampler")
        prompt, context = int(request.prompt.size), self._facts.context
        if prompt >= context:
            raise ContextLengthExceeded(prompt, context - 1, context, " with the vLLM sampler")

    async def _sample(self, request: SampleRequest, listen: Callable[[TokenEvent], None] | None) -> SampleOutput:
        params = request.params
        async with AsyncExitStack() as stack:
            core = await stack.enter_async_context(self._engine.use())
            adapter = None
            if request.adapter:
                adapter = (await stack.enter_async_context(self._adapters.take(request.adapter))).adapter
                await self._engine.load(core, adapter)
            context_left = self._facts.context - int(request.prompt.size)
            ends = (*(() if params.ignore_eos else self._facts.eos), *params.stop_tokens)
            state = _RequestState(
                request=request,
                adapter=adapter,
                stops=StopCriteria(ends, params.stop_strings, self._tokenizer),
                ends=ends,
                tokens_max=context_left if params.max_tokens is None else min(params.max_tokens, context_left),
                listen=listen,
            )
            self.counters.prefilled_tokens += int(request.prompt.size)
            await self._sample_all(core, state)
            return _output(state)

    async def _sample_all(self, core: Core, state: _RequestState) -> None:
        """All sequences of the request, each in its turn. The first error ends the others."""
        alternatives_of = state.request.num_samples if state.tokens_max else 1
        tasks: list[asyncio.Task[None]] = []
        try:
            for number in range(alternatives_of):
                leave = await self._slots.take(state.request.tenant, state.adapter.content if state.adapter else "")
                tasks.append(asyncio.create_task(self._charged(core, state, number)))
                tasks[-1].add_done_callback(leave)
                if any(task.done() and task.exception() for task in tasks):
                    break
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _charged(self, core: Core, state: _RequestState, number: int) -> None:
        """Sample a sequence and add its part of the device's time to the request."""
        end = self._device_time.begin()
        try:
            await self._sample_one(core, state, number)
        finally:
            state.device_s += end()

    async def _sample_one(self, core: Core, state: _RequestState, number: int) -> None:
        request, params = state.request, state.request.params
        vllm_request = SequenceRequest(
            prompt=request.prompt.tolist(),
            seed=_seed(request.seed, number),
            tokens_max=max(1, state.tokens_max),
            temperature=params.temperature,
            top_k=-1 if params.top_k >= self._facts.vocab_size else params.top_k,
            top_p=params.top_p,
            ends=state.ends,
            top=request.topk_sample_logprobs,
            prompt_top=prompts.alternatives_of(request) if number == 0 else None,
            whole=state.listen is None and not params.stop_strings,
        )
        sequence = _Sequence(state, number)
        async with aclosing(core.generate(vllm_request, state.adapter)) as deltas:
            async for delta in deltas:
                if delta.prompt is not None:
                    state.prompt = delta
                state.cached = max(state.cached, delta.cached)
                for token, logprob, top in zip(delta.tokens, delta.logprobs, delta.tops, strict=True):
                    if state.tokens_max == 0:
                        break
                    self.counters.decoded_tokens += 1
                    if sequence.take(token, logprob, top):
                        return
        sequence.finish(stopped=False)


class _Sequence:
    """One sample of a request."""

    def __init__(self, state: _RequestState, number: int) -> None:
        self._state, self._number = state, number
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._tops: list[Top] = []

    def take(self, token: int, logprob: float, top: Top) -> bool:
        """Add a token. True when the sequence ends with it; the request then has its result. Raises NonFiniteLogits."""
        request = self._state.request
        if not math.isfinite(logprob):
            weights = f"adapter {request.adapter}" if request.adapter else f"model {request.base_model}"
            raise NonFiniteLogits(
                f"{weights} gives logits that are not finite: broken weights. Use an earlier checkpoint"
            )
        self._tokens.append(token)
        self._logprobs.append(logprob)
        top = [
            alternative for alternative in top if alternative[1] > -math.inf
        ]  # without those that top_k or top_p removed
        self._tops.append(top)
        stopped = self._state.stops.ended(self._tokens)
        full = len(self._tokens) >= self._state.tokens_max
        if self._state.listen is not None:
            ending: Ending = "stop" if stopped else "length" if full else ""
            self._state.listen(TokenEvent(self._number, len(self._tokens) - 1, token, logprob, ending, top))
        if stopped or full:
            self.finish(stopped)
        return stopped or full

    def finish(self, stopped: bool) -> None:
        k = self._state.request.topk_sample_logprobs
        self._state.sequences[self._number] = SampledSequence(
            tokens=np.array(self._tokens, dtype=np.int32),
            logprobs=np.array(self._logprobs, dtype=np.float32),
            stopped=stopped,
            topk=prompts.table(self._tops, k) if k else None,
        )


def _output(state: _RequestState) -> SampleOutput:
    count = state.request.num_samples
    sequences = [state.sequences[number if state.tokens_max else 0] for number in range(count)]
    fields = prompts.prompt_fields(state.request, state.prompt) if state.prompt is not None else {}
    return SampleOutput(sequences, prompt_cache_hit_tokens=state.cached, device_s=state.device_s, **fields)


def _seed(seed: int, number: int) -> int:
    """The seed of one sequence: requests with consecutive seeds share none."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
