"""From samples to an answer: whole, or as server-sent events while the tokens are drawn."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.openai import errors
from gateway.openai.detokenizer import Detokenizer, ScoredToken, TextDelta
from gateway.openai.models import Chosen
from gateway.openai.responses import ChoiceFormat, Json
from gateway.openai.samples import PendingSamples, Question, Quiet
from gateway.openai.schemas import SharedParameters
from gateway.services import parts
from gateway.tenants import tenant_of
from knapper.catalogue.tokenizer import Language
from knapper.errors import ContextLengthExceeded, KnapperError
from knapper.web.requests import while_connected
from knapper.wire import proto
from knapper.wire.progress import Ending, TokenEvent
from knapper.wire.types import SampledSequence, SampleOutput, TopK


@dataclass(frozen=True)
class Generation:
    """One request, understood. `before`: for each prompt what its choices begin with, the prompt itself if echoed."""

    form: SharedParameters
    chosen: Chosen
    language: Language
    prompts: list[list[int]]
    question: Question
    shape: ChoiceFormat
    before: list[str]

    def text(self, prompt: int) -> Detokenizer:
        stops = self.question.params.stop_strings
        return Detokenizer(self.language.tokenizer, self.prompts[prompt], stops, len(self.before[prompt]))


async def answer(request: Request, task: Generation) -> Response:
    """The samples in the task's shape. A client that hangs up ends them. Raises KnapperError before the first token."""
    try:
        for prompt in task.prompts:  # said at once: what the samplers would say, once they have started
            ContextLengthExceeded.check(len(prompt), task.question.params.max_tokens, task.chosen.model.context)
        return await _answer(request, task)
    except KnapperError as error:
        error.field = _asked_as(task, error.field)
        raise


async def _answer(request: Request, task: Generation) -> Response:
    gateway, tenant = parts(request), tenant_of(request)
    head = {
        "id": f"{task.shape.id_prefix}-{gateway.new_id()}",
        "object": task.shape.chunk_object if task.form.stream else task.shape.whole_object,
        "created": int(gateway.clock()),
        "model": task.form.model,
    }
    if task.chosen.checkpoint is not None:
        await gateway.openai.note_reading(tenant, task.chosen.checkpoint)
    asked = PendingSamples(gateway, tenant, stream=bool(task.form.stream))
    await asked.ask(task.chosen, task.prompts, task.question)
    if not task.form.stream:
        try:
            answers = await while_connected(request, asked.answers())
        finally:
            asked.end()
        return Response(await asyncio.to_thread(_whole, head, task, answers), media_type="application/json")
    events = _events(head, task, asked)
    try:
        first = await while_connected(request, anext(events))
    except BaseException:
        asked.end()
        raise
    return _EventStream(first, events, asked.end)


def _asked_as(task: Generation, field: str | None) -> str | None:
    """What the client calls a field of a sample request."""
    return task.form.prompt_field if field == "prompt" else field and field.removeprefix("sampling_params.")


def _whole(head: Json, task: Generation, answers: list[bytes]) -> bytes:
    """The answer's JSON, choice by choice: each call of an encoder holds the interpreter's lock to its end."""
    choices: list[msgspec.Raw] = []
    sampled = 0
    for prompt, answer in enumerate(answers):
        output = proto.decode_sample_response(answer)
        scored = _scored_prompt(task, prompt, output)
        for number, sequence in enumerate(output.sequences):
            piece, ending = _told(task.text(prompt), sequence)
            piece = TextDelta(task.before[prompt] + piece.text, scored + piece.tokens)
            sampled += sequence.tokens.size
            choice = task.shape.whole(prompt * task.question.choices + number, piece, ending)
            choices.append(msgspec.Raw(msgspec.json.encode(choice)))
    return msgspec.json.encode(head | {"choices": choices, "usage": _usage(task, sampled)})


