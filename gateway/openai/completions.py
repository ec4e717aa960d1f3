"""The response to a completion: whole, or as server-sent events while tokens are sampled."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.openai import errors
from gateway.openai.capture import Capture
from gateway.openai.detokenizer import Detokenizer, ScoredToken, TextDelta
from gateway.openai.models import SampledModel
from gateway.openai.responses import ChoiceFormat, Json
from gateway.openai.samples import KeepAlive, PendingSamples, SampleOptions
from gateway.openai.schemas import SharedParameters
from gateway.services import services_of
from gateway.tenants import tenant_of
from knapper.catalogue.tokenizer import Language
from knapper.diagnostics.weights import SavedWeights, describe
from knapper.errors import ContextLengthExceeded, KnapperError
from knapper.web.requests import while_connected
from knapper.wire import proto
from knapper.wire.progress import Ending, TokenEvent
from knapper.wire.types import SampledSequence, SampleOutput, TopK


@dataclass(frozen=True)
class Generation:
    """One decoded request. `prefixes`: the text with which each prompt's choices begin: the prompt, if echoed.

    `shown`: special tokens that have a text in an answer.
    """

    parameters: SharedParameters
    model: SampledModel
    language: Language
    prompts: list[list[int]]
    options: SampleOptions
    format: ChoiceFormat
    prefixes: list[str]
    shown: Mapping[int, str] = field(default_factory=dict)

    def detokenizer(self, prompt: int) -> Detokenizer:
        stops, offset = self.options.params.stop_strings, len(self.prefixes[prompt])
        return Detokenizer(self.language.tokenizer, self.prompts[prompt], stops, offset, self.shown)


async def respond(request: Request, task: Generation) -> Response:
    """The samples in the task's format. A client that hangs up cancels them. Raises KnapperError before it streams."""
    try:
        for prompt in task.prompts:  # fails at once, not only when the sample function has started
            ContextLengthExceeded.check(len(prompt), task.options.params.max_tokens, task.model.record.context)
        return await _respond(request, task)
    except KnapperError as error:
        error.field = _client_field(task, error.field)
        raise


async def _respond(request: Request, task: Generation) -> Response:
    gateway, tenant = services_of(request), tenant_of(request)
    head = {
        "id": f"{task.format.id_prefix}-{gateway.new_id()}",
        "object": task.format.chunk_object if task.parameters.stream else task.format.whole_object,
        "created": int(gateway.clock()),
        "model": task.parameters.model,
    }
    if task.model.checkpoint is not None:
        await gateway.openai.note_reading(tenant, task.model.checkpoint)
    weights = await gateway.monitor.weights.of(task.model.adapter)
    samples = PendingSamples(gateway, tenant, stream=bool(task.parameters.stream), capture=Capture.asked(request))
    await samples.submit(task.model, task.prompts, task.options)
    if not task.parameters.stream:
        try:
            responses = await while_connected(request, samples.responses())
        finally:
            samples.cancel()
        head["system_fingerprint"] = describe(weights, samples.sampler)
        return Response(await asyncio.to_thread(_whole, head, task, responses), media_type="application/json")
    events = _events(head, weights, task, samples)
    try:
        first = await while_connected(request, anext(events))
    except BaseException:
        samples.cancel()
        raise
    return EventStream(first, events, samples.cancel)


def _client_field(task: Generation, field: str | None) -> str | None:
    """The client's name for a field of a sample request."""
    own = {"prompt": task.parameters.prompt_field, "grammar": "response_format"}
    return field and own.get(field, field.removeprefix("sampling_params."))


def _whole(head: Json, task: Generation, responses: list[bytes]) -> bytes:
    """The response's JSON. Encodes choice by choice, since each call of the encoder holds the interpreter's lock."""
    choices: list[msgspec.Raw] = []
    sampled = 0
    for prompt, response in enumerate(responses):
        output = proto.decode_sample_response(response)
        scored = _scored_prompt(task, prompt, output)
        for number, sequence in enumerate(output.sequences):
            text, ending = _text(task.detokenizer(prompt), sequence)
            text = TextDelta(task.prefixes[prompt] + text.text, scored + text.tokens)
            sampled += sequence.tokens.size
            choice = task.format.whole(prompt * task.options.choices + number, text, ending)
            choices.append(msgspec.Raw(msgspec.json.encode(choice)))
    return msgspec.json.encode(head | {"choices": choices, "usage": _usage(task, sampled)})


