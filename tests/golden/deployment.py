"""Whole stores as the product wrote them: a run with a snapshot, exports, a checkpoint and a sampler. None is changed.

A new way to store any of it needs a new one:  python -m tests.golden.deployment
"""

import asyncio
import hashlib
import io
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np

from knapper.engine.executor import Executor
from knapper.engine.models import weights
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.decoder import Decoder
from knapper.engine.run_machine import TrainingMachine
from knapper.engine.training.trainer import RunState, Trainer
from knapper.state.journal.accept import Acceptor, pack
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Commit, Creation, Kind, Spec, Terms
from knapper.state.journal.run import Run
from knapper.store.memory import MemoryStore
from knapper.wire import proto
from knapper.wire.types import Datum, ForwardBackward
from tests.engine.tiny import tiny_model
from tests.sim.history import RUN

FILES = Path(__file__).parent / "deployments"
_SPEC = Spec(
    run=RUN, tenant="local", base_model="tiny", rank=1, alpha=32.0, seed=3,
    train_attn=True, train_mlp=False, train_unembed=False,
)  # fmt: skip


@contextmanager
def machine(directory: Path) -> Iterator[TrainingMachine]:
    """A trainer of the tiny model that all these stores are of."""
    config = ModelConfig.read(tiny_model(directory))
    device = Executor("golden")
    yield TrainingMachine(Trainer(Decoder(config, weights.load(directory, config))), device, time.monotonic)
    device.close()


async def claimed(store: MemoryStore, machine: TrainingMachine) -> Run[RunState]:
    terms = Terms(device="golden", dtype="float32", threads=1, versions="golden")
    return await Run.claim(store, RUN, machine, Holder("golden", "", terms), lambda: 1e9)


async def digest_of(machine: TrainingMachine, run: Run[RunState]) -> str:
    """SHA-256 of all that the run's state is."""
    assert run.state is not None
    whole = hashlib.sha256()
    for name, data in sorted((await machine.serialize(run.state)).items()):
        whole.update(name.encode() + bytes(data))
    return whole.hexdigest()


def opened(path: Path) -> tuple[MemoryStore, str]:
    """The store in the file, and the digest of its run."""

    async def fill() -> MemoryStore:
        store = MemoryStore()
        for name in archive.namelist():
            await store.put_if_absent(name, archive.read(name))
        return store

    with zipfile.ZipFile(path) as archive:
        return asyncio.run(fill()), archive.comment.decode()


async def _trained(machine: TrainingMachine) -> tuple[MemoryStore, str]:
    store = MemoryStore()
    acceptor = Acceptor(store, lambda: 1e9)
    await acceptor.create(Creation(spec=_SPEC), b"create")
    inputs: dict[str, np.ndarray] = {"target_tokens": np.array([5, 6, 7], np.int64), "weights": np.ones(3, np.float32)}
    datum = Datum(np.array([4, 5, 6], np.int32), inputs)
    passed = proto.encode_forward_backward(ForwardBackward(RUN, 1, [datum], "cross_entropy", {}, False))
    plan: list[tuple[Kind, bytes]] = [
        ("forward_backward", passed),
        ("optim_step", _body(2, adam_params={"learning_rate": 1e-2})),
        ("save_weights", _body(3, path="golden")),
        ("save_weights_for_sampler", _body(4, sampling_session_seq_id=1)),
    ]
    for seq, (kind, body) in enumerate(plan, 1):
        await acceptor.accept(RUN, seq, kind, pack(body))

    async def nothing(_n: int, commit: Commit) -> None:
        assert not any(result.failed for result in commit.results), commit

    run = await claimed(store, machine)
    while await run.apply_pending(lambda: False, nothing):
        pass
    await run.snapshot()
    return store, await digest_of(machine, run)


def _body(seq: int, **asked: object) -> bytes:
    return msgspec.json.encode({"model_id": RUN, "seq_id": seq} | asked)


def main() -> None:
    async def objects(store: MemoryStore) -> dict[str, bytes]:
        return {name: await store.get(name) or b"" for name in await store.list("")}

    with TemporaryDirectory() as scratch, machine(Path(scratch) / "tiny") as trainer:
        store, digest = asyncio.run(_trained(trainer))
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in asyncio.run(objects(store)).items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
        archive.comment = digest.encode()
    FILES.mkdir(exist_ok=True)
    path = FILES / f"{len([*FILES.iterdir()]) + 1:03d}.zip"
    path.write_bytes(written.getvalue())
    print(path.relative_to(Path.cwd()))


if __name__ == "__main__":
    main()
