"""Bodies have a limit at each route and share a memory budget; workers read large ones, and may die."""

import os
import pickle
import signal
import time
from collections.abc import Iterator

import pytest

from gateway import body_decoders
from gateway.body_budget import Budget, Hold
from gateway.routing import Door
from knapper import limits
from knapper.catalogue.tokenizer import Language
from knapper.errors import ContextLengthExceeded, InvalidField, KnapperError, TooLarge, TooMany
from knapper.wire import json, requests, sample_requests, scan, zstd
from tests.engine.tiny import _tokenizer
from tests.gateway.running import Running, gateway


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with gateway() as running:
        yield running


def test_every_route_takes_no_more_than_its_limit(running: Running) -> None:
    """A plain and a packed body of one byte more; where the limit is 0 none is read."""
    tried = 0
    for door in running.app.routes:
        assert isinstance(door, Door)
        if not 0 < door.body_bytes_max <= limits.sample_body_bytes_max or door.path.startswith("/events"):
            continue
        if "/uploads/" in door.path:  # needs an exchange: see test_job_uploads
            continue
        session = running.session()
        named = {"session_id": session, "run_id": running.make_run(session), "kind": "weights", "name": "a"}
        path = door.path.replace(":path}", "}").format(**named, episode="a")
        for method in door.methods or ():
            body = b" " * (door.body_bytes_max + 1)
            kinds = [(body, {}), (zstd.compress(body), {"Content-Encoding": "zstd"})]
            if not path.startswith(("/api/", "/v1", "/oai/")):  # the console's: it reads none but a page's own forms
                kinds = [(body, {"Content-Type": "application/x-www-form-urlencoded"})]
            for sent, headers in kinds:
                reply = running.http.request(method, f"{running.url}{path}", content=sent, headers=headers)
                expected = 422 if "custom_loss" in path else 413  # refused whatever it is
                assert reply.status_code == expected, (path, reply.text)
                tried += 1
    assert tried > 40


def test_no_tenant_takes_more_than_half_of_the_memory_and_all_no_more_than_all() -> None:
    budget = Budget(1000)
    budget.take("a", 500)
    with pytest.raises(TooMany, match="500 of them yours; allowed: 1000 in all, and half"):
        budget.take("a", 1)
    budget.take("b", 400)
    with pytest.raises(TooMany, match="900 bytes, 0 of them yours"):
        budget.take("c", 101)
    budget.take("c", 100)
    budget.release("a", 500)
    budget.take("b", 100)
    assert budget.taken == 600


def test_small_bodies_are_free_and_what_a_request_took_is_given_back() -> None:
    budget, hold = Budget(10 * limits.body_free_bytes), Hold()
    hold.open(budget, "a")
    hold.take(limits.body_free_bytes)
    assert budget.taken == 0
    hold.take(1)
    assert budget.taken == limits.body_free_bytes + 1
    hold.release()
    hold.release()
    assert budget.taken == 0


def test_when_the_memory_for_bodies_is_taken_large_ones_come_later_and_small_ones_pass(running: Running) -> None:
    budget = running.parts.body_budget
    budget.take("somebody", budget.total // 2)
    budget.take("another", budget.total // 2)
    try:
        large = running.http.post("asample", content=b" " * (limits.body_free_bytes + 1))
        assert (large.status_code, large.json()["code"]) == (429, "too_many")
        assert large.headers["retry-after"] == "1"
        assert running.session()
    finally:
        budget.release("somebody", budget.total // 2)
        budget.release("another", budget.total // 2)
    assert running.http.post("asample", content=b" " * (limits.body_free_bytes + 1)).status_code == 422
    for _ in range(100):  # a moment after the answer
        if budget.taken == 0:
            break
        time.sleep(0.05)
    assert budget.taken == 0, "what the requests took was given back"


def test_a_worker_that_dies_takes_nobody_with_it(running: Running) -> None:
    tokens = [1] * 100_000
    payload = {"model_id": running.make_run(), "seq_id": 1}
    data = [{"model_input": {"chunks": [{"tokens": tokens}]}, "loss_fn_inputs": {}}]
    body = {**payload, "forward_backward_input": {"loss_fn": "cross_entropy", "data": data}}
    assert running.http.post("forward_backward", json=body).status_code == 200
    pool = running.parts.worker_pool._pool
    assert pool is not None
    (pid, *_) = pool._processes
    os.kill(pid, signal.SIGKILL)
    again = running.http.post("forward_backward", json={**body, "seq_id": 2})
    assert again.json()["request_id"].endswith(":2")


def test_a_wrong_value_of_a_large_body_is_named_by_its_field_and_type() -> None:
    body = b'{"retrieved_request_ids": [%s 7], "target": {"sampling_session_id": "a"}}' % (b'"a",' * 50_000)
    with pytest.raises(InvalidField, match=r"retrieved_request_ids\[50000\] is '\(of type int\)'; allowed: str"):
        json.decode(body, requests.RetrieveFutures)
    body = b'{"prompt": {"chunks": [%s]}, "sampling_params": {"top_p": NaN}}' % (b"{}," * 50_000 + b"{}")
    with pytest.raises(InvalidField, match=r"the body at byte \d+ is 'NaN'; allowed: a finite number"):
        json.decode(body, sample_requests.AsampleBody)


def test_whose_a_wrong_body_is_is_found_without_building_it() -> None:
    body = b'{"data": [%s], "model_id": "m", "seq_id": 3, "x": NaN}' % b",".join([b"[]"] * 100_000)
    assert body_decoders.address(body) == ("m", 3)
    assert body_decoders.address(b'{"model_id": 1}') is None
    assert scan.peek(bytes(50_000_000)) is None  # field by field it would take a minute


def test_errors_pass_from_process_to_process_without_their_large_values() -> None:
    for error in (InvalidField("a", ["x" * 1000] * 10**6, "b", "Do it"), TooLarge("c"), TooMany("d", 7.0)):
        data = pickle.dumps(error)
        assert len(data) < 20_000
        same = pickle.loads(data)  # noqa: S301  what was written above
        assert (type(same), str(same), same.code) == (type(error), str(error), error.code)
        assert isinstance(same, KnapperError)
        assert getattr(same, "retry_after_s", None) == getattr(error, "retry_after_s", None)


def test_a_text_that_fits_is_tokenized_and_one_of_any_length_is_refused_soon() -> None:
    language = Language(_tokenizer(), None)
    text = "the and " * 20_000  # 160,000 characters
    whole = language.encode(text)
    assert whole == language.tokenizer.encode(text).ids
    assert language.encode(text, context=len(whole)) == whole
    with pytest.raises(ContextLengthExceeded, match=r"maximum context length is 1000 .*it has 50000000 characters"):
        language.encode("the and " * 6_250_000, context=1000)
