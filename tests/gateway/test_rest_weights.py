"""Weights over raw HTTP: descriptions, copies, and signed links to files."""

import base64
import urllib.error
import urllib.request
from typing import Any

import pytest

from knapper import limits
from tests.gateway import saved
from tests.gateway.running import MODEL, Running, fwdbwd, gateway, json_of
from tests.gateway.saved import Clock
from tests.gateway.test_rest_checkpoints import GRACE_S, loads, paths, sweep, url


def fetch(link: str) -> bytes:
    """As the SDK's command line does: without a key."""
    with urllib.request.urlopen(link, timeout=10) as reply:
        assert int(reply.headers["Content-Length"]) > 0
        content: bytes = reply.read()
    return content


def status_of(link: str) -> int:
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(link)
    caught.value.close()
    return caught.value.code


def urls(running: Running, path: str) -> dict[str, str]:
    links: dict[str, str] = running.http.get(url(path, "/external_weights_urls")).raise_for_status().json()["urls"]
    return links


def test_weights_info_says_what_a_load_needs(running: Running) -> None:
    path = saved.save(running, running.make_run(), "a")
    assert running.post("weights_info", {"tinker_path": path}) == {
        "base_model": MODEL.name, "optimizer_config": {"type": "adamw"}, "is_lora": True, "lora_rank": 4,
        "train_unembed": False, "train_mlp": True, "train_attn": True,
    }  # fmt: skip


def test_links_lead_to_the_files_without_a_key(running: Running) -> None:
    path = saved.save(running, running.make_run(), "a", "external_weights")
    assert {name: fetch(link) for name, link in urls(running, path).items()} == saved.FILES


def test_links_need_the_owner_or_a_public_checkpoint(running: Running) -> None:
    run = saved.others_run(running)
    private = saved.save(running, run, "private", "external_weights", tenant=saved.OTHER)
    public = saved.save(running, run, "public", "external_weights", tenant=saved.OTHER, public=True, seq=2)
    assert running.http.get(url(private, "/external_weights_urls")).status_code == 404
    assert set(urls(running, public)) == set(saved.FILES)


def test_only_external_weights_have_links(running: Running) -> None:
    path = saved.save(running, running.make_run(), "a")
    reply = running.http.get(url(path, "/external_weights_urls"))
    assert reply.status_code == 422
    assert "external_weights/<name>" in reply.json()["detail"]


