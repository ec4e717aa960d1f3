"""One answer of the assistant, for protocols in which it is a list of blocks: texts and calls of tools."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from starlette.requests import Request

from gateway.openai.capture import Capture
from gateway.openai.chats import PreparedChat
from gateway.openai.detokenizer import Detokenizer
from gateway.openai.samples import KeepAlive, PendingSamples
from gateway.services import services_of
from gateway.tenants import tenant_of
from knapper.catalogue.call_reader import Piece
from knapper.errors import ContextLengthExceeded, KnapperError
from knapper.web.requests import while_connected
from knapper.wire import proto
from knapper.wire.progress import Ending, TokenEvent


@dataclass(frozen=True)
class TurnEnd:
    """`tokens`: all that were sampled, one that ended the text included. `stop`: the client's text that ended it."""

    ending: Ending
    tokens: int
    calls: int = 0
    stop: str | None = None


class AssistantTurn:
    """Makes pieces of the tokens of one sequence."""

    def __init__(self, ready: PreparedChat) -> None:
        calling, params = ready.calling, ready.options.params
        self._detokenizer = Detokenizer(
            calling.language.tokenizer, ready.prompt, params.stop_strings, shown=calling.special_tokens
        )
        self._reader, self._own_stops = calling.reader(), calling.stops
        self._tokens = 0

    def add(self, drawn: TokenEvent) -> list[Piece | TurnEnd]:
        """What can be said after this token; the end after the last."""
        self._tokens += 1
        delta = self._detokenizer.add(drawn)
        pieces: list[Piece | TurnEnd] = []
        if self._reader is None:
            pieces += [delta.text] if delta.text else []
        else:
            pieces += self._reader.add(delta.text) + (self._reader.end() if drawn.ending else [])
        return [*pieces, self._end(drawn.ending)] if drawn.ending else pieces

    def _end(self, ending: Ending) -> TurnEnd:
        stop = self._detokenizer.stopped_by
        calls = 0 if self._reader is None else self._reader.calls
        return TurnEnd(ending, self._tokens, calls, None if stop in self._own_stops else stop)


async def submit(request: Request, ready: PreparedChat, *, stream: bool) -> PendingSamples:
    """Raises KnapperError."""
    gateway, tenant = services_of(request), tenant_of(request)
    ContextLengthExceeded.check(len(ready.prompt), ready.options.params.max_tokens, ready.model.record.context)
    if ready.model.checkpoint is not None:
        await gateway.openai.note_reading(tenant, ready.model.checkpoint)
    samples = PendingSamples(gateway, tenant, stream=stream, capture=Capture.asked(request))
    await samples.submit(ready.model, [ready.prompt], ready.options)
    return samples


async def whole(request: Request, ready: PreparedChat) -> list[Piece | TurnEnd]:
    """All pieces, the last of which is the end. A client that hangs up cancels the sample. Raises KnapperError."""
    samples = await submit(request, ready, stream=False)
    try:
        (response,) = await while_connected(request, samples.responses())
    finally:
        samples.cancel()
    return await asyncio.to_thread(_pieces, response, AssistantTurn(ready))


def _pieces(response: bytes, turn: AssistantTurn) -> list[Piece | TurnEnd]:
    (sequence,) = proto.decode_sample_response(response).sequences
    ending: Ending = "stop" if sequence.stopped else "length"
    pieces: list[Piece | TurnEnd] = []
    last = sequence.tokens.size - 1
    for position, token in enumerate(sequence.tokens.tolist()):
        pieces += turn.add(TokenEvent(0, position, token, 0.0, ending if position == last else ""))
    return joined(pieces)


def joined(pieces: list[Piece | TurnEnd]) -> list[Piece | TurnEnd]:
    """With neighbouring texts as one."""
    blocks: list[Piece | TurnEnd] = []
    for piece in pieces:
        before = blocks[-1] if blocks else None
        if isinstance(piece, str) and isinstance(before, str):
            blocks[-1] = before + piece
        else:
            blocks.append(piece)
    return blocks


async def streamed(
    samples: PendingSamples,
    turn: AssistantTurn,
    failed: Callable[[KnapperError], bytes],
    write: Callable[[object], list[bytes]],
) -> AsyncIterator[bytes]:
    """Events as `write` makes them of pieces, of the end, and of a KeepAlive.

    An error before the first token is raised; of a later one `failed` makes the last event.
    """
    begun = False
    try:
        async for token in samples.tokens():
            for piece in [token] if isinstance(token, KeepAlive) else turn.add(token[1]):
                for event in write(piece):
                    begun = True
                    yield event
    except KnapperError as error:
        if not begun:
            raise
        yield failed(error)
