"""Sessions, configuration, and the one JSON schema of errors."""

import re
from collections.abc import Iterator

import pytest

from tests.gateway.running import MODEL, Running, gateway


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with gateway() as running:
        yield running


def test_health_needs_no_key_and_everything_else_does(running: Running) -> None:
    assert running.http.get("healthz").json() == {"status": "ok"}
    assert running.http.get("healthz", headers={"X-API-Key": ""}).status_code == 200
    for path in ("client/config", "create_session", "retrieve_future", "asample", "forward_backward"):
        refused = running.http.post(path, json={}, headers={"X-API-Key": ""})
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized"), path


def test_clients_are_told_to_send_chunks_at_once_and_compressed(running: Running) -> None:
    flags = running.post("client/config", {"sdk_version": "0.38.0"})
    assert flags["parallel_fwdbwd_chunks"] is True
    assert flags["proto_compress_fwdbwd"] is True
    assert flags["sample_use_retrieve_futures"] is False
    assert running.post("client/dynamic_config", {"sdk_version": "0.38.0"})["sample_cancel_enabled"] is True


def test_capabilities_list_the_served_models(running: Running) -> None:
    assert running.http.get("get_server_capabilities").json() == {
        "supported_models": [
            {"model_name": MODEL.name, "max_context_length": 512, "trainable": True, "sampleable": True}
        ]
    }


def test_each_client_has_a_session_of_its_own_that_ends(running: Running) -> None:
    first, second = running.session(), running.session()
    assert first != second
    assert re.fullmatch(r"ses-[0-9a-f]{32}", first)
    beat = {"session_id": first, "type": "session_heartbeat"}
    assert running.post("session_heartbeat", beat) == {"type": "session_heartbeat"}
    running.post(f"sessions/{first}/finish", {"reason": {"type": "success"}, "detail": None})
    running.post(f"sessions/{first}/finish", {"reason": {"type": "errored"}, "detail": "late"})
    assert running.post("session_heartbeat", beat, status=410)["code"] == "gone"
    running.post("session_heartbeat", beat | {"session_id": second})
    finish = running.run(running.parts.lookups.sessions.finished(first))  # type: ignore[arg-type]
    assert finish.reason == "success"


def test_unknown_sessions_are_missing(running: Running) -> None:
    for session in ("ses-" + "0" * 32, "../../etc", "x"):
        body = running.post("session_heartbeat", {"session_id": session}, status=404)
        assert (body["code"], body["category"]) == ("not_found", "user")
        assert "session" in body["detail"]


def test_telemetry_is_taken_without_a_word(running: Running) -> None:
    event = {"event": "SESSION_START", "event_id": "1"}
    batch = {"events": [event], "platform": "l", "sdk_version": "0.38.0", "session_id": "sessionless-1"}
    assert running.post("telemetry", batch | {"process_uuid": "u"})["status"] == "accepted"


def test_every_error_has_one_shape(running: Running) -> None:
    cases = [
        (running.http.post("create_session", content=b"{"), 422, "invalid_request"),
        (running.http.post("create_session", json={"nonsense": 1}), 422, "invalid_field"),
        (running.http.post("create_session", content=b""), 422, "invalid_request"),
        (running.http.post("no_such_thing", json={}), 404, "not_found"),
        (running.http.get("create_session"), 405, "method_not_allowed"),
        (running.http.post("create_session", content=b"{}", headers={"Content-Encoding": "br"}), 422, "invalid_field"),
    ]
    for reply, status, code in cases:
        assert reply.status_code == status, reply.text
        assert reply.json().keys() == {"detail", "code", "category"}
        assert reply.json()["code"] == code


def test_another_tenants_objects_answer_as_missing_ones(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    session = running.session()
    run = running.make_run(session)
    sampler = running.post(
        "create_sampling_session", {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL.name}
    )["sampling_session_id"]
    missing = running.post("get_info", {"model_id": run[:-1] + "9"}, status=404)
    for module in ("service", "training", "sampling", "futures"):
        monkeypatch.setattr(f"gateway.{module}.tenant_of", lambda _: "somebody")
    assert running.post("get_info", {"model_id": run}, status=404)["detail"] == missing["detail"].replace(
        run[:-1] + "9", run
    )
    running.post("session_heartbeat", {"session_id": session}, status=404)
    running.post("retrieve_future", {"request_id": f"{run}:0"}, status=404)
    running.post("optim_step", {"model_id": run, "seq_id": 1, "adam_params": {}}, status=404)
    assert running.http.get(f"samplers/{sampler}").status_code == 404