def _text(detokenizer: Detokenizer, sequence: SampledSequence) -> tuple[TextDelta, Ending]:
    """The whole text of a sequence, decoded token by token as in a stream."""
    ending: Ending = "stop" if sequence.stopped else "length"
    deltas = []
    for position, (token, logprob) in enumerate(zip(sequence.tokens.tolist(), sequence.logprobs.tolist(), strict=True)):
        last = position == sequence.tokens.size - 1
        alternatives = _alternatives(sequence.topk, position)
        deltas.append(detokenizer.add(TokenEvent(0, position, token, logprob, ending if last else "", alternatives)))
    tokens = [scored for delta in deltas for scored in delta.tokens]
    return TextDelta("".join(delta.text for delta in deltas), tokens), ending


def _scored_prompt(task: Generation, prompt: int, output: SampleOutput) -> list[ScoredToken]:
    """The prompt's tokens with their log-probabilities, if the client wants them; else none."""
    if output.prompt_logprobs is None:
        return []
    detokenizer, offset, scored = Detokenizer(task.language.tokenizer, [], ()), 0, []
    for position, (token, logprob) in enumerate(
        zip(task.prompts[prompt], output.prompt_logprobs.tolist(), strict=True)
    ):
        alternatives = _alternatives(output.topk_prompt_logprobs, position)
        scored.append(ScoredToken(token, logprob if position else None, alternatives, offset))
        offset += len(detokenizer.add(TokenEvent(0, position, token, 0.0)).text)
    return scored


def _alternatives(topk: TopK | None, position: int) -> list[tuple[int, float]]:
    if topk is None:
        return []
    return list(zip(topk.tokens[position].tolist(), topk.logprobs[position].tolist(), strict=True))


async def _events(head: Json, weights: SavedWeights, task: Generation, samples: PendingSamples) -> AsyncIterator[bytes]:
    """Server-sent events. An error before the first is raised; a later one is the last event."""
    choices = task.options.choices
    detokenizers = [task.detokenizer(prompt) for prompt in range(len(task.prompts)) for _ in range(choices)]
    open_choices = set(range(len(detokenizers)))
    sampled, begun = 0, False
    usage = {"usage": None} if task.parameters.usage_wanted else {}

    def event(choice: Json) -> bytes:
        fingerprint = {"system_fingerprint": describe(weights, samples.sampler)}
        return _data(head | fingerprint | {"choices": [choice]} | usage)

    try:
        async for token in samples.tokens():
            if not begun:
                begun = True
                for index in range(len(detokenizers)):
                    if (opening := task.format.opening(index)) is not None:
                        yield event(opening)
            if isinstance(token, KeepAlive):
                yield f": {token.reason}\n\n".encode()
                continue
            prompt, drawn = token
            index = prompt * choices + drawn.sequence
            sampled += 1
            delta = detokenizers[index].add(drawn)
            if (delta.text or drawn.ending) and (chunk := task.format.chunk(index, delta, drawn.ending)) is not None:
                yield event(chunk)
            if drawn.ending:
                open_choices.discard(index)
    except KnapperError as error:
        if not begun:
            raise
        error.field = _client_field(task, error.field)
        yield _data(errors.body(error))
        return
    for index in sorted(open_choices):  # max_tokens is 0
        if (opening := task.format.opening(index)) is not None and not begun:
            yield event(opening)
        if (chunk := task.format.chunk(index, TextDelta("", []), "length")) is not None:
            yield event(chunk)
    if task.parameters.usage_wanted:
        yield _data(head | {"choices": [], "usage": _usage(task, sampled)})
    yield b"data: [DONE]\n\n"


def _usage(task: Generation, sampled: int) -> dict[str, int]:
    """All sampled tokens count, end-of-sequence tokens included."""
    prompt = sum(map(len, task.prompts))
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def _data(message: Any) -> bytes:
    return b"data: " + msgspec.json.encode(message) + b"\n\n"


class EventStream(StreamingResponse):
    """Sends each event at once. Calls `on_end` when the response ends, also if the client hangs up."""

    def __init__(self, first: bytes, remaining: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        async def events() -> AsyncIterator[bytes]:
            yield first
            async for event in remaining:
                yield event

        # X-Accel-Buffering: proxies must not buffer the response.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events(), media_type="text/event-stream", headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
