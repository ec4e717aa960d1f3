"""Every route of the gateway, found in its router, refuses strangers and hides what belongs to another tenant.

A new route makes `test_every_route_is_classified` fail until it has a line in DOORS below:

    Open("why")              nobody is asked for a key: it tells nothing of anybody
    Own(...)                 it names no object: it shows what belongs to the key, or to no one
    Named(ask, ...)          it names objects: another tenant's is answered exactly as one that never existed

Names come from `Objects`, which fill the route's path and, by `ask`, its query and body.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from gateway import futures, service
from gateway.app import create_app
from knapper import limits
from knapper.events.cloudevents import Event
from knapper.exchange.directory import DirectoryExchange
from knapper.ids import EpisodeName, Tenant
from knapper.jobs.notifications import Notifier
from knapper.jobs.services import JobServices
from knapper.state.api_keys import Keys
from knapper.store.memory import MemoryStore
from tests.gateway import saved
from tests.gateway.captured import captured_turn
from tests.gateway.running import MODEL, Running, create_model, fwdbwd, gateway, settings
from tests.gateway.test_json_forward import asked as json_forward
from tests.gateway.test_sampling import asample

Ask = dict[str, Any]  # what httpx's `request` takes besides method and URL


@dataclass(frozen=True)
class Objects:
    """One of each, of one tenant; or such as never existed."""

    session: str
    run: str
    sampler: str
    sample: str  # the request id of a sample under way
    checkpoint: str  # the name of three checkpoints, one of each kind
    job: str  # an episode has the same name

    def path(self, kind: str = "weights") -> str:
        return f"tinker://{self.run}/{kind}/{self.checkpoint}"

    def in_path(self) -> dict[str, str]:
        """What a route's path parameters are filled with."""
        return {
            "session_id": self.session, "run_id": self.run, "sampler_id": self.sampler, "kind": "external_weights",
            "name": self.checkpoint, "job": self.job, "file": "status.json", "episode": self.job,
        }  # fmt: skip

    def ids(self) -> list[str]:
        """The longest first, so that replacing one does not break another."""
        return sorted((getattr(self, each.name) for each in fields(self)), key=len, reverse=True)


def nothing(theirs: Objects, mine: Objects) -> Ask:
    return {}


@dataclass(frozen=True)
class Open:
    why: str


@dataclass(frozen=True)
class Own:
    """`ask`: a request that is served. `shows`: what its owner finds in the answer, and nobody else."""

    ask: Ask = field(default_factory=dict)
    shows: Callable[[Objects], str] | None = None


@dataclass(frozen=True)
class Named:
    """`asks`: requests that name `theirs`, and beside them what is the asker's own.

    `silent`: a missing object is no error, so the owner is not answered otherwise either.
    """

    asks: list[Callable[[Objects, Objects], Ask]]
    silent: bool = False
    path: Callable[[Objects], dict[str, str]] = Objects.in_path


def body(make: Callable[[Objects, Objects], Any]) -> Callable[[Objects, Objects], Ask]:
    return lambda theirs, mine: {"json": make(theirs, mine)}


def operation(**more: Any) -> Named:
    return Named([body(lambda theirs, _: {"model_id": theirs.run, "seq_id": 1, **more})])


def sampler_body(theirs: Objects, mine: Objects) -> Any:
    return {"session_id": theirs.session, "sampling_session_seq_id": 9, "base_model": MODEL.name}


