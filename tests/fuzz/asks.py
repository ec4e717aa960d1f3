"""One legal request of every route, as rich as it can be: what is mutated.

`ASKS` has an entry for each route of the gateway's own table; a route without one fails the tests.
"""

import hashlib
from collections.abc import Callable
from random import Random
from typing import Any
from urllib.parse import urlencode

from starlette.routing import Route

from gateway.app import create_app
from knapper.store.memory import MemoryStore
from tests.fuzz import bodies
from tests.fuzz.bodies import JSON, PROTOBUF, Ask, World
from tests.gateway.running import settings
from tests.security.test_doors import Objects, discovered

Way = tuple[str, str]  # (method, path) as the router has it


def routes() -> list[Way]:
    """Of the gateway, in the order of its table."""
    return list(discovered(list(create_app(MemoryStore(), settings()).routes)))


def route_of(way: Way) -> Route:
    """To build URLs with."""
    return Route(way[1], lambda _: None, methods=[way[0]])


# ---- every route


def body(make: Callable[[World, Random], Any]) -> Callable[[World, Random], Ask]:
    return lambda world, rng: Ask(body=make(world, rng))


def nothing(world: World, rng: Random) -> Ask:
    return Ask()


def query(**values: Any) -> Callable[[World, Random], Ask]:
    return lambda *_: Ask(query=list(values.items()))


def _operation(**more: Any) -> Callable[[World, Random], Ask]:
    return body(lambda world, _: {"model_id": world.mine.run, "seq_id": world.seq, **more})


def _saved(**more: Any) -> Callable[[World, Random], Ask]:
    return body(lambda world, rng: {
        "model_id": world.mine.run, "seq_id": world.seq, "path": f"c{rng.randrange(5)}", "ttl_seconds": 3600, **more,
    })  # fmt: skip


def _load(world: World, rng: Random) -> Any:
    into: dict[str, Any] = {"model_id": world.mine.run, "seq_id": world.seq}
    if rng.random() < 0.5:
        into = {"session_id": world.mine.session, "model_seq_id": rng.randint(1, 20), "base_model": world.model}
    return {"path": world.mine.path(), "optimizer": rng.random() < 0.5, **into}


def _copy(world: World, rng: Random) -> Any:
    to: dict[str, Any] = {"destination_project_id": "p"}
    if rng.random() < 0.5:
        to = {"session_id": world.mine.session, "model_seq_id": rng.randint(30, 50)}
    return {"source_path": world.mine.path(), "ttl_seconds": 3600, **to}


def _future(world: World, rng: Random) -> Ask:
    wanted = rng.choice([f"{world.mine.run}:{max(world.seq - 1, 0)}", f"{world.mine.run}:0", world.mine.sample])
    return Ask(
        headers={"Accept": rng.choice([JSON, PROTOBUF])}, body={"request_id": wanted, "allow_metadata_only": True}
    )


def _own_key(world: World, rng: Random) -> Ask:
    return Ask(headers={"X-API-Key": world.spare_key()})


def _ranged(_world: World, rng: Random) -> Ask:
    return Ask(headers={"Range": rng.choice(["bytes=0-3", "bytes=-5", "bytes=2-"]), "If-Range": '"a"'})


def _form(fields: Callable[[World], dict[str, str]]) -> Callable[[World, Random], Ask]:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    return lambda world, _: Ask(headers=dict(headers), body=urlencode(fields(world)).encode())


_SESSION = {"tags": ["a"], "user_metadata": {"k": {"n": [1, 2.5, None]}}, "sdk_version": "0.38.0", "project_id": "p"}
_SEARCH: dict[str, Any] = {
    "limit": 3, "display_name": "d", "user_metadata": {"k": "v"}, "project_ids": ["p"],
    "statuses": [{"type": "client_finished", "reasons": ["success"]}], "owner": {"type": "user", "owner_urns": ["u"]},
}  # fmt: skip
_ADAM = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_clip_norm": 1.0}
ONE = "/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}"


