"""The worst bodies that a route takes: as large as its limit, of what is most work for its size.

`GENERIC` go to every route. `LEGAL` are those that its handler reads to the end: a new route with a body fails without.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from knapper import limits
from knapper.wire import descriptor

JSON, PROTOBUF = "application/json", "application/x-protobuf"


@dataclass(frozen=True)
class Objects:
    """What the bodies name: made on the server before, so that they are not refused for a name."""

    session: str
    run: str
    sampler: str
    model: str
    checkpoint: str

    def path(self, door: str) -> str:
        """`door`, the path of a route, with these in the places of its parameters."""
        return door.replace(":path", "").format(**self.in_path())

    def in_path(self) -> dict[str, str]:
        return {
            "session_id": self.session, "run_id": self.run, "sampler_id": self.sampler, "kind": "weights",
            "name": "worst", "job": "worst", "token": "x", "path": "x", "file": "x",
            "sha256": "0" * 64, "size": str(limits.upload_part_bytes), "offset": "0",
            "round": "steps", "n": "0", "part": "0", "sample": "0", "seq": "1", "datum": "0", "episode": "worst",
        }  # fmt: skip


@dataclass(frozen=True)
class Worst:
    """`make`: the body, at most so many bytes long."""

    name: str
    make: Callable[[int], bytes]
    content_type: str = JSON


def filled(head: str, unit: str, tail: str, between: str = ",") -> Callable[[int], bytes]:
    """As many units as fit."""

    def make(size: int) -> bytes:
        count = max(1, (size - len(head.encode()) - len(tail.encode())) // len((unit + between).encode()))
        body = head + between.join([unit] * count) + tail
        return body.encode()

    return make


_TOOL = '{"type": "function", "function": {"name": "a", "parameters": {"anyOf": []}}}'


def _keys(size: int) -> bytes:
    """An object of different names."""
    count = (size - 20) // len('"0000000":0,')
    return b'{"a":{' + b",".join(b'"%07x":0' % n for n in range(count)) + b"}}"


def _nested(size: int) -> bytes:
    return b'{"a":' + b"[" * ((size - 10) // 2) + b"]" * ((size - 10) // 2) + b"}"


GENERIC = [
    Worst("empty lists", filled('{"a":[', "[]", "]}")),
    Worst("small numbers", filled('{"a":[', "1", "]}")),
    Worst("fractions", filled('{"a":[', "1e1", "]}")),
    Worst("NaN, which JSON has not", filled('{"a":[', "NaN", "]}")),
    Worst("the deepest nesting", _nested),
    Worst("the most names", _keys),
    Worst("one text of escapes", filled('{"a":"', "\\u0041", '"}', between="")),
    Worst("zeros", bytes),
]


def _of(
    fields: dict[str, Any], name: str, unit: str, opening: str = "[", closing: str = "]", between: str = ","
) -> Worst:
    """Those fields, and one more that has all the rest."""
    head = json.dumps(fields)[:-1] + (", " if fields else "") + f'"{name}": {opening}'
    return Worst(f"{name} of {unit}", filled(head, unit, closing + "}", between))


_FORM = "application/x-www-form-urlencoded"
_FORMS = [
    Worst("the most fields", filled("", "a=1", "", "&"), _FORM),
    Worst("escapes", filled("a=", "%C3", "", ""), _FORM),
]


def _text(fields: dict[str, Any], name: str, unit: str) -> Worst:
    return _of(fields, name, unit, '"', '"', between="")


def _forward(objects: Objects, name: str, seq: int) -> Iterator[Worst]:
    head = f'{{"model_id": "{objects.run}", "seq_id": {seq}, "{name}": {{"loss_fn": "cross_entropy", "data": ['
    tensor = '{"loss_fn_inputs": {"weights": {"dtype": "float32", "data": ['
    rest = ']}}, "model_input": {"chunks": [{"tokens": [1]}]}}]}}'
    yield Worst("one array of fractions", filled(head + tensor, "1e1", rest))
    yield Worst("one array of numbers", filled(head + tensor, "1", rest))
    chunks = '{"loss_fn_inputs": {}, "model_input": {"chunks": ['
    yield Worst("empty chunks", filled(head + chunks, "{}", "]}}]}}"))
    yield Worst("the most datums", filled(head, '{"loss_fn_inputs": {}, "model_input": {"chunks": []}}', "]}}"))
    yield Worst("a wrong value at the end", filled(head + tensor, "1", ', "x"' + rest))


def _protobuf(objects: Objects) -> Iterator[Worst]:
    def whole(size: int) -> bytes:
        message = descriptor.ForwardBackwardRequest(model_id=objects.run, seq_id=900, loss_fn="cross_entropy")
        message.data.add().model_input.add().encoded_text.tokens = bytes((size - 200) // 4 * 4)
        return bytes(message.SerializeToString())

    def chunks(size: int) -> bytes:
        message = descriptor.ForwardBackwardRequest(model_id=objects.run, seq_id=901, loss_fn="cross_entropy")
        tokens = bytes(min((size - 70_000) // 260_000 - 9, 200) // 4 * 4)
        for _ in range(4000):
            datum = message.data.add()
            for _ in range(65):
                datum.model_input.add().encoded_text.tokens = tokens
        return bytes(message.SerializeToString())

    yield Worst("one chunk", whole, PROTOBUF)
    yield Worst("the most chunks", chunks, PROTOBUF)
    yield Worst("no protobuf", bytes, PROTOBUF)


def _chunks(objects: Objects, seq: int) -> str:
    body = {"sampling_session_id": objects.sampler, "seq_id": seq, "sampling_params": {"max_tokens": 1}}
    return json.dumps(body)[:-1] + ', "prompt": {"chunks": ['


def _targets(objects: Objects, seq: int) -> str:
    tensor = '{"dtype": "int64", "shape": [1, 1], "data": ['
    return _chunks(objects, seq) + '{"tokens": [1, 2]}]}, "target_prompt_logprobs": ' + tensor


def legal(objects: Objects) -> dict[str, list[Worst]]:
    """By path, of POST and PUT alike."""
    run, seq = {"model_id": objects.run}, {"model_id": objects.run, "seq_id": 700}
    prompt = {"model": objects.model, "max_tokens": 1}
    rollouts = {"reward": {"name": "exact_match"}}
    job = json.dumps({"files": {"job.yaml": "kind: sft\ndata: d.jsonl\nsteps: 1\n"}})[:-2]
    saved = {**seq, "path": "a"}
    metadata = ("user_metadata", "[]", '{"a": [', "]}")
    answered = json.dumps(rollouts)[:-1] + ', "rollouts": [{"id": "a", "completion": "b", "answer": ['
    prefix = json.dumps(prompt)[:-1] + ', "messages": [{"role": "user", "content":'
    response_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"anyOf": 0}}}
    schema = json.dumps(prompt | {"messages": [{"role": "user", "content": "a"}], "response_format": response_format})
    messages = [
        _of(prompt, "messages", '{"role": "user", "content": "a"}'),
        Worst("one long message", filled(f'{prefix} "', "hello, world! ", '"}]}', between="")),
        _of({**prompt, "messages": [{"role": "user", "content": "a"}]}, "tools", '{"name": "a", "input_schema": {}}'),
    ]
    bodies = {
        "/api/v1/auth/token": [_of({}, "a", "[]")],
        "/api/v1/client/config": [_text({}, "sdk_version", "x")],
        "/api/v1/client/dynamic_config": [_text({}, "sdk_version", "x")],
        "/api/v1/create_session": [
            _of({}, "tags", '"a"'),
            _of({}, *metadata),
            _of({}, "tags", "[]"),
        ],
        "/api/v1/session_heartbeat": [_text({}, "session_id", "x")],
        "/api/v1/sessions/{session_id}/finish": [_text({"reason": {"type": "errored"}}, "detail", "\\u0041")],
        "/api/v1/telemetry": [_of({"session_id": objects.session}, "events", "1")],
        "/api/v1/create_model": [
            _of({"session_id": objects.session, "model_seq_id": 9, "base_model": objects.model}, *metadata)
        ],
        "/api/v1/get_info": [_text({}, "model_id", "x")],
        "/api/v1/forward": list(_forward(objects, "forward_input", 800)),
        "/api/v1/forward_backward": [*_forward(objects, "forward_backward_input", 801), *_protobuf(objects)],
        "/api/v1/optim_step": [_of(seq, "optimizer_params", "{}", '{"a": [', "]}")],
        "/api/v1/save_weights": [_of(saved, "user_metadata", '"a": ""', "{", "}")],
        "/api/v1/save_weights_for_sampler": [_of(saved, "user_metadata", '"a": ""', "{", "}")],
        "/api/v1/save_weights_external": [_of(saved, "age_encryption_recipients", '""')],
        "/api/v1/load_weights": [_of({"path": objects.checkpoint, "optimizer": False}, *metadata)],
        "/api/v1/create_custom_loss": [_of(run, "a", "[]")],
        "/api/v1/retrieve_future": [_text({}, "request_id", "x")],
        "/api/v1/retrieve_futures": [
            _of({"target": {"sampling_session_id": objects.sampler}, "timeout": 0}, "retrieved_request_ids", '"a"')
        ],
        "/api/v1/cancel_future": [_text({}, "request_id", "x")],
        "/api/v1/create_sampling_session": [
            _text({"session_id": objects.session, "sampling_session_seq_id": 1}, "base_model", "x")
        ],
        "/api/v1/join_sampling_session": [_text({}, "sampling_session_id", "x")],
        "/api/v1/asample": [
            Worst("tokens", filled(_chunks(objects, 5) + '{"tokens": [', "1", "]}]}}")),
            Worst("empty chunks", filled(_chunks(objects, 6), "{}", "]}}")),
            Worst("targets", filled(_targets(objects, 7), "1", "]}}")),
            Worst("wrong targets", filled(_targets(objects, 8), "1e1", "]}}")),
        ],
        "/api/v1/rewards": [
            _of(rollouts, "rollouts", "{}"),
            _of({**rollouts, "rollouts": [{"id": "a", "completion": "b"}]}, "files", '"a": ""', "{", "}"),
            Worst("answers of lists", filled(answered, "[]", "]}]}")),
            Worst("a reward of lists", filled('{"rollouts": [], "reward": [', "[]", "]}")),
        ],
        "/api/v1/jobs": [
            Worst("one file", filled(job + ', "d.jsonl": "', "\\u0041", '"}}', between="")),
            Worst("the most files", filled('{"files": {', '"a": ""', "}}")),
        ],
        "/api/v1/uploads/{sha256}/{size}/{offset}": [Worst("zeros", bytes, "application/octet-stream")],
        "/events": [_of({}, "a", "[]")],
        "/events/dead": [_of({}, "a", "[]")],
        "/api/v1/captures/{episode:path}/score": [_of({}, "score", "1")],
        "/api/v1/weights_info": [_text({}, "tinker_path", "x")],
        "/api/v1/copy_weights": [_text({"source_path": objects.checkpoint}, "destination_project_id", "x")],
        "/api/v1/checkpoints/search": [_of({}, "base_models", '"a"'), _of({}, "user_metadata", '"a": "b"', "{", "}")],
        "/api/v1/sessions/search": [_of({}, "project_ids", '"a"'), _of({}, "user_metadata", '"a": "b"', "{", "}")],
        "/api/v1/sessions/{session_id}/project": [_text({}, "project_id", "x")],
        "/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl": [_of({}, "ttl_seconds", "1")],
        "/v1/completions": [
            _of(prompt, "prompt", "1"),
            _of(prompt, "prompt", "[1]"),
            _text(prompt, "prompt", "a "),
            _text(prompt, "prompt", "a"),
            _text(prompt, "prompt", "the quick brown fox, jumps; "),
            _text({**prompt, "echo": True}, "prompt", "\\u00e9"),
            _of({**prompt, "prompt": "a"}, "metadata", "[]"),
        ],
        "/v1/chat/completions": [
            _of(prompt, "messages", '{"role": "user", "content": "a"}'),
            _text(prompt, "messages", "x"),
            Worst("one long message", filled(f'{prefix} "', "hello, world! ", '"}]}', between="")),
            Worst("parts", filled(f"{prefix} [", '{"type": "text"}', "]}]}")),
            _of({**prompt, "messages": [{"role": "user", "content": "a"}]}, "tools", "{}"),
            _of({**prompt, "messages": [{"role": "user", "content": "a"}]}, "tools", _TOOL),
            Worst("a schema", filled(f"{schema[:-5]}[", "{}", "]}}}}")),
        ],
        "/v1/responses": [
            _of({"model": objects.model, "max_output_tokens": 1}, "input", '{"role": "user", "content": "a"}'),
            _text({"model": objects.model, "max_output_tokens": 1}, "input", "hello, world! "),
        ],
        "/v1/messages": messages,
        "/v1/messages/count_tokens": messages,
        "/playground/chat": [_of(prompt, "messages", '{"role": "user", "content": "a"}')],
        **dict.fromkeys(("/signin", "/signout", "/admin/keys", "/admin/keys/revoke"), _FORMS),
    }
    texts = {path: bodies[path] for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses")}
    return bodies | {f"/oai/api{path}": worst for path, worst in texts.items()}
