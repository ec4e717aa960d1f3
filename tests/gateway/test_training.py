"""Operations are stored before their future exists, in any order, once; an invalid one fails in its future."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tinker.types import GetInfoResponse

from knapper import limits
from knapper.ids import LOCAL_TENANT
from knapper.state.api_keys import Keys
from knapper.wire import zstd
from tests.gateway.running import MODEL, Running, create_model, fwdbwd, gateway


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with gateway() as running:
        yield running


def test_a_promise_means_that_the_operation_is_stored(running: Running) -> None:
    run = running.make_run()
    body = fwdbwd(run, 1)
    assert running.forward_backward(body).json() == {"request_id": f"{run}:1", "model_id": run}
    stored = running.stored(run, 1)
    assert stored is not None
    assert stored.kind == "forward_backward"
    assert zstd.decompress(stored.body_zstd) == body


def test_operations_are_taken_in_any_order(running: Running) -> None:
    run = running.make_run()
    for seq in (3, 2, 4, 1):
        assert running.forward_backward(fwdbwd(run, seq)).status_code == 200
    step = {"model_id": run, "seq_id": 5, "adam_params": {}, "type": "optim_step"}
    assert running.post("optim_step", step)["request_id"] == f"{run}:5"
    assert all(running.stored(run, seq) for seq in range(6))


def test_a_retry_gets_the_same_promise_and_another_body_does_not(running: Running) -> None:
    run = running.make_run()
    first = running.forward_backward(fwdbwd(run, 1)).json()
    assert running.forward_backward(fwdbwd(run, 1)).json() == first
    other = running.forward_backward(fwdbwd(run, 1, tokens=4))
    assert other.status_code == 422
    assert "was used before" in other.json()["detail"]


def test_compressed_bodies_are_the_same_operation(running: Running) -> None:
    run = running.make_run()
    body = fwdbwd(run, 1)
    packed = running.forward_backward(zstd.compress(body), **{"Content-Encoding": "zstd"})
    assert packed.json() == running.forward_backward(body).json()
    stored = running.stored(run, 1)
    assert stored is not None
    assert zstd.decompress(stored.body_zstd) == body


def test_a_repeated_creation_makes_one_run(running: Running) -> None:
    session = running.session()
    first = running.post("create_model", create_model(session))
    assert first["request_id"] == f"{session}:train:0:0"
    assert running.post("create_model", create_model(session)) == first
    other = running.post("create_model", create_model(session, lora_config={"rank": 8}), status=422)
    assert "was used before" in other["detail"]
    assert running.post("create_model", create_model(session, 1))["model_id"] == f"{session}:train:1"


@pytest.mark.parametrize(
    ("changes", "status", "complaint"),
    [
        ({"base_model": "no/such"}, 404, f"base_model 'no/such' is not served here; served: '{MODEL.name}'"),
        ({"lora_config": {"rank": -3}}, 422, "lora_config.rank is -3; allowed: 1 to 256"),
        ({"lora_config": None}, 422, "lora_config is None"),
        ({"optimizer_config": {"type": "dimuon", "version": 1}}, 422, "optimizer_config.type is 'dimuon'"),
        ({"session_id": "ses-" + "1" * 32}, 404, "session"),
        ({"lora_config": {"rank": 4, "alpha": 1}}, 422, "lora_config.alpha is 1"),
    ],
)
def test_a_wrong_creation_is_refused_at_once(
    running: Running, changes: dict[str, Any], status: int, complaint: str
) -> None:
    body = running.post("create_model", create_model(running.session()) | changes, status=status)
    assert complaint in body["detail"]


def test_a_model_may_be_named_by_its_directory(running: Running) -> None:
    run = running.post("create_model", create_model(running.session(), base_model=MODEL.directory))["model_id"]
    info = running.post("get_info", {"model_id": run, "type": "get_info"})
    assert info["model_name"] == MODEL.name
    assert info["model_data"] == {
        "arch": "llama", "model_name": MODEL.name, "tokenizer_id": MODEL.directory, "computed_by": "native",
    }  # fmt: skip
    assert GetInfoResponse.model_validate(info).model_data.model_name == MODEL.name
    assert (info["is_lora"], info["lora_rank"], info["model_id"]) == (True, 4, run)


def test_a_client_elsewhere_hears_the_tokenizer_s_name_and_no_directory_of_the_server() -> None:
    with gateway(keys=True) as running:
        key = running.run(Keys(running.store, time.time).create(LOCAL_TENANT, "", lambda: "0" * 64))[0]
        running.http.headers["X-API-Key"] = key
        run = running.make_run()

        async def ask(address: str, name: str = "127.0.0.1:8000", **more: str) -> str:
            transport = httpx.ASGITransport(running.app, client=(address, 40000))
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{name}") as client:
                headers = {"X-API-Key": key, **{field.replace("_", "-"): value for field, value in more.items()}}
                answer = await client.post("/api/v1/get_info", json={"model_id": run}, headers=headers)
            return str(answer.raise_for_status().json()["model_data"]["tokenizer_id"])

        assert running.run(ask("127.0.0.1")) == MODEL.directory
        assert running.run(ask("::1", "localhost:8000")) == MODEL.directory
        assert running.run(ask("10.0.0.7")) == MODEL.name
        # Behind a proxy that ends TLS on the server's machine every connection comes from there.
        assert running.run(ask("127.0.0.1", "knapper.example")) == MODEL.name
        for field in ("X_Forwarded_For", "Forwarded", "Via", "X_Real_IP", "X_Forwarded_Proto"):
            assert running.run(ask("127.0.0.1", **{field: "10.0.0.7"})) == MODEL.name, field


def test_a_seed_that_was_not_chosen_differs_between_runs_and_not_between_retries(running: Running) -> None:
    runs = [running.make_run() for _ in range(3)]
    seeds = {running.run(running.parts.lookups.spec(run, "local")).seed for run in runs}  # type: ignore[arg-type]
    assert len(seeds) == 3


def tombstone(running: Running, run: str, seq: int) -> str:
    stored = running.stored(run, seq)
    assert stored is not None
    assert stored.kind == "tombstone"
    return stored.error


@pytest.mark.parametrize(
    ("path", "changes", "complaint"),
    [
        ("optim_step", {"adam_params": {"learning_rate": -1}}, "adam_params.learning_rate is -1"),
        ("optim_step", {"adam_params": {"lr": 1}}, "adam_params.lr is 1"),
        ("save_weights", {"path": 7}, "path is 7"),
        ("save_weights", {"path": "x", "ttl_seconds": 1}, "ttl_seconds is 1; allowed: int >= 3600"),
        ("save_weights_for_sampler", {"kind": "liquid"}, "kind is 'liquid'"),
        ("load_weights", {"path": "x"}, "optimizer is None"),
    ],
)
def test_a_wrong_operation_is_promised_its_error(
    running: Running, path: str, changes: dict[str, Any], complaint: str
) -> None:
    run = running.make_run()
    promise = running.post(path, {"model_id": run, "seq_id": 1} | changes)
    assert promise["request_id"] == f"{run}:1"
    assert complaint in tombstone(running, run, 1)


def test_not_a_number_is_promised_its_error(running: Running) -> None:
    run = running.make_run()
    body = f'{{"model_id":"{run}","seq_id":1,"adam_params":{{"learning_rate":NaN}}}}'
    assert running.http.post("optim_step", content=body).status_code == 200
    assert tombstone(running, run, 1) == "adam_params.learning_rate is nan; allowed: a finite number"


def test_a_wrong_operation_of_nobody_is_refused(running: Running) -> None:
    assert running.post("optim_step", {"seq_id": 1, "adam_params": {}}, status=422)["code"] == "invalid_field"
    body = running.post("optim_step", {"model_id": "x", "seq_id": 1, "adam_params": {}}, status=404)
    assert body["code"] == "not_found"
    never = "ses-" + "2" * 32 + ":train:0"
    running.post("optim_step", {"model_id": never, "seq_id": 1, "adam_params": {}}, status=404)
    assert running.forward_backward(fwdbwd(never, 1)).status_code == 404


def test_broken_protobuf_is_promised_its_error_if_it_says_whose_it_is(running: Running) -> None:
    run = running.make_run()
    assert running.forward_backward(fwdbwd(run, 1)[:-3]).json()["request_id"] == f"{run}:1"
    assert "not protobuf" in tombstone(running, run, 1)
    refused = running.forward_backward(b"\xff\xff\xff")
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")


def test_an_oversized_body_is_promised_its_error(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.door("forward_backward"), "body_bytes_max", 20_000)
    run = running.make_run()
    fitting = fwdbwd(run, 1, tokens=1000)
    monkeypatch.setattr(running.door("forward_backward"), "body_bytes_max", len(fitting))
    assert running.forward_backward(fitting).status_code == 200
    stored = running.stored(run, 1)
    assert stored is not None
    assert stored.kind == "forward_backward"
    monkeypatch.setattr(running.door("forward_backward"), "body_bytes_max", len(fitting) - 1)
    assert running.forward_backward(fwdbwd(run, 2, tokens=1000)).json()["request_id"] == f"{run}:2"
    assert f"over {len(fitting) - 1} bytes" in tombstone(running, run, 2)
    packed = zstd.compress(fwdbwd(run, 3, tokens=1000))
    assert len(packed) < len(fitting) // 2
    assert running.forward_backward(packed, **{"Content-Encoding": "zstd"}).json()["request_id"] == f"{run}:3"
    assert "over" in tombstone(running, run, 3)


def test_the_limit_is_of_the_content_however_long_it_is_on_its_way(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not compress is a little longer as zstd: here 12 bytes of frame and block around it."""
    run = running.make_run()
    content = fwdbwd(run, 1, tokens=1000)
    size = len(content)
    frame = b"\x28\xb5\x2f\xfd\xa0" + size.to_bytes(4, "little") + (size << 3 | 1).to_bytes(3, "little") + content
    assert zstd.decompress(frame) == content
    monkeypatch.setattr(running.door("forward_backward"), "body_bytes_max", size)
    assert running.forward_backward(frame, **{"Content-Encoding": "zstd"}).status_code == 200
    stored = running.stored(run, 1)
    assert stored is not None
    assert stored.kind == "forward_backward"


