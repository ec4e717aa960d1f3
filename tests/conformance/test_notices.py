"""What a user sees in the terminal when a client starts: with the newest SDK. Of the oldest, see test_oldest_sdk."""

import asyncio
import re
import threading
import time

import pytest
import tinker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tinker import types

from gateway.train_client import TrainStepClient
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal.records import Commit, Result, encode
from tests.conformance.server import wait_until
from tests.gateway.running import MODEL, gateway, serve

NOTICE = "Down at 18:00 for an hour."


def test_the_operator_s_notice_is_printed_once_by_every_client(caplog: pytest.LogCaptureFixture) -> None:
    with gateway(notice=NOTICE) as running:
        rest = tinker.RestClient(base_url=running.url, api_key="tml-local")
        assert rest.get_server_capabilities().result().supported_models
        assert caplog.text.count(NOTICE) == 1
        with tinker.ServiceClient(base_url=running.url, api_key="tml-local") as service:
            service.create_sampling_client(base_model=MODEL.name).result()
        assert caplog.text.count(NOTICE) == 2


def test_the_newest_sdk_is_told_nothing_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    with gateway() as running, tinker.ServiceClient(base_url=running.url, api_key="tml-local") as service:
        service.create_sampling_client(base_model=MODEL.name).result()
    assert not [record for record in caplog.records if record.name.startswith("tinker") and record.levelname != "DEBUG"]


def test_a_cold_start_is_told_from_its_first_second_and_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of training in the way of notices, as the SDK is silent for a quarter of an hour; of samples it prints itself."""
    started, asked, later_s = threading.Event(), [0], [0.0]
    take_notice = TrainStepClient.take_notice

    async def starting(request: Request) -> Response:
        await request.body()
        await asyncio.to_thread(started.wait)
        return JSONResponse({"detail": "it has started", "category": "user"}, status_code=422)

    def counted(client: TrainStepClient, run: RunId) -> str:
        asked[0] += 1
        return take_notice(client, run)

    def said(what: str) -> list[str]:
        messages = (record.getMessage() for record in caplog.records if record.name.startswith("tinker"))
        return [message for message in messages if what in message]

    monkeypatch.setattr(TrainStepClient, "take_notice", counted)
    monkeypatch.setattr("gateway.futures._PAUSED_HOLD_S", 0.2)  # many polls
    function = Starlette(routes=[Route("/", starting, methods=["POST"])])
    with (
        serve(function) as (url, _),
        gateway(
            train_step_url=f"{url}/", sample_url=f"{url}/", monotonic=lambda: time.monotonic() + later_s[0]
        ) as running,
        tinker.ServiceClient(base_url=running.url, api_key="tml-local") as service,
    ):
        made = service.create_lora_training_client(MODEL.name, rank=2)
        wait_until(lambda: bool(said("train_step is starting")), "the user is told")
        notice = r"Deprecation notice: train_step is starting from zero: [1-9] s so far \(no estimate yet\)"
        assert re.fullmatch(notice, said("train_step is starting")[0])
        polls = asked[0]
        wait_until(lambda: asked[0] > polls + 20, "more polls")
        assert len(said("train_step is starting")) == 1
        later_s[0] += 60.0
        wait_until(lambda: len(said("train_step is starting")) == 2, "the user is told again")
        assert re.search("6. s so far", said("train_step is starting")[1])

        sampler = service.create_sampling_client(base_model=MODEL.name).result()
        drawn = sampler.sample(types.ModelInput.from_ints([5]), 1, types.SamplingParams(max_tokens=1))
        wait_until(lambda: bool(said("sample is starting")), "the user is told of samples too")
        assert re.search(
            r"is paused .*sample is starting from zero, or busy; waited [1-9] s", said("sample is starting")[0]
        )

        started.set()
        with pytest.raises(tinker.RequestFailedError, match="it has started"):
            drawn.result()
        [run] = running.parts.train_client.runs()
        body = b'{"type": "create_model", "model_id": "%s"}' % run.encode()
        record = Commit(epoch=1, results=[Result(seq=0, sha256=b"", content_type="application/json", body=body)])
        running.run(running.store.put_if_absent(layout.commit(run, 1), encode(record)))
        assert made.result().model_id == run
