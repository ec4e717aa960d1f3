"""HTTP connections with bounds, which hold before any key is read.

    uvicorn --http knapper.web.connections:Protocol --ws none ...

uvicorn bounds neither headers nor how long a client may take. Here every connection has bounds on the bytes and the
number of its headers, and deadlines for them and for bodies; the number of connections is limited. knapper.limits has
all limits. A client over one gets an error if it can still read it, and its connection is closed.
"""

import asyncio
import json
import resource
from collections.abc import MutableMapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle
from uvicorn.server import ServerState

from knapper import limits
from knapper.errors import HeadersTooLarge, KnapperError, TooSlow, Unavailable, UserError
from knapper.web.sockets import readable
from knapper.web.targets import Targeted

_LOOK_S = 1.0
_LAST_S = 1.0  # for a request that is on its way when shutdown begins
_FILES_SHARE = 0.75  # of the file descriptors of this process; the others are for its own requests

Protocols = dict["Protocol", None]  # in order
_idle: MutableMapping[ServerState, Protocols] = WeakKeyDictionary()  # connections without a whole request head


class Protocol(Targeted):
    """One connection. Its request is awaited (`head`), comes (`body`), or is all here (`whole`)."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._others = _idle.setdefault(server_state, {})
        self._phase: Literal["head", "body", "whole"] = "head"
        self._began = 0.0  # loop time at which the phase began; in a body, since when `_received` counts
        self._received = 0  # bytes of the body
        self._discarded = 0  # bytes of a body that arrived after its response
        self._unparsed = 0  # bytes that the parser has buffered since its last callback
        self._head_bytes = self._head_fields = 0
        self._chunks: list[bytes] = []  # of a body, from one read: HTTP chunks may be a byte each
        self._unsent = 0, 0.0  # (unsent bytes of responses, since when that many)
        self._refusal: KnapperError | None = None
        self._last = False  # the next response is the last one
        self._watch: asyncio.TimerHandle | None = None

    # ---- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._await_head()
        self._watch = self.loop.call_later(_LOOK_S, self._look)
        if len(self.connections) > _connections_max():
            oldest = next(iter(self._others))
            if oldest is self:
                self._refuse(
                    Unavailable(f"{len(self.connections)} connections are open, the most that this server has")
                )
            else:
                oldest._close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._others.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        if self._phase == "whole":
            self._await_head()
        self._unparsed += len(data)
        super().data_received(data)
        self._pass_on_body()
        if self._unparsed > 2 * limits.head_bytes_max and self._refusal is None:  # separators included
            self._refuse(_too_large(f"the request's headers are over {limits.head_bytes_max} bytes"))

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when its parser refuses the request, or a callback below raised."""
        self._refuse(self._refusal or UserError(msg))

    # ---- the parser's callbacks

    def on_message_begin(self) -> None:
        self._await_head()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url), fields=0)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value), fields=1)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= limits.pipelined_max:
            self._fail(UserError(f"over {limits.pipelined_max} requests came before their answers; send one at a time"))
        self._unparsed = 0
        self._phase, self._began, self._received, self._discarded = "body", self.loop.time(), 0, 0
        self._others.pop(self, None)
        super().on_headers_complete()
        self.cycle.keep_alive = self.cycle.keep_alive and not self._last

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        self._received += len(body)
        if not self.cycle.response_complete:
            self._chunks.append(body)
            return
        self._discarded += len(body)
        if self._discarded > limits.body_discarded_bytes_max:
            self._close()

    def on_message_complete(self) -> None:
        self._unparsed = 0
        self._pass_on_body()
        self._phase = "whole"
        super().on_message_complete()
        if self.cycle.response_complete:
            self._await_next()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._phase == "whole":
            self._await_next()
        else:
            self._began = self.loop.time()  # from here on the rest of the body is discarded

    def _pass_on_body(self) -> None:
        if self._chunks:
            body, self._chunks = b"".join(self._chunks), []
            super().on_body(body)

    def _count_head(self, size: int, fields: int) -> None:
        self._head_bytes += size
        self._head_fields += fields
        if self._head_bytes > limits.head_bytes_max:
            self._fail(_too_large(f"the request's headers are over {limits.head_bytes_max} bytes"))
        if self._head_fields > limits.head_fields_max:
            self._fail(_too_large(f"the request has over {limits.head_fields_max} headers"))

    def _fail(self, error: KnapperError) -> None:
        """Leave the parser, which calls `send_400_response`."""
        self._refusal = error
        raise error

    # ---- time

    def _await_head(self) -> None:
        self._phase, self._began = "head", self.loop.time()
        self._head_bytes = self._head_fields = 0
        self._await_next()

    def _await_next(self) -> None:
        """Become the last of the connections to be closed if there are too many."""
        self._others.pop(self, None)
        self._others[self] = None

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        self._watch = self.loop.call_later(_LOOK_S, self._look)
        now = self.loop.time()
        if self._stalled(now):
            self.transport.abort()
        elif self._phase == "body":
            self._look_at_body(now)
        elif self._answering:
            if self._phase == "head":  # some clients send an extra empty line after a body
                self._began = now
        elif self._phase == "head" and now - self._began > limits.head_s:
            self._refuse(TooSlow(f"the request's headers did not come within {limits.head_s:g} s; send it again"))

    @property
    def _answering(self) -> bool:
        """Whether a request has arrived, and its response is not sent yet."""
        return self._phase != "body" and self._unanswered is not None

    @property
    def _unanswered(self) -> RequestResponseCycle | None:
        """The newest request, until its response is sent."""
        newest: RequestResponseCycle | None = self.cycle  # None before the first, despite its type
        return None if newest is None or newest.response_complete else newest

    def _look_at_body(self, now: float) -> None:
        if self.cycle.response_complete:
            if now - self._began > limits.body_discarded_s:
                self._close()
        elif self.flow.read_paused:  # this server is slow, not the client
            self._began, self._received = now, 0
        elif now - self._began > limits.body_stalled_s:
            if self._received < limits.body_rate_min * limits.body_stalled_s:
                self._refuse(
                    TooSlow(
                        f"the request's body came slower than {limits.body_rate_min} bytes a second for "
                        f"{limits.body_stalled_s:g} s; send it again, over a faster connection"
                    )
                )
            self._began, self._received = now, 0

    def _stalled(self, now: float) -> bool:
        """Whether a client has read nothing of its response for too long."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent != self._unsent[0]:
            self._unsent = unsent, now
        return now - self._unsent[1] > limits.answer_stalled_s

    # ---- the end

    def shutdown(self) -> None:
        """Called by uvicorn at shutdown: requests sent before it are answered, then the connection is closed."""
        self._last = True
        if self.transport.is_closing():
            return
        if self._phase != "body" and self._unanswered is None and self._expects_request():
            self.loop.call_later(_LAST_S, self._leave)
        else:
            super().shutdown()

    def _expects_request(self) -> bool:
        """Whether a request is on its way: the first of its connection, or one that has begun to arrive."""
        first: RequestResponseCycle | None = self.cycle  # None before the first, despite its type
        return first is None or self._unparsed > 0 or readable(self.transport.get_extra_info("socket").fileno())

    def _leave(self) -> None:
        if self._phase != "body" and self._unanswered is None:
            self.transport.close()

    def _refuse(self, error: KnapperError) -> None:
        """Send the error, unless a response is partly sent, and close the connection."""
        self._refusal = error
        if not self.transport.is_closing():
            if not self._answering and (self._phase == "head" or not self.cycle.response_started):
                self.transport.write(encode_error(error))
            self._close()

    def _close(self) -> None:
        if (cycle := self._unanswered) is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()


def encode_error(error: KnapperError) -> bytes:
    """The error as a whole HTTP response that closes the connection."""
    content = json.dumps(error.as_json()).encode()
    retry = b"retry-after: %d\r\n" % max(1, round(error.retry_after_s)) if isinstance(error, Unavailable) else b""
    length = b"content-length: %d\r\nconnection: close\r\n\r\n" % len(content)
    status = 400 if type(error) is UserError else error.status  # not valid HTTP
    return STATUS_LINE[status] + b"content-type: application/json\r\n" + retry + length + content


def _too_large(what: str) -> HeadersTooLarge:
    allowed = f"{limits.head_fields_max} headers and {limits.head_bytes_max} bytes, with the URL"
    return HeadersTooLarge(f"{what}; allowed: {allowed}; send long values in the body")


def _connections_max() -> int:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limits.connections_max if files < 0 else min(limits.connections_max, int(files * _FILES_SHARE))
