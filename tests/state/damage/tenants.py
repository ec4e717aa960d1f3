"""A server with two tenants, and one of every kind of object that a gateway, a trainer and a job leave behind."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from starlette.testclient import TestClient

from gateway.app import create_app
from knapper.catalogue.served_models import Catalogue
from knapper.exchange.directory import DirectoryExchange
from knapper.ids import EpisodeName, RunId, SamplerId, SessionId, Tenant, TinkerPath
from knapper.jobs.names import Start
from knapper.jobs.notifications import Notifier
from knapper.jobs.services import JobServices
from knapper.state import dead_letters, layout, ledger_entries, probe_results, usage
from knapper.state.alarms import Alarms
from knapper.state.api_keys import Keys
from knapper.state.captures import Captures
from knapper.state.checkpoints import Checkpoint, Checkpoints
from knapper.state.dead_letters import DeadLetter
from knapper.state.drawn_samples import DrawnSamplesLog, DrawnTogether
from knapper.state.gc.uses import SamplerUses
from knapper.state.job_records import (
    EnvironmentAnswers,
    Evaluated,
    Rollouts,
    SampledTurns,
    Scores,
    Spent,
    Trained,
    TrialEnded,
    Waiting,
    encode,
)
from knapper.state.journal import bundles, ends
from knapper.state.journal.records import Alarm, Commit, Drawn, End, Manifest, Result, Terms
from knapper.state.probe_results import ProbeResult
from knapper.state.quotas import QuotaBook
from knapper.state.sessions import Sampler, Samplers
from knapper.state.signed_links import Link, Links
from knapper.state.usage import Sampled, Samplings
from knapper.store import Store
from tests.gateway.captured import captured_turn
from tests.gateway.running import MODEL, create_model, fwdbwd, settings
from tests.gateway.saved import FILES, spec

AT = 1_800_000_000.0
TENANTS = (Tenant("one"), Tenant("two"))
_TERMS = Terms(device="cpu", dtype="float32", threads=1, versions="")
_JOB = {
    "job.yaml": "kind: sft\ndata: d.jsonl\nsteps: 3\nbase_model: tiny/model\n",
    "d.jsonl": '{"prompt": "a", "completion": "b"}\n',
}
_SWEEP = _JOB | {
    "job.yaml": _JOB["job.yaml"] + "evaluate: {data: d.jsonl}\nsweep: {over: {lora.rank: [2, 4, 8]}, at_once: 2}\n"
}


@dataclass
class Server:
    """Of a store and an exchange. `keys`: each tenant's."""

    store: Store
    exchange: Path
    keys: dict[Tenant, str]
    made: dict[Tenant, dict[str, Any]] = field(default_factory=dict)

    def client(self) -> TestClient:
        """Of a gateway that has seen nothing yet, whose defects answer 500."""
        place = JobServices(self.store, DirectoryExchange(self.exchange), Notifier(_nobody, lambda: AT), lambda: AT)
        app = create_app(self.store, settings(keys=True, jwt=True), job_services=place, clock=lambda: AT)
        return TestClient(app, base_url="http://testserver/api/v1/", raise_server_exceptions=False)

    def asked(self, client: TestClient, tenant: Tenant, method: str, path: str, **more: Any) -> Any:
        return client.request(method, path, headers={"X-API-Key": self.keys[tenant]}, **more)


async def _nobody(_event: object) -> None:
    """Nothing listens at this Broker."""