def test_a_changed_link_leads_nowhere(running: Running) -> None:
    path = saved.save(running, running.make_run(), "a", "external_weights")
    link = urls(running, path)["adapter_config.json"]
    base, _, token = link.rpartition("/")
    signed = bytearray(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    for at in (0, 31, 32, 40, len(signed) - 1):  # the signature, and what is signed
        changed = bytearray(signed)
        changed[at] ^= 1
        assert status_of(f"{base}/{base64.urlsafe_b64encode(changed).decode().rstrip('=')}") == 404
    unsigned = base64.urlsafe_b64encode(signed[32:]).decode().rstrip("=")
    for other in ("x", token[:-4], unsigned, "%2e%2e", "A" * 2000):
        assert status_of(f"{base}/{other}") == 404
    assert fetch(link) == saved.FILES["adapter_config.json"]


def test_a_link_expires(running: Running, clock: Clock) -> None:
    path = saved.save(running, running.make_run(), "a", "external_weights")
    reply = running.http.get(url(path, "/external_weights_urls")).json()
    assert reply["expires"] == "2027-01-15T09:00:00+00:00"
    link = reply["urls"]["adapter_config.json"]
    clock.at += limits.link_s - 1
    fetch(link)
    clock.at += 1
    assert status_of(link) == 410


def test_the_links_of_a_deleted_checkpoint_lead_nowhere(running: Running) -> None:
    run = running.make_run()
    path = saved.save(running, run, "a", "external_weights")
    link = urls(running, path)["adapter_config.json"]
    running.http.delete(url(path)).raise_for_status()
    assert status_of(link) == 404
    saved.save(running, run, "a", "external_weights", seq=2)
    assert status_of(link) == 422, "the name leads to other weights now"


def test_the_secret_outlives_the_gateway_and_is_not_the_next_ones(running: Running) -> None:
    path = saved.save(running, running.make_run(), "a", "external_weights")
    link = urls(running, path)["adapter_config.json"]
    token = link.rpartition("/")[2]
    with gateway(running.store, clock=running.parts.clock) as restarted:
        assert fetch(f"{restarted.url}/api/v1/links/{token}") == saved.FILES["adapter_config.json"]
    with gateway(clock=running.parts.clock) as stranger:
        assert status_of(f"{stranger.url}/api/v1/links/{token}") == 404


def test_damaged_bytes_are_not_served(running: Running) -> None:
    path = saved.save(running, running.make_run(), "a", "external_weights")
    link = urls(running, path)["adapter_config.json"]
    name = next(name for name in saved.bundle_names(running) if name.endswith("adapter_config.json"))
    running.run(running.store.delete(name))
    running.run(running.store.put_if_absent(name, b"[]"))
    assert status_of(link) == 503


# ---- copies


def copy(running: Running, path: str, key: str = "k", **more: Any) -> str:
    body = {"source_path": path, "destination_project_id": "archive"} | more
    made: str = running.post("copy_weights", body, headers={"X-Idempotency-Key": key})["tinker_path"]
    return made


def test_a_copy_shares_its_bytes_and_outlives_its_source(running: Running, clock: Clock) -> None:
    path = saved.save(running, running.make_run(), "a", ttl_s=3600)
    before = saved.bundle_names(running)
    made = copy(running, path)
    assert made.endswith("/weights/a")
    assert made != path
    assert saved.bundle_names(running) == before
    clock.at += 3600
    for _ in range(2):
        sweep(running)
        clock.at += GRACE_S
    assert [loads(running, path), loads(running, made)] == [404, 200]
    running.http.delete(url(made)).raise_for_status()
    for _ in range(2):
        sweep(running)
        clock.at += GRACE_S
    assert saved.bundle_names(running) == []


def test_a_copy_asked_for_again_is_the_same(running: Running, clock: Clock) -> None:
    path = saved.save(running, running.make_run(), "a")
    first = copy(running, path)
    clock.at += 60
    assert copy(running, path) == first
    assert copy(running, path, key="another") != first
    assert len(paths(running)) == 3
    assert running.http.get("training_runs").json()["cursor"]["total_count"] == 3


def test_a_copy_has_a_life_and_a_project_of_its_own(running: Running, clock: Clock) -> None:
    path = saved.save(running, running.make_run(), "a")
    made = copy(running, path, ttl_seconds=7200)
    checkpoints = {each["tinker_path"]: each for each in running.http.get("checkpoints").json()["checkpoints"]}
    assert checkpoints[path]["expires_at"] is None
    assert checkpoints[made]["expires_at"] == "2027-01-15T10:00:00+00:00"
    runs = running.http.get("training_runs", params={"project_id": "archive"}).json()["training_runs"]
    assert [run["training_run_id"] for run in runs] == [made.removeprefix("tinker://").partition("/")[0]]
    assert runs[0]["last_checkpoint"]["tinker_path"] == made


def test_a_copys_run_cannot_be_trained(running: Running) -> None:
    made = copy(running, saved.save(running, running.make_run(), "a"))
    run = made.removeprefix("tinker://").partition("/")[0]
    reply = running.forward_backward(fwdbwd(run, 1))
    assert reply.status_code == 422
    assert "create_training_client_from_state" in json_of(reply.content)["detail"]
    assert running.stored(run, 1) is None


def test_a_copy_goes_into_a_session_that_is_named(running: Running) -> None:
    path = saved.save(running, running.make_run(), "a")
    session = running.session()
    body = {"source_path": path, "session_id": session, "model_seq_id": 3}
    assert running.post("copy_weights", body)["tinker_path"] == f"tinker://{session}:train:3/weights/a"
    assert running.http.get(f"sessions/{session}").json()["training_run_ids"] == [f"{session}:train:3"]


def test_a_copy_of_what_others_keep_to_themselves_is_refused(running: Running) -> None:
    run = saved.others_run(running)
    private = saved.save(running, run, "private", tenant=saved.OTHER)
    public = saved.save(running, run, "public", tenant=saved.OTHER, public=True, seq=2)
    body = {"source_path": private, "destination_project_id": "archive"}
    assert running.http.post("copy_weights", json=body).status_code == 404
    made = copy(running, public)
    [checkpoint] = running.http.get("checkpoints").json()["checkpoints"]
    assert (checkpoint["tinker_path"], checkpoint["public"]) == (made, False)


@pytest.mark.parametrize("more", [
    {}, {"session_id": "ses-" + "0" * 32}, {"model_seq_id": 1},
    {"destination_project_id": "p", "session_id": "ses-" + "0" * 32, "model_seq_id": 1},
    {"destination_project_id": "p", "weights_access_token": "t"}, {"destination_project_id": "p" * 129},
    {"destination_project_id": "p", "ttl_seconds": 1},
])  # fmt: skip
def test_a_copy_needs_one_place_to_go(running: Running, more: dict[str, Any]) -> None:
    path = saved.save(running, running.make_run(), "a")
    reply = running.http.post("copy_weights", json={"source_path": path} | more)
    assert reply.status_code == 422
    assert paths(running) == [path]
