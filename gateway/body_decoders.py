"""Decoders of large bodies, run in worker processes: each takes bytes and returns something compact.

Few imports on purpose: a worker loads this module and little else.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from knapper.errors import UserError
from knapper.state.journal.accept import PackedBody, pack
from knapper.wire import fingerprints, json_forward, proto, sample_requests, scan
from knapper.wire.fingerprints import PassContent
from knapper.wire.types import ForwardBackward

Address = tuple[str, int]  # (model_id, seq_id)
_NO_NUMBERS = re.compile(rb"(?<=[\[,:\s])-?(?:NaN|Infinity)(?=[\],}\s])")  # not JSON, but Python's encoder writes them


@dataclass(frozen=True)
class DecodedOperation:
    """A training operation as it is stored. `tokens`: the number in a forward pass."""

    model_id: str
    seq: int
    packed: PackedBody
    tokens: int = 0
    content: PassContent | None = None  # of a pass that differentiates
    optimizer: bool = False  # a load asks for the optimizer's state


@dataclass(frozen=True)
class RefusedRequest:
    """A request that cannot be served. `address`: the sequence number it uses up, if it states one."""

    error: UserError
    packed: PackedBody
    address: Address | None


DecodedRequest = DecodedOperation | RefusedRequest


# ---- forward and forward_backward


def protobuf_forward(body: bytes) -> DecodedRequest:
    """Checks the structure; the trainer checks the arrays."""
    try:
        model_id, seq, tokens = proto.check_forward_backward(body)
    except UserError as error:
        return RefusedRequest(error, pack(body), scan.peek(body))
    return DecodedOperation(model_id, seq, pack(body), tokens, _content(body))


def json_forward_backward(body: bytes) -> DecodedRequest:
    return _json_forward(body, json_forward.decode_forward_backward)


def json_forward_only(body: bytes) -> DecodedRequest:
    return _json_forward(body, json_forward.decode_forward)


def _json_forward(body: bytes, decode: Callable[[bytes], ForwardBackward]) -> DecodedRequest:
    """Converts the operation to protobuf, as it is stored; repetitions are recognised by the JSON bytes."""
    try:
        operation = decode(body)
    except UserError as error:
        return RefusedRequest(error, pack(body), address(body))
    encoded = proto.encode_forward_backward(operation)
    packed = replace(pack(encoded), asked_sha256=hashlib.sha256(body).digest())
    tokens = sum(datum.tokens.size for datum in operation.data)
    return DecodedOperation(operation.run, operation.seq, packed, tokens, _content(encoded))


def _content(body: bytes) -> PassContent | None:
    """Nothing of a body that the trainer will refuse anyway."""
    try:
        return fingerprints.of_pass(body)
    except UserError:
        return None


class _Addressed(msgspec.Struct):
    """The address of a request whose other fields may be wrong."""

    model_id: str
    seq_id: int


def address(body: bytes) -> Address | None:
    """The address of an invalid JSON request, if it has one. Decodes nothing else of it, however large it is."""
    try:
        addressed = msgspec.json.decode(_NO_NUMBERS.sub(b"null", body), type=_Addressed)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return (addressed.model_id, addressed.seq_id) if 1 <= addressed.seq_id <= 10**17 else None


# ---- samples


@dataclass(frozen=True)
class DecodedSample:
    """`call`: the body for the sample function. `max_tokens`: of each sample; None: as many as the model's context."""

    num_samples: int
    call: bytes
    prompt_tokens: int
    max_tokens: int | None

    def tokens_max(self, context: int) -> int:
        """The most tokens that the prompt, once, and all samples may have."""
        each = max(0, context - self.prompt_tokens)
        return self.prompt_tokens + self.num_samples * min(each, each if self.max_tokens is None else self.max_tokens)


def sample_call(body: bytes, base_model: str, bundle: str, seed: int) -> DecodedSample:
    """Raises UserError."""
    sample = sample_requests.decode(body, sample_requests.AsampleBody)
    call = sample.call(base_model, bundle, seed)
    return DecodedSample(sample.num_samples, sample_requests.encode(call), len(call.prompt), call.params.max_tokens)


# ---- responses, for clients that read no protobuf


def forward_json(body: bytes) -> bytes:
    return json_forward.encode_forward_backward_output(proto.decode_forward_backward_output(body))


def sample_json(body: bytes) -> bytes:
    return json_forward.encode_sample_response(proto.decode_sample_response(body))
