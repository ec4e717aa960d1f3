"""What is captured is answered once it is kept, over an upstream that draws what each test needs."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from knapper.errors import StoreError
from knapper.store.memory import MemoryStore
from tests.gateway.openai.chatting import chat_model
from tests.gateway.openai.test_routes import Upstream, record
from tests.gateway.running import MODEL, gateway, serve

CHAT: dict[str, Any] = {"model": MODEL.name, "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
PATHS = {
    "v1/chat/completions": CHAT,
    "v1/completions": {"model": MODEL.name, "prompt": "x", "max_tokens": 9},
    "v1/messages": CHAT,
    "v1/responses": {"model": MODEL.name, "input": "x", "max_output_tokens": 9},
}
ENDS = ('"finish_reason":"stop"', "message_stop", "response.completed", "[DONE]")


class Full(MemoryStore):
    """A store that takes no turns while `full`."""

    full = False

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        if self.full and name.startswith("captured/"):
            raise StoreError("no space left on device")
        return await super().put_if_absent(name, data)


@pytest.fixture(scope="module")
def store() -> Full:
    return Full()


@pytest.fixture(scope="module")
def http(store: Full, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    upstream = Upstream(tokens=[5, 6, 7])
    upstream.pause.set()

    async def sample(request: Request) -> Response:
        return await upstream(request)

    model: Path = chat_model(tmp_path_factory.mktemp("models") / "tiny")
    with serve(Starlette(routes=[Route("/", sample, methods=["POST"])])) as (url, _):
        with gateway(store, model=record(model, url), sample_url="") as running:
            headers = {"X-API-Key": "tml-local", "X-Knapper-Capture": "g/a"}
            with httpx.Client(base_url=running.url, headers=headers, timeout=20) as client:
                yield client


def kept(store: Full) -> int:
    return len(asyncio.run(store.list("captured/local/g/a/turns/")))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_no_answer_ends_that_is_not_kept(http: httpx.Client, store: Full, path: str, stream: bool) -> None:
    body, before = PATHS[path] | {"stream": stream}, kept(store)
    store.full = True
    refused = http.post(path, json=body)
    store.full = False
    assert refused.status_code == (200 if stream else 503)
    assert "episode g/a could not keep the answer" in refused.text
    assert not any(end in refused.text for end in ENDS)
    assert kept(store) == before
    answered = http.post(path, json=body)
    assert answered.status_code == 200
    assert "could not keep" not in answered.text
    assert not stream or any(end in answered.text for end in ENDS)
    assert kept(store) == before + 1


def test_a_retry_says_so_and_a_prompt_that_is_only_scored_is_no_turn(http: httpx.Client, store: Full) -> None:
    before = kept(store)
    http.post("v1/completions", json=PATHS["v1/completions"], headers={"x-stainless-retry-count": "2"})
    newest = http.get("api/v1/captures/g/a", params={"limit": 100}).json()["turns"][-1]
    assert newest["retry"] == 2
    assert newest["sequences"] == [{"tokens": [5, 6, 7], "logprobs": [-0.5] * 3, "stopped": True}]
    assert http.post("v1/messages/count_tokens", json={key: CHAT[key] for key in ("model", "messages")}).is_success
    assert kept(store) == before + 1


def test_a_score_is_a_number_within_its_limits(http: httpx.Client, store: Full) -> None:
    http.post("v1/completions", json=PATHS["v1/completions"])
    for score in (-1e6, 0, 0.25, 1e6):
        assert http.post("api/v1/captures/g/a/score", json={"score": score}).json()["score"] == score
        assert http.get("api/v1/captures").json()["episodes"][0]["score"] == score
    for wrong in (1.1e6, -1.1e6, "1", None):
        refused = http.post("api/v1/captures/g/a/score", json={"score": wrong})
        assert (refused.status_code, "score" in json.dumps(refused.json())) == (422, True)
    assert http.post("api/v1/captures/g/b/score", json={"score": 1.0}).status_code == 404
