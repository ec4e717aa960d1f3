"""One of two gateways behind a Service ends, stops, fails, or has another time: clients notice nothing."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from tinker import types

from tests.conformance.gateways import (
    Balancer,
    Front,
    Pod,
    answer,
    app_of,
    clients_of,
    gateways,
    name_of,
    owner_first,
    posted,
    sample_of,
    sampler_at,
)
from tests.conformance.kill_client import datum, tokens
from tests.conformance.server import Server
from tests.gateway.running import serve

PROMPT = types.ModelInput.from_ints(tokens(1))
PARAMS = types.SamplingParams(max_tokens=5, seed=2, stop=[])


@pytest.fixture
def pods(server: Server, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[Pod]]:
    """`request.param`: the settings of each."""
    with gateways(server, tmp_path / "gateways.log", *getattr(request, "param", [{}, {}])) as running:
        yield running


@pytest.fixture
def clients(pods: list[Pod]) -> Iterator[list[httpx.Client]]:
    with clients_of(pods) as made:
        yield made


@pytest.fixture
def balancer(pods: list[Pod]) -> Iterator[Balancer]:
    balancer = Balancer(pods)
    with serve(app_of(balancer)) as (balancer.url, _):
        yield balancer


def sampled(sampler: tinker.SamplingClient, count: int, disaster: Callable[[], None] = lambda: None) -> list[Any]:
    asked = [sampler.sample(PROMPT, num_samples=2, sampling_params=PARAMS) for _ in range(count)]
    disaster()
    return [[(one.tokens, one.logprobs) for one in each.result().sequences] for each in asked]


def lived(url: str, model: Path, *disasters: Callable[[], None]) -> list[Any]:
    """Losses and samples of a run."""
    with tinker.ServiceClient(base_url=url, api_key="tml-local") as service:
        training = service.create_lora_training_client(str(model), rank=4, seed=1).result()
        passes = [training.forward_backward([datum(n)], "cross_entropy") for n in range(3)]
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        losses = [each.result().metrics["loss:sum"] for each in passes]
        sampler = training.save_weights_and_get_sampling_client().result()
        first = sampled(sampler, 4)
        return [losses, first, *(sampled(sampler, 4, disaster) for disaster in disasters)]


@pytest.fixture(scope="module")
def undisturbed(server: Server, model: Path) -> list[Any]:
    return lived(server.url, model, lambda: None)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGSTOP], ids=["drained", "stopped"])
def test_a_run_behind_two_gateways_of_which_one_ends_is_that_of_one(
    end: signal.Signals, model: Path, balancer: Balancer, undisturbed: list[Any]
) -> None:
    def disaster() -> None:
        assert 410 not in balancer.statuses, "every sample was found at the first try"
        balancer.pods[0].process.send_signal(end)
        if end == signal.SIGSTOP:
            balancer.pods = balancer.pods[1:]  # its probe fails, and no request comes to it any more

    assert lived(balancer.url, model, disaster) == undisturbed


def test_a_gateway_that_is_killed_is_noticed_at_once(
    server: Server, model: Path, pods: list[Pod], clients: list[httpx.Client]
) -> None:
    published = server.data / "store" / "gateways"
    _, sampler = sampler_at(clients[1], model)
    promised = posted(clients[0], "asample", sample_of(sampler, 0))
    assert answer(clients[1], promised).status_code == 200, "its address is known"
    assert not (published / name_of(clients[1])).exists(), "who is asked for no sample says nothing"
    a, b = owner_first(clients, promised)
    assert a is clients[0]
    pods[0].kill()
    began = time.monotonic()
    assert answer(b, promised).status_code == 410
    assert answer(b, posted(b, "asample", sample_of(sampler, 1))).status_code == 200
    assert time.monotonic() - began < 20, "180 s, when its address was believed"


def test_a_gateway_that_stops_is_left_out_and_keeps_what_it_has_when_it_goes_on(
    model: Path, pods: list[Pod], clients: list[httpx.Client]
) -> None:
    a, b = clients
    _, sampler = sampler_at(b, model)
    promised = {"request_id": posted(a, "asample", sample_of(sampler, 0))["request_id"]}
    assert answer(b, promised).status_code == 200
    pods[0].process.send_signal(signal.SIGSTOP)
    try:
        assert answer(b, posted(b, "asample", sample_of(sampler, 1))).status_code == 200
        assert answer(b, promised).status_code == 410
    finally:
        pods[0].process.send_signal(signal.SIGCONT)
    assert answer(a, promised).status_code == 200
    end = time.monotonic() + 60
    while answer(b, promised).status_code != 200:  # it is asked again after a while
        assert time.monotonic() < end
        time.sleep(1)


@pytest.fixture
def front() -> Iterator[Front]:
    front = Front()
    with serve(app_of(front)) as (url, _):
        front.target = url
        yield front


@pytest.fixture
def fronted(server: Server, tmp_path: Path, front: Front) -> Iterator[list[httpx.Client]]:
    """Of two gateways, the first with `front` at its address."""
    with gateways(server, tmp_path / "gateways.log", {"address": front.target}, {}) as pods, clients_of(pods) as made:
        front.target = pods[0].url
        yield made


def test_a_gateway_that_fails_keeps_its_samples_for_a_while_and_is_then_left_out(
    model: Path, fronted: list[httpx.Client], front: Front
) -> None:
    a, b = fronted
    _, sampler = sampler_at(b, model)
    promised = posted(a, "asample", sample_of(sampler, 0))
    front.loses = True
    assert b.post("asample", json=sample_of(sampler, 1)).status_code == 502
    assert b.post("retrieve_future", json={"request_id": promised["request_id"]}).status_code == 408
    front.loses = False
    taken = posted(b, "asample", sample_of(sampler, 1))
    assert taken == posted(a, "asample", sample_of(sampler, 1)), "the one whose answer was lost"
    assert answer(b, {"request_id": promised["request_id"]}).status_code == 200
    front.loses = True
    began = time.monotonic()
    assert answer(b, {"request_id": promised["request_id"]}).status_code == 410
    assert 15 < time.monotonic() - began < 60
    assert answer(b, posted(b, "asample", sample_of(sampler, 2))).status_code == 200, "it takes them itself"


def test_what_has_a_gateways_address_by_now_gets_no_credentials_and_answers_no_client(
    model: Path, fronted: list[httpx.Client], front: Front
) -> None:
    a, b = fronted
    _, sampler = sampler_at(b, model)
    promised = {"request_id": posted(a, "asample", sample_of(sampler, 0))["request_id"]}
    front.is_other = True
    assert answer(b, promised).status_code == 410
    assert answer(b, posted(b, "asample", sample_of(sampler, 1))).status_code == 200
    assert front.seen
    assert not any({"x-api-key", "authorization"} & set(headers) for headers in front.seen)


@pytest.mark.parametrize("pods", [[{"ahead_s": 3600.0}, {}]], indirect=True)
def test_clocks_that_are_apart_change_nothing(model: Path, clients: list[httpx.Client]) -> None:
    for client in (*clients, *reversed(clients)):
        _, sampler = sampler_at(client, model)
        promised = [posted(each, "asample", sample_of(sampler, 0)) for each in clients]
        assert promised[0] == promised[1]
        for each in clients:
            assert answer(each, {"request_id": promised[0]["request_id"]}).status_code == 200
            unknown = promised[0]["request_id"][:-32] + "0" * 32
            assert answer(each, {"request_id": unknown}).status_code == 410, "what its gateway forgot"