def _openai(base: str) -> dict[Way, Callable[[World, Random], Ask]]:
    """What OpenAI's clients ask for, below one of the two places where it is served."""
    rest = ("GET", "POST", "PUT", "PATCH", "DELETE")
    return {
        ("GET", f"{base}/models"): nothing,
        ("GET", f"{base}/models/{{name:path}}"): nothing,
        ("POST", f"{base}/completions"): body(bodies.completion),
        ("POST", f"{base}/chat/completions"): body(bodies.chat),
        ("POST", f"{base}/responses"): body(bodies.response),
        **{(method, f"{base}/{{path:path}}"): body(lambda *_: {"a": 1}) for method in rest},
    }


ASKS: dict[Way, Callable[[World, Random], Ask]] = {
    ("GET", "/api/v1/healthz"): nothing,
    ("POST", "/api/v1/auth/token"): nothing,
    ("GET", "/api/v1/auth/apikey/me"): nothing,
    ("DELETE", "/api/v1/auth/apikey/me"): _own_key,
    ("POST", "/api/v1/client/config"): body(lambda *_: {"sdk_version": "0.38.0"}),
    ("POST", "/api/v1/client/dynamic_config"): body(lambda *_: {"sdk_version": "0.38.0"}),
    ("GET", "/api/v1/get_server_capabilities"): nothing,
    ("POST", "/api/v1/create_session"): body(lambda *_: {**_SESSION, "display_name": "d"}),
    ("POST", "/api/v1/session_heartbeat"): body(lambda world, _: {"session_id": world.mine.session}),
    ("POST", "/api/v1/sessions/{session_id}/finish"): body(lambda *_: {"reason": {"type": "success"}, "detail": "d"}),
    ("POST", "/api/v1/telemetry"): body(lambda world, _: {
        "events": [{"event": "a", "n": [1]}], "platform": "l", "session_id": world.mine.session, "process_uuid": "u",
    }),
    ("POST", "/api/v1/create_model"): body(lambda world, rng: {
        "session_id": world.mine.session, "model_seq_id": rng.randint(1, 20), "base_model": world.model,
        "lora_config": {"rank": 2, "seed": 3, "train_mlp": False}, "user_metadata": {"a": 1},
        "optimizer_config": {"type": "adamw"},
    }),
    ("POST", "/api/v1/get_info"): body(lambda world, _: {"model_id": world.mine.run}),
    ("POST", "/api/v1/forward"): body(lambda world, rng: bodies.forward_json(world, rng, "forward_input")),
    ("POST", "/api/v1/forward_backward"): bodies.forward_backward,
    ("POST", "/api/v1/optim_step"): _operation(adam_params=_ADAM, optimizer_params={"type": "adamw"}),
    ("POST", "/api/v1/save_weights"): _saved(overwrite=True, user_metadata={"a": "b"}),
    ("POST", "/api/v1/save_weights_for_sampler"): _saved(kind="snapshot", user_metadata={"a": "b"}),
    ("POST", "/api/v1/save_weights_external"): _saved(age_encryption_recipients=[]),
    ("POST", "/api/v1/load_weights"): body(_load),
    ("POST", "/api/v1/create_custom_loss"): body(lambda *_: {"source": "x"}),
    ("POST", "/api/v1/retrieve_future"): _future,
    ("POST", "/api/v1/retrieve_futures"): body(lambda world, _: {
        "target": {"sampling_session_id": world.mine.sampler, "cloned_sampler_id": 0}, "timeout": 0.01,
        "prev_cursor": 0, "retrieved_request_ids": [world.mine.sample],
    }),
    ("POST", "/api/v1/cancel_future"): body(lambda world, _: {"request_id": world.mine.sample}),
    ("POST", "/api/v1/create_sampling_session"): body(lambda world, rng: {
        "session_id": world.mine.session, "sampling_session_seq_id": rng.randrange(1, 20), "base_model": world.model,
        "model_path": rng.choice([None, world.mine.path("sampler_weights")]),
    }),
    ("POST", "/api/v1/join_sampling_session"): body(lambda world, _: {"sampling_session_id": world.mine.sampler}),
    ("POST", "/api/v1/asample"): body(bodies.sample),
    ("GET", "/api/v1/samplers/{sampler_id}"): nothing,
    ("POST", "/api/v1/rewards"): body(bodies.score),
    ("POST", "/api/v1/jobs"): body(bodies.submitted),
    ("GET", "/api/v1/jobs"): query(limit=5, offset=0),
    ("GET", "/api/v1/jobs/{job}"): query(after=0),
    ("DELETE", "/api/v1/jobs/{job}"): nothing,
    ("POST", "/api/v1/jobs/{job}/cancel"): nothing,
    ("POST", "/api/v1/jobs/{job}/resume"): nothing,
    ("GET", "/api/v1/jobs/{job}/files"): nothing,
    ("GET", "/api/v1/jobs/{job}/files/{file:path}"): _ranged,
    ("GET", "/api/v1/uploads/{sha256}/{size}"): nothing,
    ("PUT", "/api/v1/uploads/{sha256}/{size}/{offset}"): body(lambda *_: {"prompt": "a", "completion": "b"}),
    ("GET", "/metrics"): nothing,
    ("POST", "/events"): bodies.upload,
    ("POST", "/events/dead"): bodies.upload,
    ("GET", "/api/v1/training_runs"): query(limit=5, offset=0, access_scope="owned", project_id="p"),
    ("GET", "/api/v1/training_runs/{run_id}"): query(access_scope="owned"),
    ("DELETE", "/api/v1/training_runs/{run_id}"): nothing,
    ("GET", "/api/v1/training_runs/{run_id}/checkpoints"): nothing,
    ("GET", "/api/v1/checkpoints"): query(limit=5, offset=0),
    ("POST", "/api/v1/checkpoints/search"): body(lambda world, _: {
        "project_ids": ["p"], "user_metadata": {"a": "b"}, "checkpoint_type": "training", "owner": {"type": "own"},
        "base_models": [world.model], "limit": 3,
        "cursor": {"last_created_at": "2026-01-01T00:00:00.5+02:00", "last_checkpoint_uuid": world.mine.path()},
    }),
    ("DELETE", ONE): nothing,
    ("POST", f"{ONE}/publish"): nothing,
    ("DELETE", f"{ONE}/publish"): nothing,
    ("PUT", f"{ONE}/ttl"): body(lambda *_: {"ttl_seconds": 7200}),
    ("GET", f"{ONE}/archive"): nothing,
    ("GET", f"{ONE}/external_weights_urls"): nothing,
    ("GET", f"{ONE}/files"): nothing,
    ("GET", f"{ONE}/files/{{file}}"): _ranged,
    ("POST", "/api/v1/weights_info"): body(lambda world, _: {"tinker_path": world.mine.path()}),
    ("POST", "/api/v1/copy_weights"): body(_copy),
    ("GET", "/api/v1/sessions"): query(limit=5, offset=0, access_scope="accessible"),
    ("POST", "/api/v1/sessions/search"): body(lambda world, _: {
        **_SEARCH, "session_id": world.mine.session,
        "cursor": {"last_created_at": "2026-01-01T00:00:00.5+02:00", "last_session_id": world.mine.session},
    }),
    ("GET", "/api/v1/sessions/{session_id}"): query(access_scope="owned"),
    ("PUT", "/api/v1/sessions/{session_id}/project"): body(lambda *_: {"project_id": "p"}),
    ("GET", "/api/v1/sessions/{session_id}/trace_export"): nothing,
    ("GET", "/api/v1/captures"): query(limit=5, offset=0),
    ("GET", "/api/v1/captures/{episode:path}"): query(limit=5, after="0"),
    ("DELETE", "/api/v1/captures/{episode:path}"): nothing,
    ("POST", "/api/v1/captures/{episode:path}/score"): body(lambda *_: {"score": 0.5}),
    ("GET", "/api/v1/audit"): query(day="2026-01-01", event_type="checkpoints"),
    ("GET", "/api/v1/quota"): nothing,
    ("GET", "/api/v1/billing/usage/events"): query(
        starting_on="2026-01-01T00:00:00Z", ending_before="2026-01-02T00:00:00Z"
    ),
    ("GET", "/api/v1/billing/usage/checkpoints/current"): query(project_id="p"),
    ("GET", "/api/v1/links/{token}"): nothing,
    ("POST", "/v1/messages"): body(bodies.message),
    ("POST", "/v1/messages/count_tokens"): body(bodies.counted),
    **_openai("/v1"),
    **_openai("/oai/api/v1"),
    # ---- the console
    ("GET", "/static/{name}"): query(v="0123456789abcdef"),
    ("GET", "/signin"): query(next="/jobs"),
    ("POST", "/signin"): _form(lambda world: {"key": world.key, "next": "/jobs"}),
    ("POST", "/signout"): _form(lambda _: {"csrf": "0" * 64}),
    ("GET", "/"): query(before="2000000000000000-0"),
    ("GET", "/jobs"): query(before="2000000000000000-0"),
    ("GET", "/sessions"): query(before="2000000000000000-0"),
    ("GET", "/sessions/{session_id}"): nothing,
    ("GET", "/checkpoints"): query(before="2000000000000000-0"),
    **{("GET", f"/runs/{{run_id}}{part}"): nothing for part in ("", "/operations", "/curve", "/live")},
    ("GET", "/runs/{run_id}/passes/{seq}"): query(first=0),
    ("GET", "/runs/{run_id}/passes/{seq}/{datum}"): query(first=0),
    ("GET", "/runs/{run_id}/checkpoints/{kind}/{name}"): nothing,
    ("GET", "/runs/{run_id}/checkpoints/{kind}/{name}/files/{file}"): nothing,
    **{("GET", f"/jobs/{{job}}{part}"): nothing for part in ("", "/status", "/curve", "/live")},
    ("GET", "/jobs/{job}/files/{file:path}"): _ranged,
    ("GET", "/jobs/{job}/rollouts/{round}/{n}"): query(first=0),
    ("GET", "/jobs/{job}/rollouts/{round}/{n}/{part}/{sample}"): query(first=0),
    ("GET", "/compare"): lambda world, _: Ask(query=[("of", world.mine.run), ("of", world.mine.job)]),
    ("GET", "/playground"): lambda world, _: Ask(query=[("model", world.mine.run), ("base", world.model)]),
    ("POST", "/playground/chat"): body(bodies.chat),
    ("GET", "/usage"): query(days=3),
    ("GET", "/usage/stored"): nothing,
    ("GET", "/admin"): nothing,
    ("POST", "/admin/keys"): _form(lambda _: {"tenant": "mallory", "note": "n"}),
    ("POST", "/admin/keys/revoke"): _form(lambda _: {"id": "0123456789ab"}),
}  # fmt: skip


