"""The base weights in shards, by FSDP2: a module a layer, gathered before it computes and given back behind it.

Source: PyTorch FSDP2, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html. Its modules gather by
themselves around `forward`; our layers are no modules, and a layer is also differentiated, or decodes, so they are
gathered by `unshard` and `reshard`, which that page has for it. Nothing of a frozen weight is ever reduced.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, UnshardHandle, fully_shard
from torch.distributed.tensor import DTensor

from knapper.engine.layers.experts import ExpertLinears
from knapper.engine.layers.layerwise import HEAD_PART
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.ranks.group import NONE
from knapper.engine.ranks.sharded_linear import ShardedLinear

Linears = Sequence[FrozenLinear | ExpertLinears]


@dataclass
class Gathered:
    """Since the start: collectives of weights, and the bytes of the parts that they made whole."""

    calls: int = 0
    bytes: int = 0


@dataclass
class _Part:
    module: nn.Module
    owners: list[ShardedLinear | ExpertLinears]
    nbytes: int
    handle: UnshardHandle | None = None

    @property
    def fsdp(self) -> FSDPModule:
        assert isinstance(self.module, FSDPModule)
        return self.module


@dataclass
class Shards:
    """Parts: each layer by number, and the head. Every rank of `mesh` has an equal share of each.

    Every rank makes the same calls of `begin` in the same order; the rest is its own affair.
    """

    mesh: DeviceMesh
    counts: Gathered = field(default_factory=Gathered)
    _parts: dict[int, _Part] = field(default_factory=dict)

    def __contains__(self, part: int) -> bool:
        return part in self._parts

    def behind(self, part: int, step: int) -> int:
        """The part that is needed behind `part`: forward (1) at last the head, then backward (-1); NONE: no more."""
        order = [*sorted(self._parts.keys() - {HEAD_PART}), HEAD_PART]
        place = order.index(part) + step
        return order[place] if 0 <= place < len(order) else NONE

    @property
    def nbytes(self) -> int:
        """Of all parts, whole."""
        return sum(part.nbytes for part in self._parts.values())

    @property
    def sizes(self) -> dict[int, int]:
        """Bytes of each part, whole."""
        return {number: part.nbytes for number, part in self._parts.items()}

    @property
    def kept(self) -> int:
        """Bytes of this rank's shards."""
        parameters = [weight for part in self._parts.values() for weight in part.module.parameters()]
        return sum(weight.to_local().nbytes for weight in parameters if isinstance(weight, DTensor))

    def add(self, part: int, linears: Linears) -> None:
        """Keep this rank's shard of the matrices; they are whole nowhere from here on, until they are gathered."""
        module, owners = nn.Module(), [owner for linear in linears for owner in _owners(linear)]
        for number, owner in enumerate(owners):
            weight = nn.Parameter(_matrix(owner).detach(), requires_grad=False)
            module.register_parameter(_name(number), weight)
        nbytes = sum(_matrix(owner).nbytes for owner in owners)
        fully_shard(module, mesh=self.mesh, reshard_after_forward=True)
        self._parts[part] = _Part(module, owners, nbytes)
        self._take_away(self._parts[part])

    def begin(self, part: int) -> None:
        """Start gathering it. A collective: every rank calls it."""
        of = self._parts[part]
        assert of.handle is None, f"part {part} is being gathered"
        with torch.inference_mode(mode=False), torch.no_grad():  # or its storage could not be used in training
            of.handle = of.fsdp.unshard(async_op=True)
        self.counts.calls += 1
        self.counts.bytes += of.nbytes

    def wait(self, part: int) -> None:
        """Until it is whole."""
        of = self._parts[part]
        assert of.handle is not None, f"part {part} is not being gathered"
        with torch.inference_mode(mode=False), torch.no_grad():
            of.handle.wait()
        of.handle = None
        for number, owner in enumerate(of.owners):
            _set(owner, getattr(of.module, _name(number)))

    def release(self, part: int) -> None:
        """Free what other ranks' shards were copied into."""
        of = self._parts[part]
        of.fsdp.reshard()
        self._take_away(of)

    @staticmethod
    def _take_away(part: _Part) -> None:
        for owner in part.owners:
            _set(owner, _matrix(owner).new_empty(0))


def _owners(linear: FrozenLinear | ExpertLinears) -> Sequence[ShardedLinear | ExpertLinears]:
    """What has a matrix: experts that are computed one by one have one each."""
    if isinstance(linear, ExpertLinears):
        return [linear] if linear.grouped else [owner for each in linear.each for owner in _owners(each)]
    assert isinstance(linear, ShardedLinear), "loaded as shards"
    return [linear]


def _matrix(owner: ShardedLinear | ExpertLinears) -> Tensor:
    return owner.w_EOI if isinstance(owner, ExpertLinears) else owner.whole_OI


def _set(owner: ShardedLinear | ExpertLinears, matrix: Tensor) -> None:
    if isinstance(owner, ExpertLinears):
        owner.w_EOI = matrix
    else:
        owner.whole_OI = matrix


def _name(number: int) -> str:
    return f"w{number}"
