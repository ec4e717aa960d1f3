"""Sessions: several at once, kept alive by heartbeats, and ended."""

import asyncio
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from tinker import types

from tests.conformance import data
from tests.conformance.conftest import NewService
from tests.conformance.server import Server

pytestmark = pytest.mark.timeout(60)


def session_of(service: tinker.ServiceClient) -> str:
    session = service.holder.get_session_id()
    assert isinstance(session, str)
    return session


def beat(server: Server, session: str) -> httpx.Response:
    """The heartbeat that the SDK sends every ten seconds."""
    return httpx.post(
        f"{server.url}/api/v1/session_heartbeat",
        json={"session_id": session, "type": "session_heartbeat"},
        headers={"X-API-Key": "tml-local"},
    )


def test_sessions_are_apart(new_service: NewService, model: Any) -> None:
    with new_service() as one, new_service() as two:
        clients = [each.create_lora_training_client(str(model), rank=2, seed=1).result() for each in (one, two)]
        assert session_of(one) != session_of(two)
        assert clients[0].model_id != clients[1].model_id
        batch = data.batch(np.random.default_rng(0))
        clients[0].forward_backward(batch, "cross_entropy")
        clients[0].optim_step(types.AdamParams(learning_rate=1e-2)).result()
        one_now, two_now = (data.bits(each.forward(batch, "cross_entropy").result()) for each in clients)
        assert one_now != two_now


def test_a_heartbeat_keeps_a_session_until_it_is_closed(server: Server, new_service: NewService) -> None:
    with new_service() as service:
        session = session_of(service)
        assert beat(server, session).status_code == 200
    ended = beat(server, session)
    assert ended.status_code == 410
    assert "has finished" in ended.json()["detail"]


def test_the_heartbeat_of_an_unknown_session_says_so(server: Server) -> None:
    unknown = beat(server, "ses-" + "0" * 32)
    assert unknown.status_code == 404
    assert "does not exist" in unknown.json()["detail"]


def test_a_finished_session_accepts_nothing_new_and_keeps_its_checkpoints(
    server: Server, new_service: NewService, model: Any
) -> None:
    service = new_service()
    client = service.create_lora_training_client(str(model), rank=2, seed=1).result()
    path = client.save_state("kept").result().path
    session = session_of(service)
    service.close("success").result()
    refused = httpx.post(
        f"{server.url}/api/v1/create_sampling_session",
        json={"session_id": session, "sampling_session_seq_id": 7, "base_model": str(model)},
        headers={"X-API-Key": "tml-local"},
    )
    assert refused.status_code == 410
    assert "create another ServiceClient" in refused.json()["detail"]
    with new_service() as other:
        assert other.create_training_client_from_state(path).result().get_info().lora_rank == 2


def test_a_client_that_failed_can_say_how(new_service: NewService) -> None:
    service = new_service()
    session_of(service)
    service.close("errored", "it broke").result()


def test_the_server_says_what_it_serves(server: Server, model: Any) -> None:
    capabilities = tinker.RestClient(base_url=server.url, api_key="tml-local").get_server_capabilities().result()
    [served] = capabilities.supported_models
    assert served.model_name == str(model)
    assert served.max_context_length == 512


def test_clients_can_be_used_with_await(new_service: NewService, model: Any) -> None:
    async def loop() -> tuple[float, int]:
        service = new_service()
        client = await service.create_lora_training_client(str(model), rank=2, seed=1)
        passed = client.forward_backward(data.batch(np.random.default_rng(0)), "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=1e-3))
        output = await passed
        await stepped
        sampler = await client.save_weights_and_get_sampling_client()
        params = types.SamplingParams(max_tokens=3, stop=[])
        prompt = data.prompt(np.random.default_rng(1), 5)
        answers = await asyncio.gather(*(sampler.sample(prompt, 1, params).coroutine() for _ in range(4)))
        await service.close("success")
        return output.metrics["loss:sum"], sum(len(each.sequences[0].tokens) for each in answers)

    loss, tokens = asyncio.run(loop())
    assert np.isfinite(loss)
    assert tokens == 12
