"""Two gateways behind one Service: clients take them for one."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conformance.gateways import (
    FORWARDED,
    LONG,
    Pod,
    answer,
    clients_of,
    gateways,
    key_of,
    owner_first,
    posted,
    sample_of,
    sampler_at,
)
from tests.conformance.server import Server
from tests.gateway.console.conftest import csrf


@pytest.fixture(scope="module")
def keyed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Pod]]:
    """Two that ask for keys."""
    settings = {"KNAPPER_KEYS": "true"}
    with gateways(server, tmp_path_factory.mktemp("keyed") / "gateways.log", settings, settings) as running:
        yield running


@pytest.fixture(scope="module")
def alice(server: Server) -> str:
    return key_of(server, "alice")


@pytest.fixture(scope="module")
def bob(server: Server) -> str:
    return key_of(server, "bob")


@pytest.fixture
def alices(keyed: list[Pod], alice: str) -> Iterator[list[httpx.Client]]:
    """Her clients of both."""
    with clients_of(keyed, alice) as made:
        yield made


@pytest.fixture
def bobs(keyed: list[Pod], bob: str) -> Iterator[list[httpx.Client]]:
    with clients_of(keyed, bob) as made:
        yield made


def test_a_sample_is_answered_to_its_tenant_and_cancelled_by_whichever_gateway_is_asked(
    model: Path, alices: list[httpx.Client], bobs: list[httpx.Client]
) -> None:
    _, sampler = sampler_at(alices[0], model)
    promised = posted(alices[0], "asample", sample_of(sampler, 0))
    owner, other = owner_first(alices, promised)
    mine, theirs = (answer(client, promised) for client in (owner, other))
    assert mine.status_code == 200, mine.text
    assert (theirs.status_code, theirs.content, theirs.headers["content-type"]) == (
        mine.status_code, mine.content, mine.headers["content-type"],
    )  # fmt: skip
    marked = other.post("retrieve_future", json={"request_id": promised["request_id"]}, headers=FORWARDED)
    assert marked.status_code == 410, "what was forwarded once is not forwarded again"
    assert [answer(client, promised).status_code for client in bobs] == [410, 410], "it is not his"
    cancelled = {"request_id": posted(other, "asample", sample_of(sampler, 1, **LONG))["request_id"]}
    posted(other, "cancel_future", cancelled)
    assert [answer(client, cancelled).status_code for client in alices] == [410, 410]


def test_a_request_that_is_repeated_at_the_other_gateway_is_sampled_once_and_listed_by_both(
    model: Path, alices: list[httpx.Client]
) -> None:
    a, b = alices
    session, sampler = sampler_at(b, model)
    promised = [posted(client, "asample", sample_of(sampler, 0)) for client in (a, b, a)]
    promised += [posted(client, "asample", sample_of(sampler, 1)) for client in (b, a)]
    ids = {each["request_id"] for each in promised}
    assert len(ids) == 2
    poll = {"target": {"type": "sampling_session", "sampling_session_id": sampler, "cloned_sampler_id": 0}}
    for client in alices:
        assert [answer(client, each).status_code for each in promised] == [200] * 5
        assert {each["request_id"] for each in posted(client, "retrieve_futures", poll)["completions"]} == ids
    long = posted(b, "asample", sample_of(sampler, 2, **LONG))
    _, other = owner_first(alices, long)
    posted(other, f"sessions/{session}/finish", {"reason": {"type": "success"}})
    assert answer(a, long).status_code == 410, "finishing at one ends it at the other"


def test_who_has_little_waits_for_nobody_whichever_gateway_takes_the_others(
    model: Path, alices: list[httpx.Client], bobs: list[httpx.Client]
) -> None:
    session, many = sampler_at(alices[0], model)
    for seq in range(300):
        posted(alices[seq % 2], "asample", sample_of(many, seq, max_tokens=64), **FORWARDED)
    _, one = sampler_at(bobs[1], model)
    assert answer(bobs[1], posted(bobs[1], "asample", sample_of(one, 0))).status_code == 200
    poll = {"target": {"type": "sampling_session", "sampling_session_id": many, "cloned_sampler_id": 0}, "timeout": 0}
    done = [posted(client, "retrieve_futures", poll, **FORWARDED)["completions"] for client in alices]
    posted(alices[0], f"sessions/{session}/finish", {"reason": {"type": "success"}})
    assert sum(map(len, done)) < 200, "bob's was served beside them"


def test_who_has_signed_in_at_one_gateway_has_at_the_other(keyed: list[Pod], alice: str) -> None:
    a, b = (pod.url for pod in keyed)
    with httpx.Client(headers={"Accept": "text/html"}, timeout=60) as browser:  # cookies are of the host, not the port
        form = {"csrf": csrf(browser.get(f"{a}/signin")), "key": alice, "next": "/"}
        assert browser.post(f"{b}/signin", data=form).status_code == 303
        for url in (a, b):
            assert browser.get(f"{url}/").status_code == 200
        page = browser.get(f"{a}/")
        assert browser.post(f"{b}/signout", data={"csrf": csrf(page)}).status_code == 303
        assert [browser.get(f"{url}/").status_code for url in (a, b)] == [303, 303]
