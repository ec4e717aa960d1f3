"""The OpenAI protocol over an upstream that does what each test needs of it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gateway.openai import samples
from knapper import limits
from knapper.ids import LOCAL_TENANT
from knapper.state.checkpoints import Checkpoint, Checkpoints
from knapper.wire import progress, proto
from knapper.wire.progress import Ending, FailedEvent, FinishedEvent, TokenEvent
from knapper.wire.types import SampledSequence, SampleOutput
from tests.engine.tiny import eos
from tests.gateway.openai.chatting import chat_model
from tests.gateway.running import MODEL, Running, gateway, serve

RUN = "ses-" + "a" * 32 + ":train:0"


@dataclass
class Upstream:
    """Draws `tokens`, the last of which ends the text; `breaks` says after how many tokens each attempt breaks off."""

    tokens: list[int] = field(default_factory=list)
    refusals: list[Response] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)
    failure: FailedEvent | None = None
    pause: asyncio.Event = field(default_factory=asyncio.Event)
    calls: list[dict[str, Any]] = field(default_factory=list)
    left: int = 0

    async def __call__(self, request: Request) -> Response:
        call = json.loads(await request.body())
        self.calls.append(call)
        if self.refusals:
            return self.refusals.pop(0)
        if call["stream"]:
            return StreamingResponse(self.frames(call), media_type=progress.FRAMES)
        while not self.pause.is_set():
            await asyncio.sleep(0.01)
            if await request.is_disconnected():
                self.left += 1
                return Response(status_code=499)
        return Response(proto.encode_sample_response(self.output(call)), media_type="application/x-protobuf")

    def output(self, call: dict[str, Any]) -> SampleOutput:
        tokens, logprobs = np.array(self.tokens, np.int32), np.full(len(self.tokens), -0.5, np.float32)
        return SampleOutput([SampledSequence(tokens, logprobs, True)] * call["num_samples"])

    async def frames(self, call: dict[str, Any]) -> AsyncIterator[bytes]:
        ends_at = self.breaks.pop(0) if self.breaks else None
        try:
            for position, token in enumerate(self.tokens):
                if position == ends_at:
                    raise ConnectionResetError
                for number in range(call["num_samples"]):
                    ending: Ending = "stop" if position == len(self.tokens) - 1 else ""
                    yield progress.encode(TokenEvent(number, position, token, -0.5, ending))
                if position == 0:
                    await self.pause.wait()
                    if self.failure is not None:
                        yield progress.encode(self.failure)
                        return
        except asyncio.CancelledError:
            self.left += 1
            raise
        yield progress.encode(FinishedEvent(proto.encode_sample_response(self.output(call)), 0.25))


@dataclass
class Served:
    running: Running
    upstream: Upstream
    model: Path
    http: httpx.Client

    def encode(self, text: str) -> list[int]:
        language = self.running.run(self.running.parts.openai.languages.of(record(self.model, "")))
        ids: list[int] = language.tokenizer.encode(text).ids
        return ids

    def post(self, path: str, status: int = 200, **fields: Any) -> Any:
        reply = self.http.post(path, json={"model": MODEL.name} | fields)
        assert reply.status_code == status, reply.text
        return reply.json()

    def complete(self, **fields: Any) -> Any:
        return self.post("completions", **({"prompt": "the"} | fields))

    def events(self, path: str = "completions", **fields: Any) -> list[Any]:
        """What a stream says, without the comments and the last mark, which must be there."""
        prompt = {} if "messages" in fields else {"prompt": "the"}
        fields = {"model": MODEL.name, "stream": True} | prompt | fields
        reply = self.http.post(path, json=fields)
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.text.split("\n\n") if line and not line.startswith(":")]
        if "error" not in json.loads(lines[-1].removeprefix("data: ") if lines[-1] != "data: [DONE]" else "{}"):
            assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


def record(directory: Path, url: str) -> Any:
    return msgspec.structs.replace(MODEL, directory=str(directory), sample_url=url)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    upstream = Upstream()
    model = chat_model(tmp_path_factory.mktemp("models") / "tiny")

    async def sample(request: Request) -> Response:
        return await upstream(request)

    with serve(Starlette(routes=[Route("/", sample, methods=["POST"])])) as (url, _):
        with gateway(model=record(model, url), sample_url="") as running:
            headers = {"Authorization": "Bearer tml-local"}
            with httpx.Client(base_url=f"{running.url}/v1/", headers=headers, timeout=20) as http:
                yield Served(running, upstream, model, http)


@pytest.fixture
def served(module: Served) -> Iterator[Served]:
    upstream = module.upstream
    upstream.tokens = [*module.encode("the naïve 漢字"), module.encode(eos)[0]]
    upstream.refusals, upstream.breaks, upstream.failure, upstream.calls, upstream.left = [], [], None, [], 0
    upstream.pause = asyncio.Event()
    upstream.pause.set()
    yield module
    module.running.loop.call_soon_threadsafe(upstream.pause.set)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def said(events: list[Any], index: int = 0) -> str:
    return "".join(c["text"] for event in events for c in event["choices"] if c["index"] == index)


def test_a_stream_says_what_the_whole_answer_says(served: Served) -> None:
    whole = served.complete(n=2)
    assert [choice["text"] for choice in whole["choices"]] == ["the naïve 漢字"] * 2
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["stop"] * 2
    sampled = 2 * len(served.upstream.tokens)
    assert whole["usage"] == {"prompt_tokens": 1, "completion_tokens": sampled, "total_tokens": 1 + sampled}
    events = served.events(n=2, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert said(events, 0) == said(events, 1) == "the naïve 漢字"
    assert {event["id"] for event in events} == {events[0]["id"]}
    ends = [choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"]]
    assert ends == ["stop"] * 2
    assert all(event["usage"] is None for event in events[:-1])


def test_what_a_stream_took_of_the_device_is_metered_once_though_it_broke_off(served: Served) -> None:
    def told() -> float:
        served.running.run(served.running.parts.sample_usage.flush())
        now = served.running.parts.clock() // 3600
        window = {"starting_on": _hour(now), "ending_before": _hour(now + 1)}
        answer = served.http.get(f"{served.running.url}/api/v1/billing/usage/events", params=window)
        return float(
            sum(row["event_info"].get("device_seconds", 0.0) for row in answer.raise_for_status().json()["data"])
        )

    before = told()
    served.upstream.breaks = [2]
    served.events()
    assert len(served.upstream.calls) == 2
    assert told() - before == 0.25


def _hour(number: float) -> str:
    return datetime.fromtimestamp(number * 3600, UTC).isoformat()


def test_tokens_are_told_while_others_are_still_to_be_drawn(served: Served) -> None:
    served.upstream.pause.clear()
    body = {"model": MODEL.name, "prompt": "the", "stream": True}
    with served.http.stream("POST", "completions", json=body) as reply:
        lines = reply.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"] == "the"
        assert not served.upstream.pause.is_set()
        served.running.loop.call_soon_threadsafe(served.upstream.pause.set)
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_a_stream_that_breaks_off_goes_on_where_it_was(served: Served) -> None:
    served.upstream.breaks = [3, 5]
    events = served.events(seed=4)
    assert said(events) == "the naïve 漢字"
    assert len(served.upstream.calls) == 3
    assert len({call["seed"] for call in served.upstream.calls}) == 1, "or the tokens would be others"


def test_a_stream_that_comes_out_otherwise_the_second_time_is_an_error(served: Served) -> None:
    served.upstream.pause.clear()
    served.upstream.breaks = [1]
    with served.http.stream("POST", "completions", json={"model": MODEL.name, "prompt": "x", "stream": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        served.upstream.tokens = served.encode("and now")
        served.running.loop.call_soon_threadsafe(served.upstream.pause.set)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"


def test_a_stream_that_breaks_again_and_again_ends_with_an_error(served: Served) -> None:
    served.upstream.breaks = [2] * 9
    *_, last = served.events()
    assert last["error"]["type"] == "server_error"
    assert len(served.upstream.calls) == 3


def test_an_error_after_the_first_token_is_the_last_event(served: Served) -> None:
    served.upstream.failure = FailedEvent(422, "broken weights", "non_finite", "user")
    *_, last = served.events()
    assert last["error"] == {
        "message": "broken weights", "type": "invalid_request_error", "param": None, "code": "non_finite",
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_a_status(served: Served, stream: bool) -> None:
    """And the code and the field that it had where it arose, by the name that the client knows."""
    error = {"detail": "too long", "code": "too_large", "category": "user", "field": "sampling_params.max_tokens"}
    served.upstream.refusals = [JSONResponse(error, status_code=413)]
    refused = served.post("completions", 413, prompt="the", stream=stream)["error"]
    assert refused == {
        "message": "too long", "type": "invalid_request_error", "param": "max_tokens", "code": "too_large",
    }  # fmt: skip
    for path, param in (("completions", "prompt"), ("chat/completions", "messages")):
        error = {"detail": "no", "code": "context_length_exceeded", "category": "user", "field": "prompt"}
        served.upstream.refusals = [JSONResponse(error, status_code=422)]
        body: Any = {"prompt": "the"} if param == "prompt" else {"messages": [{"role": "user", "content": "the"}]}
        refused = served.post(path, 400, **body, stream=stream)["error"]
        assert (refused["param"], refused["code"]) == (param, "context_length_exceeded")
    served.upstream.refusals = [Response("boom", status_code=500) for _ in range(3)]
    assert served.post("completions", 500, prompt="the", stream=stream)["error"]["type"] == "server_error"


def test_a_prompt_that_is_too_long_wakes_no_sampler(served: Served) -> None:
    refused = served.post("completions", 400, prompt=[7] * MODEL.context)["error"]
    assert (refused["param"], refused["code"]) == ("prompt", "context_length_exceeded")
    assert not served.upstream.calls


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_hangs_up_ends_the_sample(served: Served, stream: bool) -> None:
    served.upstream.pause.clear()
    body = {"model": MODEL.name, "prompt": "the", "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        served.http.post("completions", json=body, timeout=0.5)
    until(lambda: served.upstream.left == 1)


def test_a_quiet_stream_says_what_it_waits_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_KEEP_ALIVE_S", 0.3)
    served.upstream.refusals = [Response("no", status_code=503) for _ in range(3)]
    body = {"model": MODEL.name, "prompt": "the", "stream": True}
    reply = served.http.post("completions", json=body)
    comments = [line for line in reply.text.split("\n\n") if line.startswith(":")]
    assert any("sample does not answer yet" in comment for comment in comments)
    assert reply.text.endswith("data: [DONE]\n\n")


def test_several_prompts_have_their_choices_in_order(served: Served) -> None:
    reply = served.complete(prompt=["the", "and the"], n=2, echo=True)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][:7] for choice in reply["choices"]] == ["thethe ", "thethe ", "and the", "and the"]
    assert [call["prompt"] for call in served.upstream.calls] == [served.encode("the"), served.encode("and the")]
    events = served.events(prompt=["the", "and the"], n=2, echo=True)
    assert [said(events, i) for i in range(4)] == [choice["text"] for choice in reply["choices"]]


def test_a_chat_is_what_the_template_makes_of_it(served: Served) -> None:
    messages = [{"role": "user", "content": "the end"}]
    reply = served.post("chat/completions", messages=messages)
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": "the naïve 漢字", "refusal": None}
    prompt = "<|begin|>user\nthe end<|end|>\n<|begin|>assistant\n"
    assert served.upstream.calls[0]["prompt"] == served.encode(prompt)
    assert reply["usage"]["prompt_tokens"] == len(served.encode(prompt))
    events = served.events("chat/completions", messages=messages)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == "the naïve 漢字"


def test_a_key_is_a_bearer_token_or_the_other_header(served: Served) -> None:
    url = f"{served.running.url}/v1/models"
    for headers in ({"Authorization": "Bearer tml-x"}, {"authorization": "bearer tml-x"}, {"X-API-Key": "tml-x"}):
        assert httpx.get(url, headers=headers).status_code == 200
    for headers in ({}, {"Authorization": "Basic abc"}, {"Authorization": "Bearer"}):
        refused = httpx.get(url, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthorized")
    for path in ("completions", "chat/completions", "embeddings"):
        assert httpx.post(f"{served.running.url}/v1/{path}", json={}).status_code == 401


def test_what_is_not_served_says_so_in_the_same_shape(served: Served) -> None:
    missing = served.post("embeddings", 404)["error"]
    assert "/v1/chat/completions" in missing["message"]
    wrong = served.post("completions", 400, prompt="x", presence_penalty=1)["error"]
    assert (wrong["param"], wrong["code"]) == ("presence_penalty", "invalid_field")
    unserved = served.post("completions", 404, model="no/such", prompt="x")["error"]
    assert (unserved["param"], unserved["type"]) == ("model", "invalid_request_error")
    assert MODEL.name in unserved["message"]
    broken = served.http.post("completions", content=b"{").json()["error"]
    assert "not JSON" in broken["message"]


def test_models_are_base_models_checkpoints_and_runs(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def save(name: str, kind: str, seq: int, at: float, tenant: str = LOCAL_TENANT) -> str:
        path = f"tinker://{RUN}/{kind}/{name}"
        checkpoint = Checkpoint(path, tenant, MODEL.name, 4, f"adapters/{name}/", seq, 10, at)
        await Checkpoints(served.running.store, lambda: 1000.0).save(checkpoint, overwrite=False)
        return path

    run = served.running.run
    assert served.post("completions", 404, model=RUN, prompt="x")["error"]["param"] == "model"
    first, second = run(save("a", "sampler_weights", 3, 100.0)), run(save("b", "sampler_weights", 7, 200.0))
    state, other = run(save("s", "weights", 9, 300.0)), run(save("o", "sampler_weights", 11, 400.0, "somebody"))
    listed = served.http.get("models").json()
    assert [model["id"] for model in listed["data"]] == [MODEL.name, second, first, RUN]
    assert [model["created"] for model in listed["data"]] == [0, 200, 100, 200]
    for most, names in ((1, [MODEL.name, second, RUN]), (2, [MODEL.name, second, first, RUN])):
        monkeypatch.setattr(limits, "models_listed_max", most)
        assert [model["id"] for model in served.http.get("models").json()["data"]] == names
    for model in (MODEL.name, first, second, state, RUN):
        assert served.http.get(f"models/{model.replace('/', '%2F')}").json()["id"] == model
    assert served.http.get(f"models/{other.replace('/', '%2F')}").status_code == 404
    for model in (MODEL.name, str(served.model), first, state, RUN):
        served.complete(model=model)
    adapters = [call["adapter"] for call in served.upstream.calls]
    assert adapters == ["", "", "adapters/a/", "adapters/s/", "adapters/b/"], "a run is its newest sampler checkpoint"
    run(save("c", "sampler_weights", 13, 500.0))
    served.complete(model=RUN)
    assert served.upstream.calls[-1]["adapter"] == "adapters/c/"
    wrong = served.post("completions", 400, model="tinker://x", prompt="x")["error"]
    assert wrong["param"] == "model"
    assert served.post("completions", 404, model=other, prompt="x")["error"]["code"] == "not_found"


def test_a_model_whose_files_are_elsewhere_is_refused_by_name() -> None:
    with gateway(model=msgspec.structs.replace(MODEL, directory="")) as running:
        reply = httpx.post(
            f"{running.url}/v1/completions", headers={"X-API-Key": "tml-x"}, json={"model": MODEL.name, "prompt": "x"}
        )
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")
    assert "tokenizer" in reply.json()["error"]["message"]