def test_seventy_megabytes_are_read_thrown_away_and_answered(running: Running) -> None:
    run = running.make_run()
    head = fwdbwd(run, 1)
    reply = running.forward_backward(head + bytes(70 * 1024 * 1024))
    assert reply.json()["request_id"] == f"{run}:1"
    assert "over 67108864 bytes" in tombstone(running, run, 1)
    anonymous = running.forward_backward(bytes(65 * 1024 * 1024))
    assert (anonymous.status_code, anonymous.json()["code"]) == (413, "too_large")
    json = running.http.post("optim_step", content=b" " * (64 * 1024 * 1024 + 1))
    assert json.status_code == 413


def test_a_zstd_bomb_is_promised_its_error(running: Running) -> None:
    run = running.make_run()
    bomb = zstd.compress(fwdbwd(run, 1) + bytes(200 * 1024 * 1024))
    assert len(bomb) < 100_000
    assert running.forward_backward(bomb, **{"Content-Encoding": "zstd"}).json()["request_id"] == f"{run}:1"
    assert "over 67108864 bytes" in tombstone(running, run, 1)
    broken = running.forward_backward(b"not zstd", **{"Content-Encoding": "zstd"})
    assert broken.status_code == 422


def test_a_body_too_long_to_be_drained_is_cut_off(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.door("forward_backward"), "body_bytes_max", 10_000)
    monkeypatch.setattr(limits, "body_discarded_bytes_max", 20_000)
    with httpx.Client(headers=running.http.headers) as once:  # whose connection is of no more use
        reply = once.post(f"{running.url}/api/v1/forward_backward", content=bytes(3_000_000))
        assert (reply.status_code, reply.json()["code"]) == (413, "too_large")
    assert running.http.get("healthz").status_code == 200