def furnished(store: Store, exchange: Path) -> Server:
    """All kinds of objects are there."""
    made = Keys(store, lambda: AT)
    secrets = iter(f"{n:064x}" for n in range(len(TENANTS)))
    keys = {tenant: asyncio.run(made.create(tenant, "", secrets.__next__))[0] for tenant in TENANTS}
    revoked = asyncio.run(made.create(TENANTS[0], "old", lambda: "c" * 64))[1]
    asyncio.run(made.revoke(revoked.id))
    for name in (MODEL.name, "tiny/other"):
        asyncio.run(Catalogue(store).publish(msgspec.structs.replace(MODEL, name=name)))
    asyncio.run(dead_letters.keep(store, DeadLetter(attributes={"id": "1"}, body=b"{}", kept_at=AT)))
    asyncio.run(dead_letters.keep(store, DeadLetter(attributes={"id": "2"}, body=b"{}", kept_at=AT)))
    probed = ProbeResult(product="forward 64x48 float32", least=8, block=0, invariant=True)
    asyncio.run(probe_results.keep(store, "f" * 64, probed))
    book = QuotaBook(store, lambda: AT)
    for runs in (100, 200):
        asyncio.run(book.change(lambda newest, runs=runs: newest.changed("one", {"runs": runs})))  # type: ignore[misc]
    link = Link(kind="trace", tenant="one", subject="", expires_at=AT)
    asyncio.run(Links(store, lambda: AT, lambda: "d" * 32).sign(link))
    server = Server(store, exchange, keys)
    with server.client() as client:
        for tenant in TENANTS:
            server.made[tenant] = _lived(server, client, tenant)
    return server


def _lived(server: Server, client: TestClient, tenant: Tenant) -> dict[str, Any]:
    """What a client does, and what others do for it."""

    def ask(method: str, path: str, **more: Any) -> Any:
        reply = server.asked(client, tenant, method, path, **more)
        assert reply.status_code == 200, reply.text
        return reply.json()

    sessions, runs = [], []
    for _ in range(3):
        session = ask("POST", "create_session", json={"tags": [], "sdk_version": "0.38.0"})["session_id"]
        sessions.append(session)
        run = ask("POST", "create_model", json=create_model(session))["model_id"]
        runs.append(RunId(run))
        # They wait: nobody listens at train_step.
        headers = {"X-API-Key": server.keys[tenant], "Content-Type": "application/x-protobuf"}
        assert client.post("forward_backward", content=fwdbwd(run, 1), headers=headers).status_code == 200
        ask("POST", "optim_step", json={"model_id": run, "seq_id": 2, "adam_params": {"learning_rate": 1e-3}})
        ask("PUT", f"sessions/{session}/project", json={"project_id": "p"})
        ask("POST", "create_sampling_session", json={
            "session_id": session, "sampling_session_seq_id": 1, "base_model": MODEL.name,
        })  # fmt: skip
    ask("POST", f"sessions/{sessions[0]}/finish", json={"reason": {"type": "success"}})
    ask("POST", "jobs", json={"name": "first", "files": _JOB})
    started = ask("POST", "jobs", json={"name": "second", "files": _JOB})
    refused = ask("POST", "jobs", json={"name": "wrong", "files": {**_JOB, "job.yaml": "kind: nonsense\n"}})
    ask("POST", "jobs/second/cancel")
    swept = ask("POST", "jobs", json={"name": "sweep", "files": _SWEEP})  # its trials begin
    ask("POST", "jobs/sweep.1/cancel")
    ask("POST", "jobs/sweep/cancel")
    captures = Captures(server.store, lambda: AT, lambda: "e" * 32)
    for name in ("first", "second"):
        asyncio.run(captures.keep(tenant, EpisodeName("group", name), captured_turn()))
        ask("POST", f"captures/group/{name}/score", json={"score": 0.5})
    start = Start(tenant, "second", started["start"])
    asyncio.run(_worked(server.store, tenant, runs, SessionId(sessions[0]), start))
    for n in (1, 2):
        ended = TrialEnded(state="cancelled", reason="cancelled by its owner", at=AT)
        key = Start(tenant, "sweep", swept["start"]).trial_ended(n)
        asyncio.run(server.store.put_if_absent(key, encode(ended)))
    for run in runs[:2]:
        path = asyncio.run(_saved(server.store, tenant, run))
        asyncio.run(_snapshot(server.store, tenant, run))
        ask("POST", f"training_runs/{run}/checkpoints/weights/a/publish")
        made = {"session_id": sessions[1], "sampling_session_seq_id": 5 + runs.index(run), "model_path": path}
        ask("POST", "create_sampling_session", json=made)
    return {"sessions": sessions, "runs": runs, "jobs": ["first", "second", refused["job"]]}


