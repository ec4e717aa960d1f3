"""The sampler of the engine: checks a sample request, loads its adapter, and submits it to the scheduler."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

from tokenizers import Tokenizer

from knapper import limits
from knapper.engine.executor import Executor, Work
from knapper.engine.images.placed import PlacedImage
from knapper.engine.models.base import Model
from knapper.engine.sampling import validation
from knapper.engine.sampling.adapter_cache import AdapterCache, AdapterSource
from knapper.engine.sampling.grammar import GrammarCompiler
from knapper.engine.sampling.prompts import SamplingCounters
from knapper.engine.sampling.scheduler import SamplingScheduler
from knapper.engine.sampling.sequence import SequenceGroup
from knapper.engine.sampling.stop import StopCriteria
from knapper.errors import ContextLengthExceeded, InvalidField, TooLarge
from knapper.wire.progress import TokenEvent
from knapper.wire.types import SampleOutput, SampleRequest

_ADAPTER_BYTES_MAX: Final = 1024 * limits.MIB


class EngineSampler:
    """Continuous batching over one decoder: `slots_max` sequences decode at once, within `kv_tokens_max` positions.

    Adapters are cached between requests, up to `adapter_bytes_max`. `text_tokens_max`: for more the device has no room
    when they are computed at once, as a prompt is. `now`, in seconds, only measures costs.
    """

    def __init__(
        self,
        decoder: Model,
        device: Executor,
        adapters: AdapterSource,
        tokenizer: Tokenizer | None,
        *,
        slots_max: int,
        kv_tokens_max: int,
        now: Callable[[], float],
        adapter_bytes_max: int = _ADAPTER_BYTES_MAX,
        text_tokens_max: int | None = None,
    ) -> None:
        self._decoder, self._device, self._tokenizer = decoder, device, tokenizer
        self._grammars = GrammarCompiler(tokenizer, decoder.config)
        self._text_tokens_max = text_tokens_max
        self._kv_tokens_max = kv_tokens_max
        self.slots_max = slots_max
        self._adapters = AdapterCache(adapters, decoder.device, adapter_bytes_max)
        self._scheduler = SamplingScheduler(decoder, device, slots_max, kv_tokens_max, now)

    @property
    def counters(self) -> SamplingCounters:
        return self._scheduler.counters

    @property
    def active(self) -> int:
        """Sequences that decode."""
        return self._scheduler.active

    @property
    def waiting(self) -> int:
        """Requests with sequences that have not started."""
        return self._scheduler.waiting

    async def sample(self, request: SampleRequest, listen: Callable[[TokenEvent], None] | None = None) -> SampleOutput:
        """The samples of one request: in float32 the same tokens for the same request, whatever other requests there
        are.

        A token's log-probability is that of the distribution that it was drawn from (see `token_sampling.draw`). Prompt
        log-probabilities are untempered; alternatives to prompt tokens are drawn at the request's temperature, without
        its top_k, top_p and grammar. max_tokens 0 only scores the prompt; None samples to the end of the context, or of
        the memory where that ends earlier. Cancelling the caller frees the slots. `listen` gets each token as it is
        drawn, on the device's thread, which waits for it.

        Raises InvalidField or UserError for an invalid request or grammar, TooLarge if it can never fit, OutOfMemory if
        it turns out not to, NonFiniteLogits for broken weights, Unavailable when too many requests wait.
        """
        config, params = self._decoder.config, request.params
        validation.check(request, config)
        if params.stop_strings and self._tokenizer is None:
            allowed = "token ids only, as this model has no tokenizer.json"
            raise InvalidField("sampling_params.stop", params.stop_strings[0], allowed)
        ends = () if params.ignore_eos else config.eos
        grammar = None
        if request.grammar:
            grammar = await asyncio.to_thread(self._grammars.compile, request.grammar)
        tokens_max = self._tokens_max(request)
        images: tuple[PlacedImage, ...] = ()
        if request.images:
            images = await asyncio.to_thread(self._decoder.placed, request.images, "prompt")
        async with AsyncExitStack() as stack:
            lora = None
            if request.adapter:
                lora = await stack.enter_async_context(self._adapters.use(request.adapter))
                validation.check_adapter(request.adapter, lora, config)
            group = SequenceGroup(
                request=request,
                lora=lora,
                stops=StopCriteria((*ends, *params.stop_tokens), params.stop_strings, self._tokenizer),
                tokens_max=tokens_max,
                listen=listen,
                grammar=grammar,
                images=images,
            )
            self._scheduler.submit(group)
            return await asyncio.wrap_future(group.future)

    async def release(self) -> None:
        """Free what is kept for later requests only: keys and values of prompts, and adapters that none uses now."""

        def work() -> Work[None]:
            yield from ()
            self._scheduler.release_caches()

        self._adapters.release()
        await self._device.run(work())

    def _tokens_max(self, request: SampleRequest) -> int:
        """Tokens that a sequence may have. Raises TooLarge if there is no memory for so many, even without others."""
        prompt, requested = int(request.prompt.size), request.params.max_tokens
        context_left = self._decoder.config.context - prompt
        at_once = self._text_tokens_max or self._decoder.config.context
        longest = min(self._scheduler.longest, at_once)
        fits = longest - prompt + 1  # the last token is never fed
        tokens_max = min(context_left, requested if requested is not None else fits if fits > 0 else context_left)
        cost = 0 if tokens_max <= 1 else self._scheduler.positions(prompt + tokens_max - 1)
        lacks_memory = cost > self._kv_tokens_max or prompt + max(0, tokens_max - 1) > at_once
        if lacks_memory and fits < 1:
            because = f", as the server has key/value memory for {longest}"
            raise ContextLengthExceeded(prompt, longest, self._decoder.config.context, because)
        if lacks_memory:
            raise TooLarge(
                f"a prompt of {prompt} tokens with up to {tokens_max} sampled ones needs {cost} positions of key/value "
                f"memory; allowed: {min(self._kv_tokens_max, at_once)}. Lower sampling_params.max_tokens, or send a "
                "shorter prompt"
            )
        return tokens_max