def parameters(world: World, way: Way, rng: Random) -> dict[str, str]:
    """What the route's path is filled with."""
    kind = rng.choice(["weights", "sampler_weights", "external_weights"])
    values = world.mine.in_path() | {"kind": kind, "token": "abc", "path": "a/b", "file": "status.json"}
    values |= {"sha256": "0" * 64, "size": "31", "offset": "0"}
    values |= {"round": "steps", "n": "0", "part": "0", "sample": "0", "seq": "1", "datum": "0"}
    if way[1].startswith("/static"):
        values["name"] = "console.css"
    if way[1].endswith("/files/{file}"):
        values["file"] = "adapter_config.json"
    if way[1].endswith("external_weights_urls"):
        values["kind"] = "external_weights"
    if way[1].endswith("/models/{name:path}"):
        values["name"] = rng.choice([world.model, world.mine.path("sampler_weights"), world.mine.run])
    return {name: values[name] for name in route_of(way).param_convertors}


def legal(way: Way, world: World, rng: Random) -> Ask:
    """A request that is served, as long as what it names is there."""
    ask = ASKS[way](world, rng)
    ask.path = parameters(world, way, rng)
    if ask.body is not None:
        ask.headers.setdefault("Content-Type", JSON)
    return ask


def never(number: int) -> Objects:
    """Names of the right form that nobody has."""
    digits = hashlib.sha256(b"never %d" % number).hexdigest()[:32]
    return Objects(
        f"ses-{digits}", f"ses-{digits}:train:0", f"ses-{digits}:sample:0", f"s-{digits}", "none", "job-none"
    )
