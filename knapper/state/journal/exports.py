"""Saves and loads: an export becomes a checkpoint or a sampler, a path becomes the bundle to load."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from knapper import ids
from knapper.errors import InvalidField, UserError
from knapper.ids import RunId, TinkerPath
from knapper.state import layout
from knapper.state.checkpoints import Checkpoint, Checkpoints
from knapper.state.journal import bundles
from knapper.state.journal.machine import Files
from knapper.state.journal.records import Operation, Spec
from knapper.state.sessions import Sampler, Samplers
from knapper.store import Store
from knapper.wire import requests
from knapper.wire.encryption import expect_recipients


@dataclass(frozen=True)
class Export:
    """The files of a save, as they are stored; `size` in bytes."""

    bundle: str
    size: int


class Saves:
    """Runs inside a claim, before the commit that publishes the result. Idempotent, from any process."""

    def __init__(self, store: Store, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._checkpoints = Checkpoints(store, clock)

    async def source(self, operation: Operation, spec: Spec) -> str:
        """The bundle of a load_weights operation. Raises UserError if there is none that the tenant may read."""
        request = requests.decode(operation.body(), requests.LoadWeights)
        checkpoint = await self._checkpoints.resolve(TinkerPath.parse(request.path), spec.tenant)
        checkpoint.expect_plain()
        index = await bundles.read_index(self._store, checkpoint.bundle)
        if index is None:
            raise UserError(f"checkpoint {request.path} has no files any more; load another one")
        if request.optimizer and not any(part.name == "optimizer.safetensors" for part in index.parts):
            raise InvalidField(
                "path", request.path, "a checkpoint with optimizer state (made by save_state), since optimizer is true",
                "Load it without the optimizer, or load a tinker://<run>/weights/<name> path",
            )  # fmt: skip
        return checkpoint.bundle

    async def check_source(self, bundle: str) -> None:
        """Raises UserError if the bundle to create a run from was deleted meanwhile."""
        if await bundles.read_index(self._store, bundle) is None:
            raise UserError(
                "the checkpoint to load was deleted, or expired, before the run could be made from it; load another one"
            )

    async def check(self, operation: Operation) -> None:
        """Raises UserError for a save without a valid name, before anything is computed for it."""
        if operation.kind == "save_weights":
            ids.checkpoint_name(requests.decode(operation.body(), requests.SaveWeights).path)
            return
        if operation.kind == "save_weights_external":
            external = requests.decode(operation.body(), requests.SaveWeightsExternal)
            ids.checkpoint_name(external.path)
            expect_recipients(external.age_encryption_recipients or [])
            return
        request = requests.decode(operation.body(), requests.SaveWeightsForSampler)
        if request.path is not None:
            ids.checkpoint_name(request.path)
        elif request.sampling_session_seq_id is None:
            raise InvalidField("path", None, "a name, or sampling_session_seq_id for an unnamed snapshot")

    async def store(self, operation: Operation, spec: Spec, epoch: int, files: Files, step: int) -> Export:
        """Store the files, which nothing leads to yet. `step`: optimizer steps in the weights; -1: not known."""
        bundle = layout.export(RunId(operation.run), operation.seq, epoch)
        index = await bundles.write(self._store, bundle, files, spec=spec, seq=operation.seq, epoch=epoch, step=step)
        return Export(bundle, sum(part.size for part in index.parts))

    async def name(self, operation: Operation, spec: Spec, export: Export) -> bytes:
        """Give the files the name in the request; return the result. Raises UserError if the name is taken."""
        run, bundle, size = RunId(operation.run), export.bundle, export.size
        if operation.kind == "save_weights":
            save = requests.decode(operation.body(), requests.SaveWeights)
            path = TinkerPath(run, "weights", ids.checkpoint_name(save.path))
            checkpoint = self._checkpoint(path, operation, spec, bundle, size, save.ttl_seconds, save.user_metadata)
            await self._checkpoints.save(checkpoint, overwrite=save.overwrite)
            return msgspec.json.encode({"type": "save_weights", "path": str(path)})
        if operation.kind == "save_weights_external":
            external = requests.decode(operation.body(), requests.SaveWeightsExternal)
            path = TinkerPath(run, "external_weights", ids.checkpoint_name(external.path))
            checkpoint = self._checkpoint(path, operation, spec, bundle, size, external.ttl_seconds, None)
            recipients = external.age_encryption_recipients or []
            checkpoint = msgspec.structs.replace(checkpoint, recipients=recipients)
            await self._checkpoints.save(checkpoint, overwrite=False)
            return msgspec.json.encode({"type": "save_weights_external", "path": str(path), "size_bytes": size})
        request = requests.decode(operation.body(), requests.SaveWeightsForSampler)
        if request.path is not None:
            path = TinkerPath(run, "sampler_weights", ids.checkpoint_name(request.path))
            checkpoint = self._checkpoint(
                path, operation, spec, bundle, size, request.ttl_seconds, request.user_metadata
            )
            await self._checkpoints.save(checkpoint, overwrite=False)
            return msgspec.json.encode({"type": "save_weights_for_sampler", "path": str(path)})
        assert request.sampling_session_seq_id is not None, "check() came first"
        sampler = ids.make_sampler_id(ids.session_of(run), request.sampling_session_seq_id)
        await Samplers(self._store).create(
            Sampler(
                sampler=sampler,
                tenant=spec.tenant,
                base_model=spec.base_model,
                bundle=bundle,
                kind=request.kind,
                run=run,
                seq=operation.seq,
            )
        )
        return msgspec.json.encode({"type": "save_weights_for_sampler", "sampling_session_id": sampler})

    def _checkpoint(
        self, path: TinkerPath, operation: Operation, spec: Spec, bundle: str, size: int, ttl_s: int | None,
        user_metadata: dict[str, str] | None,
    ) -> Checkpoint:  # fmt: skip
        now = self._clock()
        return Checkpoint(
            path=str(path), tenant=spec.tenant, base_model=spec.base_model, rank=spec.rank, bundle=bundle,
            seq=operation.seq, size_bytes=size, saved_at=now, expires_at=now + ttl_s if ttl_s else 0.0,
            user_metadata=user_metadata or {},
        )  # fmt: skip
