"""A PEFT adapter of any training becomes a checkpoint that trains and samples: the same function, in a run's layout.

A run has one rank, one scale and all linears of a part of the layers. So a matrix of lower rank, or of a linear that
the adapter leaves alone, is filled up with zeros in A and B both: their gradients are zero, and they stay. Another
scale goes into B.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from knapper import ids, limits
from knapper.engine import checkpoint_format
from knapper.engine.layers.lora import layout
from knapper.engine.models.config import Facts, LoraTarget
from knapper.engine.training.optimizer import Moments, is_finite
from knapper.engine.training.trainer import RunState
from knapper.errors import UserError
from knapper.export import adapter
from knapper.export.adapter import Pair, PeftAdapter
from knapper.ids import CheckpointKind, SessionId, Tenant, TinkerPath
from knapper.state import layout as keys
from knapper.state.checkpoints import Checkpoint, Checkpoints
from knapper.state.journal import bundles
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.machine import Files
from knapper.state.journal.records import Creation, Spec
from knapper.state.sessions import Finish, Session, Sessions
from knapper.state.tenant_index import Register
from knapper.store import Store

_KINDS: tuple[CheckpointKind, ...] = ("weights", "sampler_weights")


@dataclass(frozen=True)
class Imported:
    """`spec`: of a run that can load the files. `rescaled`: modules whose scale went into B, so that training goes on
    from the same function with another step size there.
    """

    spec: Spec
    files: Files
    rescaled: tuple[str, ...]


def read(directory: Path, facts: Facts, base_model: str, tenant: Tenant) -> Imported:
    """The adapter in the layout of a run on a model of those facts. Raises UserError for one that has none."""
    found = adapter.read(directory)
    targets = {module: target for target in facts.lora_targets for module in _modules(target)}
    for module, pair in found.pairs.items():
        _expect_target(pair, targets.get(module), targets)
    parts = {targets[module].part for module in found.pairs}
    rank = max(pair.rank for pair in found.pairs.values())
    if rank > limits.rank_max:
        raise UserError(f"the adapter has rank {rank}; allowed: up to {limits.rank_max}")
    ((scale, _),) = Counter(pair.scale for pair in found.pairs.values()).most_common(1)
    spec = Spec(
        run="",
        tenant=tenant,
        base_model=base_model,
        rank=rank,
        alpha=scale * rank,
        seed=0,
        train_attn="attention" in parts,
        train_mlp="mlp" in parts,
        train_unembed="unembed" in parts,
    )
    state = _state(found, facts, spec)
    rescaled = tuple(name for name, pair in found.pairs.items() if pair.scale != state.scale)
    return Imported(spec, checkpoint_format.export(state, with_optimizer=False), rescaled)


async def store(imported: Imported, name: str, at: Store, clock: Callable[[], float]) -> list[TinkerPath]:
    """Name it as a training state and as a sampler's weights, in a run of its own. The same import stores it once."""
    content = [bytes(imported.files[file]) for file in sorted(imported.files)]
    about = [imported.spec.tenant.encode(), name.encode(), imported.spec.base_model.encode()]
    digest = hashlib.sha256(b"\0".join(hashlib.sha256(each).digest() for each in [*about, *content])).hexdigest()
    session, now = SessionId(f"ses-{digest[:32]}"), clock()
    run = ids.make_run_id(session, 0)
    spec = msgspec.structs.replace(imported.spec, run=run)
    sessions, index = Sessions(at), Register(at)
    record = await sessions.find_or_create(
        Session(session=session, tenant=spec.tenant, created_at=now, display_name="import of an adapter")
    )
    await index.add_session(record)
    await index.add_run(record, run)
    bundle = keys.export(run, 0, 0)
    written = await bundles.write(at, bundle, imported.files, spec=spec, seq=0, epoch=0)
    holds = msgspec.structs.replace(spec, copied_from=f"the adapter {name}")  # which a run made of it is not: it trains
    await Acceptor(at, clock).create(Creation(spec=holds, source=bundle), digest.encode())
    paths = [TinkerPath(run, kind, ids.checkpoint_name(name)) for kind in _KINDS]
    for path in paths:
        checkpoint = Checkpoint(
            path=str(path), tenant=spec.tenant, base_model=spec.base_model, rank=spec.rank, bundle=bundle, seq=0,
            size_bytes=sum(part.size for part in written.parts), saved_at=now,
        )  # fmt: skip
        await Checkpoints(at, clock).save(checkpoint, overwrite=False)
    await sessions.finish(session, Finish(reason="success", detail="import", finished_at=now))
    return paths


def _state(found: PeftAdapter, facts: Facts, spec: Spec) -> RunState:
    """A run's state with these weights, before its first step. Raises UserError for numbers that are not finite."""
    arena = layout(facts, spec)
    weights_P = torch.zeros(arena.numel)
    moments = Moments(torch.zeros(arena.numel), torch.zeros(arena.numel), 0)
    state = RunState(spec, arena, weights_P, moments)
    for target, a_RI, b_OR in arena.matrices(weights_P):
        of_modules = [(a_RI, b_OR)] if target.experts is None else zip(a_RI, b_OR, strict=True)
        for module, (own_a, own_b) in zip(_modules(target), of_modules, strict=True):
            if (pair := found.pairs.get(module)) is not None:
                a, b = found.stored(pair)
                own_a[: pair.rank] = a
                own_b[:, : pair.rank] = b if pair.scale == state.scale else b * (pair.scale / state.scale)
    if not is_finite(weights_P):
        raise UserError(f"{found.directory} has NaN or infinite numbers; import another adapter")
    return state


def _modules(target: LoraTarget) -> tuple[str, ...]:
    """As `adapter.read` names them: experts that are one parameter by their numbers, too."""
    if not target.whole or target.experts is None:
        return target.modules
    block, _, parameter = target.module.rpartition(".")
    return tuple(f"{block}.{expert}.{parameter}" for expert in range(target.experts))


def _expect_target(pair: Pair, target: LoraTarget | None, targets: dict[str, LoraTarget]) -> None:
    if target is None:
        example = ", ".join(list(targets)[:3])
        raise UserError(
            f"the adapter adapts {pair.module}, which cannot be trained here; allowed: the linears of attention and "
            f"MLP and the head, such as {example}"
        )
    if (pair.inputs, pair.outputs) != (target.inputs, target.outputs):
        raise UserError(
            f"the adapter makes {pair.module} {[pair.outputs, pair.inputs]}, and the base model has "
            f"{[target.outputs, target.inputs]}; name the adapter's own base model by --model"
        )
