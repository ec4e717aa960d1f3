"""Bytes that no parser of ours can take are their sender's fault, whatever a parser raises on them: never a defect."""

import base64
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import yaml

from gateway import body_decoders
from knapper.catalogue.chat_templates import Template
from knapper.errors import KnapperError, UserError
from knapper.events import cloudevents
from knapper.jobs import datasets
from knapper.jobs import spec as jobs
from knapper.jobs.yaml_document import JobError
from knapper.rewards import spec as rewards
from knapper.state.tokens import AccessTokens
from knapper.wire import json as wire
from knapper.wire import proto
from knapper.wire.requests import CreateSession
from knapper.wire.untrusted import parsing

DEEP = "[" * 50_000
ODD: list[bytes] = [
    b"", b"\0", b"\xff\xfe", DEEP.encode(), b'{"a":' * 50_000, b"[" * 900 + b"]" * 900, b"1" * 5000, b"1" + b"0" * 400,
    b"1e400", b'"\\ud800"', b'{"\\ud800": 1}', b'{"\\ud800": NaN}', b"NaN", b"[NaN" * 900,
    b"\x80\x81", "\u202e\u2028".encode(),
    b"{}" * 10, b"\xef\xbb\xbf{}",
]  # fmt: skip
STRUCTURED = {"content-type": "application/cloudevents+json"}
BINARY = {"ce-specversion": "1.0", "ce-type": "t", "ce-source": "s", "ce-id": "1", "content-type": "application/json"}
EVENT = {"specversion": "1.0", "type": "t", "source": "s", "id": "1"}


def token(header: bytes, claims: bytes = b"{}") -> str:
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (header, claims, b"x" * 32))


BORDERS: dict[str, Callable[[bytes], object]] = {
    "an event in structured mode": lambda odd: cloudevents.decode(STRUCTURED, odd),
    "an event's data": lambda odd: cloudevents.decode(
        STRUCTURED, json.dumps(EVENT).encode()[:-1] + b', "data": %s}' % odd
    ),
    "an event in binary mode": lambda odd: cloudevents.decode(BINARY, odd),
    "an event for the broker": lambda odd: cloudevents.as_binary(STRUCTURED, odd),
    "a request": lambda odd: wire.decode(odd, CreateSession),
    "a request in protobuf": lambda odd: proto.decode_forward_backward(odd),
    "job.yaml": jobs.parse,
    "a value of job.yaml": lambda odd: jobs.parse(b"kind: rl\ndata: " + odd),
    "a reward in job.yaml": lambda odd: jobs.parse(b"kind: rl\ndata: d\nreward: {name: length, max: " + odd + b"}"),
    "a pattern": lambda odd: rewards.parse({"name": "regex", "pattern": odd.decode("latin-1")[:1000]}, {}),
    "a schema": lambda odd: rewards.parse({"name": "json_schema", "json_schema": "s"}, {"s": odd}),
    "rows": lambda odd: datasets.rl("d", odd),
    "a token's header": lambda odd: AccessTokens(lambda: 0.0, b"s" * 32).claims(token(odd)),
    "a token": lambda odd: AccessTokens(lambda: 0.0, b"s" * 32).claims("eyJ" + odd.decode("latin-1")),
    "a chat template": lambda odd: Template(odd.decode("latin-1") + "{{ " + "(" * 5000, {}),
    "messages": lambda odd: Template("{{ messages[0].content | int + messages }}", {}).render(
        [{"content": odd.decode("latin-1")}], 0.0, {}
    ),
}  # fmt: skip


@pytest.mark.parametrize("border", BORDERS.values(), ids=BORDERS.keys())
def test_odd_bytes_are_their_senders_fault(border: Callable[[bytes], object]) -> None:
    refused = []
    for odd in ODD:
        try:
            border(odd)
        except UserError as error:
            refused.append(error)
    assert refused
    assert all(error.status < 500 for error in refused)
    msgspec.json.encode([(str(error), error.field) for error in refused])  # they can be answered, and logged


@pytest.mark.parametrize("seq", [0, 2**31, 2**53 + 1, 10**17, 10**400])
def test_a_number_that_protobuf_cannot_hold_is_its_senders_fault(seq: int) -> None:
    datum = {"model_input": {"chunks": [{"tokens": [1, 2]}]}, "loss_fn_inputs": {}}
    forward = {"data": [datum], "loss_fn": "cross_entropy"}
    body = json.dumps({"model_id": "ses-1:train:0", "seq_id": seq, "forward_input": forward}).encode()
    refused = body_decoders.json_forward_only(body)
    assert isinstance(refused, body_decoders.RefusedRequest)
    assert "seq_id" in str(refused.error)


@pytest.mark.parametrize(
    "text",
    [
        'kind: rl\ndata: "\\uD800"', 'kind: rl\n"\\uD800": 1', 'kind: rl\ndata: "\\UFFFFFFFF"',
        "kind: rl\ndata: !!bool maybe",
        "kind: rl\ndata: !!int ''", "kind: rl\ndata: !!float ''", f"kind: rl\nsteps: {'1' * 5000}",
        f"kind: rl\nsteps: {'1' * 400}",
        "kind: rl\ndata: !!null x", f'kind: rl\n"[{"1" * 5000}]": 1',
        f"kind: rl\ndata: d\nreward: {{name: length, max: {'1' * 400}}}",
    ],
)  # fmt: skip
def test_yaml_that_reads_as_nothing_is_said_with_its_line(text: str) -> None:
    with pytest.raises(JobError) as error:
        jobs.parse(text.encode())
    assert error.value.line in (1, 2, 3)
    msgspec.json.encode(error.value.report())


@pytest.mark.parametrize("name", ["subject", "type", "source", "id", "knativeanything"])
@pytest.mark.parametrize("value", ["a\r\nb: c", "\ud800", "\x1b[31m", "\0", "x" * 1025, ["a"], {"a": 1}, None, 1.5])
def test_an_attribute_that_no_header_can_carry_is_refused(name: str, value: Any) -> None:
    if (name, value) == ("subject", None):
        return  # it has none
    body = json.dumps({**EVENT, name: value}).encode()
    with pytest.raises(UserError):
        cloudevents.as_binary(STRUCTURED, body)
    if name != "knativeanything":  # which is not read
        with pytest.raises(UserError):
            cloudevents.decode(STRUCTURED, body)


@pytest.mark.parametrize("name", ["a\r\nb", "é", "A B", "", "x" * 65])
def test_the_name_of_an_attribute_is_one(name: str) -> None:
    with pytest.raises(UserError):
        cloudevents.as_binary(STRUCTURED, json.dumps({**EVENT, name: "x"}).encode())


def test_what_is_the_machines_fault_stays_so() -> None:
    for error in (MemoryError("none left"), KeyboardInterrupt(), SystemExit(0)):
        with pytest.raises(type(error)), parsing(lambda _: UserError("theirs")):
            raise error
    with pytest.raises(KnapperError, match="ours"), parsing(lambda _: UserError("theirs")):
        raise KnapperError("ours")
    for theirs in (RecursionError(), UnicodeError(), OverflowError(), yaml.YAMLError(), KeyError(1)):
        with pytest.raises(UserError, match="theirs"), parsing(lambda _: UserError("theirs")):
            raise theirs
