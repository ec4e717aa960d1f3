"""From a large body to what is kept of it: what workers do. Everything here takes bytes, and returns little more.

Light on purpose: a worker imports this and no more.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from knapper.errors import UserError
from knapper.state.journal.accept import PackedBody, pack
from knapper.wire import json_forward, proto, sample_requests, scan
from knapper.wire.types import ForwardBackward

Address = tuple[str, int]  # (model_id, seq_id)
_NO_NUMBERS = re.compile(rb"(?<=[\[,:\s])-?(?:NaN|Infinity)(?=[\],}\s])")  # that JSON has not, and Python's writes


@dataclass(frozen=True)
class DecodedOperation:
    """A training operation as it is stored. `tokens`: of a forward pass."""

    model_id: str
    seq: int
    packed: PackedBody
    tokens: int = 0


@dataclass(frozen=True)
class RefusedRequest:
    """A request that cannot be served; with an address, the number that it used up."""

    error: UserError
    packed: PackedBody
    address: Address | None


Understood = DecodedOperation | RefusedRequest


# ---- forward and forward_backward


def protobuf_forward(body: bytes) -> Understood:
    """Parsed, without unknown fields; its arrays the trainer judges."""
    try:
        model_id, seq, tokens = proto.check_forward_backward(body)
    except UserError as error:
        return RefusedRequest(error, pack(body), scan.peek(body))
    return DecodedOperation(model_id, seq, pack(body), tokens)


def json_forward_backward(body: bytes) -> Understood:
    return _json_forward(body, json_forward.decode_forward_backward)


def json_forward_only(body: bytes) -> Understood:
    return _json_forward(body, json_forward.decode_forward)


def _json_forward(body: bytes, decode: Callable[[bytes], ForwardBackward]) -> Understood:
    """The same operation as in protobuf, and stored as that; repetitions are told by the bytes that came."""
    try:
        asked = decode(body)
    except UserError as error:
        return RefusedRequest(error, pack(body), address(body))
    packed = replace(pack(proto.encode_forward_backward(asked)), asked_sha256=hashlib.sha256(body).digest())
    return DecodedOperation(asked.run, asked.seq, packed, sum(datum.tokens.size for datum in asked.data))


class _Addressed(msgspec.Struct):
    """What is read of a request that may be wrong otherwise."""

    model_id: str
    seq_id: int


def address(body: bytes) -> Address | None:
    """Whose a wrong JSON request is, if it says so. Nothing else of it is built, however large it is."""
    try:
        sent = msgspec.json.decode(_NO_NUMBERS.sub(b"null", body), type=_Addressed)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return (sent.model_id, sent.seq_id) if 1 <= sent.seq_id <= 10**17 else None


# ---- samples


def sample_call(body: bytes, base_model: str, bundle: str, seed: int) -> tuple[int, bytes]:
    """(num_samples, what to ask of the sample function). Raises UserError."""
    asked = sample_requests.decode(body, sample_requests.AsampleBody)
    return asked.num_samples, sample_requests.encode(asked.call(base_model, bundle, seed))


# ---- answers, for those who read no protobuf


def forward_json(body: bytes) -> bytes:
    return json_forward.encode_forward_backward_output(proto.decode_forward_backward_output(body))


def sample_json(body: bytes) -> bytes:
    return json_forward.encode_sample_response(proto.decode_sample_response(body))
