"""Finished sessions, runs with checkpoints, and jobs, as the real components store them."""

import hashlib
from collections.abc import Callable

import numpy as np

from knapper import ids
from knapper.ids import LOCAL_TENANT, RunId, SamplerId, SessionId, Tenant, TinkerPath
from knapper.jobs import control, spec
from knapper.jobs.names import Start
from knapper.state import layout
from knapper.state.checkpoints import Checkpoint, Checkpoints
from knapper.state.job_records import Spent, Started, Trained, encode
from knapper.state.journal.accept import Acceptor, pack
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Creation, Kind, Spec
from knapper.state.journal.run import Run
from knapper.state.sessions import Finish, Sampler, Samplers, Session, Sessions
from knapper.state.tenant_index import Register
from knapper.store import Store
from tests.gateway.running import MODEL
from tests.sim.history import TERMS
from tests.sim.ledger import SIZE, LedgerMachine

ROW = np.ones(SIZE, np.float32).tobytes()


def run_of(n: int, what: str = "finished") -> RunId:
    return ids.make_run_id(SessionId(f"ses-{hashlib.sha256(f'{what} {n}'.encode()).hexdigest()[:32]}"), 0)


def spec_of(run: RunId, tenant: Tenant = LOCAL_TENANT) -> Spec:
    return Spec(
        run=run, tenant=tenant, base_model=MODEL.name, rank=4, alpha=32.0, seed=1, train_attn=True, train_mlp=True,
        train_unembed=False,
    )  # fmt: skip


async def lay_runs(store: Store, clock: Callable[[], float], count: int, tenant: Tenant = LOCAL_TENANT) -> list[RunId]:
    """Each of a session that has finished: a pass, a step, a checkpoint, and a sampler of it."""
    runs = [run_of(n, tenant) for n in range(count)]
    for run in runs:
        await begin(store, clock, run, tenant)
        await apply(store, clock, run, [("forward_backward", ROW), ("optim_step", b"{}")])
        session = ids.session_of(run)
        path, bundle = TinkerPath(run, "sampler_weights", "end"), layout.export(run, 2, 1)
        saved = Checkpoint(
            path=str(path), tenant=tenant, base_model=MODEL.name, rank=4, bundle=bundle, seq=2, size_bytes=9,
            saved_at=clock(),
        )  # fmt: skip
        await Checkpoints(store, clock).save(saved, overwrite=False)
        sampler = ids.make_sampler_id(session, 0)
        await Samplers(store).create(
            Sampler(sampler=SamplerId(sampler), tenant=tenant, base_model=MODEL.name, bundle=bundle)
        )
        await store.put_if_absent(f"{bundle}index", b"")
        await Sessions(store).finish(session, Finish(reason="success", detail="", finished_at=clock()))
    return runs


async def begin(store: Store, clock: Callable[[], float], run: RunId, tenant: Tenant = LOCAL_TENANT) -> None:
    """A run of a session of its own."""
    session = Session(session=ids.session_of(run), tenant=tenant, created_at=clock())
    await Register(store).add_session(session)
    await Sessions(store).find_or_create(session)
    await Register(store).add_run(session, run)
    await Acceptor(store, clock).create(Creation(spec=spec_of(run, tenant)), b"create")


async def apply(
    store: Store, clock: Callable[[], float], run: RunId, operations: list[tuple[Kind, bytes]], first: int = 1
) -> None:
    """Accept and commit them, each alone."""
    acceptor, seen = Acceptor(store, clock), []

    async def publish(n: int, commit: object) -> None:
        seen.append(n)

    held = await Run.claim(store, run, LedgerMachine(), Holder(f"h{first}", "", TERMS), clock)
    await held.apply_pending(lambda: False, publish)
    for seq, (kind, body) in enumerate(operations, first):
        await acceptor.accept(run, seq, kind, pack(body))
        await held.apply_pending(lambda: False, publish)


async def lay_jobs(store: Store, clock: Callable[[], float], count: int) -> None:
    """Each of two steps, and completed."""
    job_yaml = b"kind: sft\ndata: d.jsonl\nsteps: 2\n"
    spec_json = spec.encode(spec.parse(job_yaml).job)
    for n in range(count):
        start = Start.of(LOCAL_TENANT, f"job-{n}", "1")
        started = Started(
            tenant=LOCAL_TENANT, job=start.job, start=start.id, generation="1", spec_json=spec_json, job_yaml=job_yaml,
            files={}, files_bytes=0, base_model=MODEL.name, model="", rows=1, held_out=0, started_at=clock(),
        )  # fmt: skip
        at = int(clock() * 1e6) + n
        await store.put_if_absent(start.listed, b"")
        await store.put_if_absent(layout.ObjectKind.TENANT_JOB.key(LOCAL_TENANT, at, start.job, start.id), b"")
        await store.put_if_absent(layout.ObjectKind.TENANT_START.key(LOCAL_TENANT, start.job, at, start.id), b"")
        await store.put_if_absent(start.started, encode(started))
        for step in range(2):
            trained = Trained(
                next_seq=1, steps=2, metrics={}, tokens=1, bytes=1, spent=Spent(), began_at=0.0, ended_at=1.0
            )
            await store.put_if_absent(start.trained(step), encode(trained))
        await control.change(store, start, "completed", "", clock())