def prompt(model: str) -> Ask:
    return {"json": {"model": model, "prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}}


JOB = {"job.yaml": "kind: sft\ndata: d.jsonl\nsteps: 3\n", "d.jsonl": '{"prompt": "a", "completion": "b"}\n'}
_JSON_RUN = body(lambda theirs, _: {"model_id": theirs.run})
_PROTO = {"Content-Type": "application/x-protobuf"}
_CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
_TEXT = {"prompt": "x", "max_tokens": 1}


MESSAGES: dict[str, dict[str, Any]] = {"": _CHAT, "/count_tokens": {"messages": _CHAT["messages"]}}


def named_models(more: dict[str, Any]) -> Named:
    return Named([
        body(lambda theirs, _: {"model": theirs.path("sampler_weights"), **more}),
        body(lambda theirs, _: {"model": theirs.run, **more}),
    ])  # fmt: skip


def openai_doors(base: str) -> dict[tuple[str, str], Open | Own | Named]:
    return {
        ("GET", f"{base}/models"): Own(shows=lambda owned: owned.path("sampler_weights")),
        ("GET", f"{base}/models/{{name:path}}"): Named(
            [nothing], path=lambda owned: {"name": owned.path("sampler_weights")}
        ),
        ("POST", f"{base}/completions"): Named([
            body(lambda theirs, _: {"model": theirs.path("sampler_weights"), **_TEXT}),
            body(lambda theirs, _: {"model": theirs.run, **_TEXT}),
        ]),
        ("POST", f"{base}/responses"): Named([
            body(lambda theirs, _: {"model": theirs.path("sampler_weights"), "input": "x"}),
            body(lambda theirs, _: {"model": theirs.run, "input": "x"}),
        ]),
        ("POST", f"{base}/chat/completions"): Named([
            body(lambda theirs, _: {"model": theirs.path("sampler_weights"), **_CHAT}),
            body(lambda theirs, _: {"model": theirs.run, **_CHAT}),
        ]),
        **{(method, f"{base}/{{path:path}}"): Own() for method in ("GET", "POST", "PUT", "PATCH", "DELETE")},
    }  # fmt: skip


def _round(owned: Objects) -> dict[str, str]:
    return {**owned.in_path(), "round": "steps", "n": "0", "part": "0", "sample": "0"}


def _pass(owned: Objects) -> dict[str, str]:
    return {**owned.in_path(), "seq": "1", "datum": "0"}


NAMELESS = {
    "path": "nothing",
    "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",
    "size": "1",
    "offset": "0",
}
_ONE = "/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}"
# What the gateway writes by itself, some time after its own tenant's requests.
_CHORES = ("sampled/", "drawn/", "collect/")
_HOURS = {"starting_on": "2026-01-01T00:00:00Z", "ending_before": "2026-01-02T00:00:00Z"}

DOORS: dict[tuple[str, str], Open | Own | Named] = {
    # ---- the protocol
    ("GET", "/api/v1/healthz"): Open("probes have no key; it says that the process answers"),
    ("POST", "/api/v1/auth/token"): Own(),
    ("GET", "/api/v1/auth/apikey/me"): Own(),
    ("DELETE", "/api/v1/auth/apikey/me"): Own(),
    ("POST", "/api/v1/client/config"): Own({"json": {}}),
    ("POST", "/api/v1/client/dynamic_config"): Own({"json": {}}),
    ("GET", "/api/v1/get_server_capabilities"): Own(),
    ("POST", "/api/v1/create_session"): Own({"json": {}}),
    ("POST", "/api/v1/session_heartbeat"): Named([body(lambda theirs, _: {"session_id": theirs.session})]),
    ("POST", "/api/v1/sessions/{session_id}/finish"): Named([body(lambda *_: {"reason": {"type": "success"}})]),
    ("POST", "/api/v1/telemetry"): Named(
        [body(lambda theirs, _: {"events": [], "session_id": theirs.session})], silent=True
    ),
    ("POST", "/api/v1/create_model"): Named([body(lambda theirs, _: create_model(theirs.session, 5))]),
    ("POST", "/api/v1/get_info"): Named([_JSON_RUN]),
    ("POST", "/api/v1/forward"): Named([body(lambda theirs, _: json_forward(theirs.run, 1, "forward_input"))]),
    ("POST", "/api/v1/forward_backward"): Named([
        lambda theirs, _: {"content": fwdbwd(theirs.run, 1), "headers": _PROTO},
        body(lambda theirs, _: json_forward(theirs.run, 1)),
    ]),
    ("POST", "/api/v1/optim_step"): operation(adam_params={}),
    ("POST", "/api/v1/save_weights"): operation(path="x"),
    ("POST", "/api/v1/save_weights_for_sampler"): operation(path="x"),
    ("POST", "/api/v1/save_weights_external"): operation(path="x"),
    ("POST", "/api/v1/load_weights"): Named([
        body(lambda theirs, mine: {
            "path": mine.path(), "optimizer": False, "session_id": theirs.session, "model_seq_id": 6,
        }),
        body(lambda theirs, mine: {"path": mine.path(), "optimizer": False, "model_id": theirs.run, "seq_id": 1}),
        body(lambda theirs, mine: {
            "path": theirs.path(), "optimizer": False, "session_id": mine.session, "model_seq_id": 6,
        }),
    ]),
    ("POST", "/api/v1/create_custom_loss"): Own({"json": {}}),
    ("POST", "/api/v1/retrieve_future"): Named([
        body(lambda theirs, _: {"request_id": f"{theirs.run}:0"}),
        body(lambda theirs, _: {"request_id": theirs.sample}),
    ]),
    ("POST", "/api/v1/retrieve_futures"): Named([
        body(lambda theirs, _: {"target": {"sampling_session_id": theirs.sampler}, "timeout": 0}),
    ]),
    ("POST", "/api/v1/cancel_future"): Named([body(lambda theirs, _: {"request_id": theirs.sample})], silent=True),
    ("POST", "/api/v1/create_sampling_session"): Named([
        body(sampler_body), body(lambda theirs, mine: {**sampler_body(mine, mine), "model_path": theirs.path()}),
    ]),
    ("POST", "/api/v1/join_sampling_session"): Named([body(lambda theirs, _: {"sampling_session_id": theirs.sampler})]),
    ("POST", "/api/v1/asample"): Named([body(lambda theirs, _: asample(theirs.sampler, 7))]),
    ("GET", "/api/v1/samplers/{sampler_id}"): Named([nothing]),
    ("POST", "/api/v1/rewards"): Own({"json": {}}),
    # ---- jobs
    ("POST", "/api/v1/jobs"): Own({"json": {"files": JOB}}),
    ("GET", "/api/v1/jobs"): Own(shows=lambda owned: owned.job),
    ("GET", "/api/v1/jobs/{job}"): Named([nothing]),
    ("DELETE", "/api/v1/jobs/{job}"): Named([nothing]),
    ("POST", "/api/v1/jobs/{job}/cancel"): Named([nothing]),
    ("POST", "/api/v1/jobs/{job}/resume"): Named([nothing]),
    ("GET", "/api/v1/jobs/{job}/files"): Named([nothing]),
    ("GET", "/api/v1/jobs/{job}/files/{file:path}"): Named([nothing]),
    ("GET", "/api/v1/uploads/{sha256}/{size}"): Own(),
    ("PUT", "/api/v1/uploads/{sha256}/{size}/{offset}"): Own({"content": b"x"}),
    ("GET", "/metrics"): Open("counts of this process, told to who comes to its own address, past any ingress"),
    ("POST", "/events"): Open("brokers have no key; it is not there but for this cluster, and believes nothing"),
    ("POST", "/events/dead"): Open("the same; it keeps what it is given, and shows it to operators"),
    # ---- the REST group
    ("GET", "/api/v1/training_runs"): Own(shows=lambda owned: owned.run),
    ("GET", "/api/v1/training_runs/{run_id}"): Named([nothing]),
    ("DELETE", "/api/v1/training_runs/{run_id}"): Named([nothing]),
    ("GET", "/api/v1/training_runs/{run_id}/checkpoints"): Named([nothing]),
    ("GET", "/api/v1/checkpoints"): Own(shows=Objects.path),
    ("POST", "/api/v1/checkpoints/search"): Own({"json": {}}, shows=lambda owned: owned.path()),
    ("DELETE", _ONE): Named([nothing]),
    ("POST", f"{_ONE}/publish"): Named([nothing]),
    ("DELETE", f"{_ONE}/publish"): Named([nothing]),
    ("PUT", f"{_ONE}/ttl"): Named([body(lambda *_: {"ttl_seconds": 7200})]),
    ("GET", f"{_ONE}/archive"): Named([nothing]),
    ("GET", f"{_ONE}/external_weights_urls"): Named([nothing]),
    ("GET", f"{_ONE}/files"): Named([nothing]),
    ("GET", f"{_ONE}/files/{{file}}"): Named(
        [nothing], path=lambda owned: owned.in_path() | {"file": "adapter_config.json"}
    ),
    ("POST", "/api/v1/weights_info"): Named([body(lambda theirs, _: {"tinker_path": theirs.path()})]),
    ("POST", "/api/v1/copy_weights"): Named([
        body(lambda theirs, _: {"source_path": theirs.path(), "destination_project_id": "p"}),
        body(lambda theirs, mine: {"source_path": mine.path(), "session_id": theirs.session, "model_seq_id": 8}),
    ]),
    ("GET", "/api/v1/sessions"): Own(shows=lambda owned: owned.session),
    ("POST", "/api/v1/sessions/search"): Named([body(lambda theirs, _: {"session_id": theirs.session})]),
    ("GET", "/api/v1/sessions/{session_id}"): Named([nothing]),
    ("PUT", "/api/v1/sessions/{session_id}/project"): Named([body(lambda *_: {"project_id": "p"})]),
    ("GET", "/api/v1/sessions/{session_id}/trace_export"): Named([nothing]),
    ("GET", "/api/v1/captures"): Own(shows=lambda owned: owned.job),
    ("GET", "/api/v1/captures/{episode:path}"): Named([nothing]),
    ("DELETE", "/api/v1/captures/{episode:path}"): Named([nothing]),
    ("POST", "/api/v1/captures/{episode:path}/score"): Named([body(lambda *_: {"score": 1.0})]),
    ("GET", "/api/v1/audit"): Own(),
    ("GET", "/api/v1/quota"): Own(shows=lambda _: '"tokens_a_day"'),
    ("GET", "/api/v1/billing/usage/events"): Own({"params": _HOURS}),
    ("GET", "/api/v1/billing/usage/checkpoints/current"): Own(shows=lambda _: '"size_bytes"'),
    ("GET", "/api/v1/links/{token}"): Open("a signed link is its own key; see test_links_are_signed"),
    # ---- the console
    ("GET", "/static/{name}"): Open("its scripts and styles, the same for everyone"),
    ("GET", "/signin"): Open("where one signs in"),
    ("POST", "/signin"): Open("it takes the key in its form; see tests/gateway/console/test_entry.py"),
    ("POST", "/signout"): Own(),
    ("GET", "/"): Own(shows=lambda owned: owned.run),
    ("GET", "/jobs"): Own(shows=lambda owned: owned.job),
    ("GET", "/sessions"): Own(shows=lambda owned: owned.session),
    ("GET", "/sessions/{session_id}"): Named([nothing]),
    ("GET", "/checkpoints"): Own(shows=lambda owned: owned.checkpoint),
    **{("GET", f"/runs/{{run_id}}{part}"): Named([nothing]) for part in ("", "/operations", "/curve", "/live")},
    ("GET", "/runs/{run_id}/passes/{seq}"): Named([nothing], path=_pass),
    ("GET", "/runs/{run_id}/passes/{seq}/{datum}"): Named([nothing], path=_pass),
    ("GET", "/runs/{run_id}/checkpoints/{kind}/{name}"): Named([nothing]),
    ("GET", "/runs/{run_id}/checkpoints/{kind}/{name}/files/{file}"): Named(
        [nothing], path=lambda owned: {**owned.in_path(), "file": "adapter_config.json"}
    ),
    **{("GET", f"/jobs/{{job}}{part}"): Named([nothing]) for part in ("", "/status", "/curve", "/live")},
    ("GET", "/jobs/{job}/files/{file:path}"): Named([nothing]),
    ("GET", "/jobs/{job}/rollouts/{round}/{n}"): Named([nothing], path=_round),
    ("GET", "/jobs/{job}/rollouts/{round}/{n}/{part}/{sample}"): Named([nothing], path=_round),
    ("GET", "/compare"): Named([
        lambda theirs, _: {"params": {"of": theirs.run}},
        lambda theirs, mine: {"params": {"of": [mine.job, theirs.job]}},
    ]),
    ("GET", "/playground"): Own(shows=lambda owned: owned.path("sampler_weights")),
    ("POST", "/playground/chat"): Named([
        body(lambda theirs, _: {"model": theirs.path("sampler_weights"), **_CHAT}),
        body(lambda theirs, _: {"model": theirs.run, **_CHAT}),
    ]),
    ("GET", "/usage"): Own(),
    ("GET", "/usage/stored"): Own(shows=lambda _: "sampler weights"),
    ("GET", "/admin"): Own(),
    ("POST", "/admin/keys"): Own({"data": {"tenant": "bob", "note": "mine"}}),
    ("POST", "/admin/keys/revoke"): Own({"data": {"id": "0123456789ab"}}),
    # ---- OpenAI's protocol
    **{("POST", f"/v1/messages{rest}"): named_models(more) for rest, more in MESSAGES.items()},
    **openai_doors("/v1"),
    **openai_doors("/oai/api/v1"),
}  # fmt: skip


# ---- what there is


def discovered(routes: list[BaseRoute], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(method, path) of every route, below mounts too. Whatever else a router may hold has to be thought about."""
    for route in routes:
        if isinstance(route, Mount) and route.routes:
            yield from discovered(route.routes, prefix + route.path)
        elif isinstance(route, Route):
            yield from ((method, prefix + route.path) for method in sorted((route.methods or {"ANY"}) - {"HEAD"}))
        else:
            yield type(route).__name__, f"{prefix}{getattr(route, 'path', '')}"


ROUTES = list(discovered(list(create_app(MemoryStore(), settings()).routes)))
NAMED = [(*route, n) for route in ROUTES if isinstance(door := DOORS.get(route), Named) for n in range(len(door.asks))]


def test_every_route_is_classified() -> None:
    unknown = [f"{method} {path}" for method, path in ROUTES if (method, path) not in DOORS]
    assert not unknown, f"say in DOORS of {__file__} who may use {', '.join(unknown)}, and how"
    assert not set(DOORS) - set(ROUTES), "routes that are gone"
    assert len(ROUTES) == len(set(ROUTES)) > 50


def test_a_route_of_any_kind_is_found() -> None:
    class Other(BaseRoute):
        path = "/socket"

    app = [
        Mount("/a", routes=[Route("/b", service.healthz, methods=["PUT"])]),
        Mount("/c", app=StaticFiles(directory=Path(__file__).parent)),
        Other(),
    ]
    assert list(discovered(list(app))) == [("PUT", "/a/b"), ("Mount", "/c"), ("Other", "/socket")]


# ---- who asks


@dataclass
class World:
    """A gateway with keys, and two tenants. `keys`: by whose they are."""

    running: Running
    http: httpx.Client
    keys: dict[str, str] = field(default_factory=dict)
    counter: Iterator[int] = field(default_factory=itertools.count)

    def key(self, tenant: str) -> str:
        keys = Keys(self.running.store, self.running.parts.clock)
        n = next(self.counter)
        made: str = self.running.run(keys.create(Tenant(tenant), "", lambda: hashlib.sha256(b"%d" % n).hexdigest()))[0]
        return made

    def ask(self, method: str, path: str, key: str | None, ask: Ask) -> httpx.Response:
        headers = {"Accept": "application/x-protobuf, application/json"} | ask.get("headers", {})
        if key is not None:
            headers["X-API-Key"] = key
        return self.http.request(method, path, **{**ask, "headers": headers})

    def post(self, tenant: str, path: str, body: Any) -> Any:
        return self.ask("POST", f"/api/v1/{path}", self.keys[tenant], {"json": body}).raise_for_status().json()

    def objects(self, tenant: str) -> Objects:
        """New ones, with the tenant's own key where the protocol makes them."""
        session = self.post(tenant, "create_session", {})["session_id"]
        run = self.post(tenant, "create_model", create_model(session))["model_id"]
        name = f"ckpt-{next(self.counter):04d}"
        for seq, kind in enumerate(("weights", "sampler_weights", "external_weights")):
            saved.save(self.running, run, name, kind, seq=seq + 1, tenant=tenant)  # type: ignore[arg-type]
        body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": MODEL.name}
        sampler = self.post(tenant, "create_sampling_session", body)["sampling_session_id"]
        sample = self.post(tenant, "asample", asample(sampler))["request_id"]
        job = self.post(tenant, "jobs", {"name": f"job-{next(self.counter):04d}", "files": JOB})["job"]
        self.running.run(self.running.parts.captures.keep(Tenant(tenant), EpisodeName("", job), captured_turn()))
        return Objects(session, run, sampler, sample, name, job)

    def never(self) -> Objects:
        """Names of the same form that nobody has."""
        digits = hashlib.sha256(b"never %d" % next(self.counter)).hexdigest()[:32]
        return Objects(
            f"ses-{digits}", f"ses-{digits}:train:0", f"ses-{digits}:sample:0", f"s-{digits}-{digits}",
            f"ckpt-f{digits[:3]}", f"job-f{digits[:3]}",  # those that there are have numbers
        )  # fmt: skip

    def stored(self) -> dict[str, bytes]:
        """All but what the gateway writes by the way."""

        async def read() -> dict[str, bytes]:
            kept = [name for name in await self.running.store.list("") if not name.startswith(_CHORES)]
            return {name: await self.running.store.get(name) or b"" for name in kept}

        objects: dict[str, bytes] = self.running.run(read())
        return objects


async def _unheard(_: Event) -> None:
    """Nobody works on jobs here."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    store = MemoryStore()
    job_services = JobServices(
        store, DirectoryExchange(tmp_path_factory.mktemp("exchange")), Notifier(_unheard, time.time), time.time
    )
    with (
        pytest.MonkeyPatch.context() as patch,
        gateway(store, keys=True, jwt=True, job_services=job_services) as running,
    ):
        patch.setattr(futures, "_PAUSED_HOLD_S", 0.05)  # its owner's poll is held; this is about who may poll
        patch.setattr(limits, "poll_hold_s", 0.1)
        with httpx.Client(base_url=running.url, timeout=30) as http:
            world = World(running, http)
            world.keys |= {tenant: world.key(tenant) for tenant in ("alice", "bob")}
            yield world


@pytest.fixture(scope="module")
def owned(world: World) -> Objects:
    """Of bob, and left as they are."""
    return world.objects("bob")


@pytest.fixture(scope="module")
def revoked(world: World) -> list[str]:
    """A key of bob's that has ended, and a token that was issued for it."""
    key = world.key("bob")
    key_id = world.ask("GET", "/api/v1/auth/apikey/me", key, {}).json()["name"]
    token = world.ask("POST", "/api/v1/auth/token", key, {"json": {}}).json()["jwt"]
    assert world.ask("GET", "/api/v1/sessions", token, {}).status_code == 200
    world.running.run(Keys(world.running.store, world.running.parts.clock).revoke(key_id))
    time.sleep(limits.key_fresh_s)
    return [key, token]


def filled(path: str, values: dict[str, str]) -> str:
    """The route's path with its parameters. KeyError for one that `Objects` does not name."""
    for name in [part.strip("{}").partition(":")[0] for part in path.split("/") if part.startswith("{")]:
        path = path.replace(f"{{{name}}}", values[name]).replace(f"{{{name}:path}}", values[name])
    return path


def served(method: str, path: str, owner: Objects) -> tuple[str, Ask]:
    """A request of the owner's that the route serves."""
    match DOORS[method, path]:
        case Named(asks=asks, path=named):
            return filled(path, named(owner)), asks[0](owner, owner)
        case Own(ask=ask):
            return filled(path, NAMELESS), ask
    raise AssertionError("open")


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_strangers_are_refused_everywhere(
    world: World, owned: Objects, revoked: list[str], method: str, path: str
) -> None:
    if isinstance(DOORS[method, path], Open):
        return
    url, ask = served(method, path, owned)
    unreadable = ask if method in ("GET", "DELETE") else {"content": b"\xff not a body"}
    before = world.stored()
    wrong = [None, "", "tml-local", world.keys["bob"][:-1], f"tml-{'0' * 64}", revoked[1][:-2], "eyJ.eyJ.x"]
    for key, given in [*((key, ask) for key in wrong + revoked), (None, unreadable), (revoked[0], unreadable)]:
        answer = world.ask(method, url, key, given)
        assert answer.status_code == 401, f"{key and key[:8]}: {answer.status_code} {answer.text[:300]}"
        error = answer.json()
        code = error["error"]["code"] if path.startswith(("/v1/", "/oai/")) else error["code"]
        assert code in ("unauthorized", "invalid_token")
        assert not [each for each in owned.ids() if each in answer.text]
    assert world.stored() == before


@pytest.mark.parametrize(("method", "path", "n"), NAMED)
def test_another_tenant_s_object_is_answered_as_a_missing_one(world: World, method: str, path: str, n: int) -> None:
    door = DOORS[method, path]
    assert isinstance(door, Named)
    theirs, mine, never = world.objects("bob"), world.objects("alice"), world.never()
    before = {name: data for name, data in world.stored().items() if "alice" not in name}
    others, missing = (
        world.ask(method, filled(path, door.path(named)), world.keys["alice"], door.asks[n](named, mine))
        for named in (theirs, never)
    )
    assert (others.status_code, _shape(others, theirs)) == (missing.status_code, _shape(missing, never))
    after = {name: data for name, data in world.stored().items() if "alice" not in name}
    assert {name: after[name] for name in before} == before, "something of theirs changed"
    assert not [name for name in set(after) - set(before) if theirs.session in name]
    entry = world.running.parts.sample_queue.find(theirs.sample, Tenant("bob"))
    assert entry is not None
    assert not entry.done.is_set(), "their sample was ended"
    owner = world.ask(method, filled(path, door.path(theirs)), world.keys["bob"], door.asks[n](theirs, theirs))
    same = (owner.status_code, _shape(owner, theirs)) == (others.status_code, _shape(others, theirs))
    assert same == door.silent, f"the owner is answered {owner.status_code} {owner.text[:300]}"


def _shape(answer: httpx.Response, names: Objects) -> tuple[str, list[str]]:
    """The body, with each name replaced by what it names, and which headers there are."""
    text = answer.text
    for number, name in enumerate(names.ids()):
        text = text.replace(name, f"<{number}>")
    return text, sorted(answer.headers)


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if isinstance(DOORS.get(route), Own)])
def test_what_is_not_named_shows_only_one_s_own(world: World, method: str, path: str) -> None:
    door = DOORS[method, path]
    assert isinstance(door, Own)
    owned = world.objects("bob")
    url = filled(path, NAMELESS)
    others = world.ask(method, url, world.key("alice"), door.ask)
    assert others.status_code != 401
    assert not [name for name in owned.ids() if name in others.text]
    if door.shows is not None:
        assert door.shows(owned) in world.ask(method, url, world.key("bob"), door.ask).text


def test_what_is_public_can_be_read_by_others_and_changed_by_none(world: World) -> None:
    """As Tinker has it: who knows the path of a published checkpoint may load it, sample from it, copy it."""
    theirs, mine = world.objects("bob"), world.objects("alice")
    prefix = f"/api/v1/training_runs/{theirs.run}/checkpoints"
    for kind in ("weights", "sampler_weights", "external_weights"):
        published = world.ask("POST", f"{prefix}/{kind}/{theirs.checkpoint}/publish", world.keys["bob"], {})
        assert published.status_code == 200
    path = theirs.path()
    copied = {"source_path": path, "session_id": mine.session, "model_seq_id": 7}
    for name, asked in (
        ("weights_info", {"tinker_path": path}),
        ("load_weights", {"path": path, "optimizer": False, "session_id": mine.session, "model_seq_id": 4}),
        ("create_sampling_session", {"session_id": mine.session, "sampling_session_seq_id": 4, "model_path": path}),
        ("copy_weights", copied),
    ):
        world.post("alice", name, asked)
    urls = f"{prefix}/external_weights/{theirs.checkpoint}/external_weights_urls"
    link = world.ask("GET", urls, world.keys["alice"], {}).json()["urls"]["adapter_config.json"]
    assert world.http.get(link).content == saved.FILES["adapter_config.json"]
    for method, tail, ask in (
        ("DELETE", "", {}), ("DELETE", "/publish", {}), ("PUT", "/ttl", {"json": {"ttl_seconds": 7200}}),
    ):  # fmt: skip
        changed = world.ask(method, f"{prefix}/weights/{theirs.checkpoint}{tail}", world.keys["alice"], ask)
        assert changed.status_code == 404
    assert theirs.run not in world.ask("GET", "/api/v1/checkpoints", world.keys["alice"], {}).text
    private = world.ask("DELETE", f"{prefix}/external_weights/{theirs.checkpoint}/publish", world.keys["bob"], {})
    assert private.status_code == 200
    assert world.http.get(link).status_code == 404, "links outlive what they lead to"


def test_links_are_signed(world: World) -> None:
    """A link needs no key; changed by a byte, or made by another server, it leads nowhere."""
    theirs = world.objects("bob")
    path = f"/api/v1/training_runs/{theirs.run}/checkpoints/external_weights/{theirs.checkpoint}/external_weights_urls"
    link = next(iter(world.ask("GET", path, world.keys["bob"], {}).json()["urls"].values()))
    assert world.http.get(link).status_code == 200
    head, _, token = link.rpartition("/")
    changed = [token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :] for at in range(0, len(token) - 1, 7)]
    for wrong in (*changed, token[:-4], token[:10], "x", "%00", json.dumps({"kind": "weights"})):
        assert world.http.get(f"{head}/{wrong}").status_code == 404
