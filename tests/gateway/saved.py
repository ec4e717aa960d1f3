"""Runs and checkpoints of any tenant, stored as train_step stores them, and a clock that the test advances."""

import hashlib

from knapper import ids
from knapper.ids import CheckpointKind, RunId, SessionId, TinkerPath
from knapper.state import layout
from knapper.state.checkpoints import Checkpoint, Checkpoints
from knapper.state.journal import bundles
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.records import Creation, Spec
from knapper.state.sessions import Session
from knapper.state.tenant_index import Register
from tests.gateway.running import MODEL, Running

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 100}
SIZE = sum(map(len, FILES.values()))
OTHER = "other"


class Clock:
    """Seconds since the epoch, and monotonic seconds."""

    def __init__(self, at: float = 1_800_000_000.0) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


def save(
    running: Running, run: str, name: str, kind: CheckpointKind = "weights", *, seq: int = 1, tenant: str = "local",
    public: bool = False, ttl_s: float = 0.0,
) -> str:  # fmt: skip
    """The tinker:// path of a new checkpoint."""
    path = TinkerPath(RunId(run), kind, name)
    bundle = layout.export(path.run, seq, 1)
    now = running.parts.clock()
    checkpoint = Checkpoint(
        path=str(path), tenant=tenant, base_model=MODEL.name, rank=4, bundle=bundle, seq=seq, size_bytes=SIZE,
        saved_at=now, expires_at=now + ttl_s if ttl_s else 0.0, public=public, user_metadata={"note": name},
    )  # fmt: skip

    async def store() -> None:
        await bundles.write(running.store, bundle, FILES, spec=spec(run, tenant), seq=seq, epoch=1)
        await Checkpoints(running.store, running.parts.clock).save(checkpoint, overwrite=False)

    running.run(store())
    return str(path)


def spec(run: str, tenant: str = "local") -> Spec:
    return Spec(
        run=run, tenant=tenant, base_model=MODEL.name, rank=4, alpha=32.0, seed=1, train_attn=True, train_mlp=True,
        train_unembed=False,
    )  # fmt: skip


def others_run(running: Running, n: int = 0) -> str:
    """A run of another tenant."""
    session = SessionId("ses-" + hashlib.sha256(b"other").hexdigest()[:32])
    run = ids.make_run_id(session, n)
    record = Session(session=session, tenant=OTHER, created_at=running.parts.clock())

    async def make() -> None:
        await Register(running.store).add_session(record)
        await running.parts.lookups.sessions.find_or_create(record)
        await Register(running.store).add_run(record, run)
        await Acceptor(running.store, running.parts.clock).create(Creation(spec=spec(run, OTHER)), run.encode())

    running.run(make())
    return run


def bundle_names(running: Running) -> list[str]:
    """Objects of adapters that lie in the store."""
    names: list[str] = running.run(running.store.list("adapters/"))
    return names