def _told(text: Detokenizer, sequence: SampledSequence) -> tuple[TextDelta, Ending]:
    """The whole text of a sequence, token by token as a stream would tell it."""
    ending: Ending = "stop" if sequence.stopped else "length"
    pieces = []
    for position, (token, logprob) in enumerate(zip(sequence.tokens.tolist(), sequence.logprobs.tolist(), strict=True)):
        last = position == sequence.tokens.size - 1
        alternatives = _alternatives(sequence.topk, position)
        pieces.append(text.add(TokenEvent(0, position, token, logprob, ending if last else "", alternatives)))
    return TextDelta(
        "".join(piece.text for piece in pieces), [scored for piece in pieces for scored in piece.tokens]
    ), ending


def _scored_prompt(task: Generation, prompt: int, output: SampleOutput) -> list[ScoredToken]:
    """The prompt's tokens, if their log-probabilities were asked for."""
    if output.prompt_logprobs is None:
        return []
    text, offset, scored = Detokenizer(task.language.tokenizer, [], ()), 0, []
    for at, (token, logprob) in enumerate(zip(task.prompts[prompt], output.prompt_logprobs.tolist(), strict=True)):
        alternatives = _alternatives(output.topk_prompt_logprobs, at)
        scored.append(ScoredToken(token, logprob if at else None, alternatives, offset))
        offset += len(text.add(TokenEvent(0, at, token, 0.0)).text)
    return scored


def _alternatives(topk: TopK | None, position: int) -> list[tuple[int, float]]:
    if topk is None:
        return []
    return list(zip(topk.tokens[position].tolist(), topk.logprobs[position].tolist(), strict=True))


async def _events(head: Json, task: Generation, asked: PendingSamples) -> AsyncIterator[bytes]:
    """Server-sent events. An error before the first is raised; a later one is the last event."""
    texts = [task.text(prompt) for prompt in range(len(task.prompts)) for _ in range(task.question.choices)]
    open_choices = set(range(len(texts)))
    sampled, begun = 0, False
    usage = {"usage": None} if task.form.usage_wanted else {}

    def event(choice: Json) -> bytes:
        return _data(head | {"choices": [choice]} | usage)

    try:
        async for heard in asked.drawn():
            if not begun:
                begun = True
                for index in range(len(texts)):
                    if (opening := task.shape.opening(index)) is not None:
                        yield event(opening)
            if isinstance(heard, Quiet):
                yield f": {heard.reason}\n\n".encode()
                continue
            prompt, drawn = heard
            index = prompt * task.question.choices + drawn.sequence
            sampled += 1
            piece = texts[index].add(drawn)
            if piece.text or drawn.ending:
                yield event(task.shape.chunk(index, piece, drawn.ending))
            if drawn.ending:
                open_choices.discard(index)
    except KnapperError as error:
        if not begun:
            raise
        error.field = _asked_as(task, error.field)
        yield _data(errors.body(error))
        return
    for index in sorted(open_choices):  # of which no token was asked
        if (opening := task.shape.opening(index)) is not None and not begun:
            yield event(opening)
        yield event(task.shape.chunk(index, TextDelta("", []), "length"))
    if task.form.usage_wanted:
        yield _data(head | {"choices": [], "usage": _usage(task, sampled)})
    yield b"data: [DONE]\n\n"


def _usage(task: Generation, sampled: int) -> dict[str, int]:
    """All sampled tokens count, those that stood for the end too."""
    given = sum(len(prompt) for prompt in task.prompts)
    return {"prompt_tokens": given, "completion_tokens": sampled, "total_tokens": given + sampled}


def _data(message: Any) -> bytes:
    return b"data: " + msgspec.json.encode(message) + b"\n\n"


class _EventStream(StreamingResponse):
    """The events, each at once; whatever ends the response, the client's leaving too, calls `end`."""

    def __init__(self, first: bytes, rest: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        async def events() -> AsyncIterator[bytes]:
            yield first
            async for event in rest:
                yield event

        # Proxies that collect an answer before they pass it on are asked not to.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events(), media_type="text/event-stream", headers=headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()