async def _worked(store: Store, tenant: Tenant, runs: list[RunId], session: SessionId, start: Start) -> None:
    for run in runs:
        await store.put_if_absent(layout.commit(run, 1), encode(Commit(epoch=1, results=[])))
        result = Result(seq=0, sha256=b"", content_type="application/json", body=b'{"model_id": "m"}')
        commit = Commit(epoch=1, results=[result], committed_at=AT, device_s=1.0)
        await store.put_if_absent(layout.commit(run, 2), encode(commit))
    inflight = Sampler(
        sampler=SamplerId(f"{session}:sample:9"), tenant=tenant, base_model=MODEL.name, bundle="", kind="inflight",
        run=runs[0], seq=1,
    )  # fmt: skip
    await Samplers(store).create(inflight)
    uses = SamplerUses(store, "another", 900.0, lambda: AT, lambda: AT)
    uses.record(SamplerId(inflight.sampler))
    await uses.show()
    await ends.end(store, RunId(f"{session}:train:7"), End(reason="deleted", tenant=tenant, at=AT))
    hour = int(AT // usage.HOUR_S)
    for n in range(2):
        rows = [Sampled(session=session, base_model=MODEL.name, prompt=1 + n, sampled=2, device_s=0.5)]
        await store.put_if_absent(usage.record_name(tenant, hour, f"minute-{n}"), encode(Samplings(rows=rows)))
    await ledger_entries.write(
        store, tenant, ledger_entries.LedgerEntry(hour, runs[0], ledger_entries.Through(1, 2), 3, 1.5)
    )
    for step in range(2):
        times: dict[str, Any] = {"began_at": AT, "ended_at": AT}
        trained = Trained(next_seq=1, steps=3, metrics={"loss": 1.0}, tokens=1, bytes=1, spent=Spent(), **times)
        await store.put_if_absent(start.trained(step), encode(trained))
        evaluated = Evaluated(next_seq=1, metrics={"loss": 1.0}, tokens=1, bytes=1, spent=Spent(), **times)
        await store.put_if_absent(start.evaluated(step), encode(evaluated))
        rollouts = Rollouts(row=0, prompt_tokens=b"\0" * 8, rollouts=[], **times)
        await store.put_if_absent(start.rollouts("steps", step, 0), encode(rollouts))
        drawn = Drawn(
            run="", seq=0, step=0, digest="", sampler="engine", temperature=1.0, truncated=False, datums=1
        )  # fmt: skip
        turn = SampledTurns(turns=[None], drawn=drawn, **times)
        await store.put_if_absent(start.turn("steps", step, 0, 0), encode(turn))
        await store.put_if_absent(
            start.answered("steps", step, 0, 0), encode(EnvironmentAnswers(row=0, answers=[None], **times))
        )
        await store.put_if_absent(start.scores("steps", step, 0), encode(Scores(scores=[], **times)))
    await store.put_if_absent(start.waiting, encode(Waiting(since=AT)))


async def _saved(store: Store, tenant: Tenant, run: RunId) -> str:
    path, bundle = TinkerPath(run, "weights", "a"), layout.export(run, 1, 1)
    await bundles.write(store, bundle, FILES, spec=spec(run, tenant), seq=1, epoch=1)
    saved = Checkpoint(
        path=str(path), tenant=tenant, base_model=MODEL.name, rank=4, bundle=bundle, seq=1, size_bytes=1, saved_at=AT
    )
    await Checkpoints(store, lambda: AT).save(saved, overwrite=False)
    return str(path)


async def _snapshot(store: Store, tenant: Tenant, run: RunId) -> None:
    prefix = layout.snapshot(run, 0, 1)
    await bundles.write(store, prefix, {"state": b"weights" * 10}, spec=spec(run, tenant), seq=0, epoch=1)
    manifest = Manifest(epoch=1, holder="h", address="", claimed_at=AT, terms=_TERMS, snapshot=prefix, snapshot_seq=0)
    await store.put_if_absent(layout.manifest(run, 1), encode(manifest))
    alarm = Alarm(name="stale_sampler", seq=1, step=1, message="a stale sampler", at=AT)
    await Alarms(store).put(run, alarm)
    drawn = Drawn(run=run, seq=1, step=1, digest="0" * 16, sampler="engine float32", datums=0)
    together = DrawnTogether(drawn=drawn, fingerprints=[b"\0" * 8])
    await DrawnSamplesLog(store).append(tenant, AT, "0" * 32, [together])