def test_operations_ahead_have_limits(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "operations_waiting_max", 5)
    monkeypatch.setattr(limits, "operations_ahead_max", 10)
    run = running.make_run()
    assert running.forward_backward(fwdbwd(run, 5)).status_code == 200
    later = running.forward_backward(fwdbwd(run, 6))
    assert (later.status_code, later.json()["code"]) == (429, "too_many")
    assert int(later.headers["Retry-After"]) >= 1
    assert running.forward_backward(fwdbwd(run, 10)).status_code == 429
    never = running.forward_backward(fwdbwd(run, 11))
    assert (never.status_code, never.json()["code"]) == (422, "invalid_field")


def test_a_hole_is_closed_when_the_session_ends(running: Running) -> None:
    from gateway import periodic_tasks

    session = running.session()
    run = running.make_run(session)
    running.forward_backward(fwdbwd(run, 2))
    running.run(periodic_tasks.tick(running.parts))
    assert running.stored(run, 1) is None
    running.post(f"sessions/{session}/finish", {"reason": {"type": "interrupted"}})
    running.run(periodic_tasks.tick(running.parts))
    assert "never arrived" in tombstone(running, run, 1)
    assert running.forward_backward(fwdbwd(run, 1)).json()["request_id"] == f"{run}:1"  # late: hears it in its future


def test_a_checkpoint_that_does_not_exist_makes_no_run(running: Running) -> None:
    session = running.session()
    body = {"session_id": session, "model_seq_id": 0, "optimizer": True, "type": "load_weights"}
    missing = f"tinker://{session}:train:7/weights/a"
    assert "does not exist" in running.post("load_weights", body | {"path": missing}, status=404)["detail"]
    wrong = running.post("load_weights", body | {"path": "/etc/passwd"}, status=422)
    assert "allowed: tinker://<run>/" in wrong["detail"]
