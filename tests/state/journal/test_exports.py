"""What saves and loads do beyond the state, with a small machine over a memory store."""

import asyncio
import json
from typing import Any

import msgspec
import pyrage

from knapper import ids
from knapper.ids import RunId, SessionId, TinkerPath
from knapper.state import layout
from knapper.state.checkpoints import Checkpoint, Checkpoints
from knapper.state.journal import bundles
from knapper.state.journal.accept import Acceptor, pack
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Commit, Creation, Kind, Spec, Terms
from knapper.state.journal.run import Run
from knapper.store.memory import MemoryStore
from tests.sim.ledger import SIZE, LedgerMachine, LedgerState

RUN = ids.make_run_id(SessionId("ses-" + "a" * 32), 0)
SPEC = Spec(
    run=RUN, tenant="local", base_model="m", rank=4, alpha=32.0, seed=1, train_attn=True, train_mlp=True,
    train_unembed=True,
)  # fmt: skip


def clock() -> float:
    return 1_000.0


class Bench:
    """One run and its store."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.acceptor = Acceptor(self.store, clock)

    async def apply(self, epoch_name: str) -> list[dict[str, Any]]:
        """Claim the run as a new process, apply what waits, and return the answers."""
        holder = Holder(epoch_name, "", Terms(device="cpu", dtype="float32", threads=1, versions=""))
        run: Run[LedgerState] = await Run.claim(self.store, RUN, LedgerMachine(), holder, clock)
        answers: list[dict[str, Any]] = []

        async def publish(_n: int, commit: Commit) -> None:
            answers.extend(json.loads(result.body) for result in commit.results)

        while await run.apply_pending(lambda: False, publish):
            await run.snapshot()
        return answers

    async def accept(self, seq: int, kind: Kind, **asked: Any) -> None:
        body = json.dumps({"model_id": RUN, "seq_id": seq, "type": kind} | asked).encode()
        await self.acceptor.accept(RUN, seq, kind, pack(body))


def test_an_external_save_has_a_name_of_its_own_and_no_optimizer() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.acceptor.create(Creation(spec=SPEC), b"made")
        await bench.accept(1, "save_weights", path="a")
        await bench.accept(2, "save_weights_external", path="a", ttl_seconds=3600)
        await bench.accept(3, "save_weights_external", path="a")
        await bench.accept(4, "save_weights_external", path="../a")
        await bench.accept(5, "save_weights_external", path="b", age_encryption_recipients=["age1"])
        _, _, saved, again, wrong, encrypted = await bench.apply("first")
        assert saved["path"] == f"tinker://{RUN}/external_weights/a"
        assert "exists already" in again["error"]
        assert "path is '../a'" in wrong["error"]
        assert "age_encryption_recipients[0] is 'age1...'; allowed: native public keys" in encrypted["error"]
        found = await Checkpoints(bench.store, clock).resolve(TinkerPath.parse(saved["path"]), "local")
        assert found.expires_at == clock() + 3600
        index, files = await bundles.read(bench.store, found.bundle)
        assert list(files) == ["weights"]
        assert saved["size_bytes"] == found.size_bytes == sum(part.size for part in index.parts)

    asyncio.run(story())


def test_a_replayed_save_does_not_bring_a_deleted_checkpoint_back() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.acceptor.create(Creation(spec=SPEC), b"made")
        await bench.accept(1, "save_weights", path="a")
        await bench.apply("first")
        checkpoints = Checkpoints(bench.store, clock)
        path = TinkerPath(RunId(RUN), "weights", "a")
        [found] = await checkpoints.listed("local")
        await checkpoints.delete(path, "local")
        await checkpoints.save(found, overwrite=False)  # what a process that died after it, and before its commit, does
        assert await checkpoints.deleted(path, "local")
        assert await checkpoints.listed("local") == []

    asyncio.run(story())


def test_a_run_whose_source_was_deleted_before_it_was_made_fails_in_words() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.acceptor.create(Creation(spec=SPEC, source="adapters/gone/"), b"made")
        await bench.accept(1, "optim_step")
        made, stepped = await bench.apply("first")
        assert "was deleted" in made["error"]
        assert made["category"] == "user"
        assert "never made" in stepped["error"]

    asyncio.run(story())


def test_a_load_reaches_another_tenant_s_checkpoint_only_while_it_is_public() -> None:
    """Through the journal, where no gateway looks any more; private, it is answered as one that never existed."""

    async def story() -> None:
        bench = Bench()
        theirs = ids.make_run_id(SessionId("ses-" + "b" * 32), 0)
        spec = msgspec.structs.replace(SPEC, run=theirs, tenant="bob")
        await bench.acceptor.create(Creation(spec=spec), b"theirs")
        await bench.acceptor.create(Creation(spec=SPEC), b"made")
        checkpoints = Checkpoints(bench.store, clock)
        path = TinkerPath(theirs, "weights", "a")
        bundle = layout.export(theirs, 1, 1)
        files = {"weights": bytes(4 * SIZE)}
        await bundles.write(bench.store, bundle, files, spec=spec, seq=1, epoch=1)
        saved = Checkpoint(
            path=str(path), tenant="bob", base_model="m", rank=4, bundle=bundle, seq=1, size_bytes=2, saved_at=clock()
        )
        await checkpoints.save(saved, overwrite=False)
        await bench.accept(1, "load_weights", path=str(path), optimizer=False)
        await bench.accept(2, "load_weights", path=str(path).replace("/a", "/b"), optimizer=False)
        _, private, missing = await bench.apply("first")
        assert private["error"] == missing["error"].replace("/b ", "/a ")
        await checkpoints.publish(path, "bob", True)
        await bench.accept(3, "load_weights", path=str(path), optimizer=False)
        [public] = await bench.apply("second")
        assert public == {"loaded": True}

    asyncio.run(story())


def test_a_load_of_an_encrypted_checkpoint_is_refused() -> None:
    async def story() -> None:
        bench = Bench()
        recipient = str(pyrage.x25519.Identity.generate().to_public())
        await bench.acceptor.create(Creation(spec=SPEC), b"made")
        await bench.accept(1, "save_weights_external", path="a", age_encryption_recipients=[recipient])
        _, saved = await bench.apply("first")
        await bench.accept(2, "load_weights", path=saved["path"], optimizer=False)
        [loaded] = await bench.apply("second")
        assert "is encrypted for its recipients" in loaded["error"]
        assert loaded["category"] == "user"

    asyncio.run(story())
