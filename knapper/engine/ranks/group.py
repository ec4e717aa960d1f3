"""The ranks of a pod as one process group: commands of rank 0 to all, and bytes and tensors between it and another.

Everything goes over loopback or between the cards; the meeting place is a file, so nothing listens beyond the pod.
"""

import datetime
import os
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_NEVER: Final = datetime.timedelta(days=365)  # who waits, is idle; rank 0 alone has a deadline (`watch`)
NONE: Final = -2  # in the place of a part's number
HEADER_BYTES: Final = 4 * 8


class Kind(IntEnum):
    LANE = 0  # a pass begins: each rank gets its lane
    GATHER = 1  # a part, for rank 0's own use
    RUN = 2  # a part, and every lane computes with it
    COLLECT = 3  # the lanes' results
    DROP = 4  # the pass has failed
    END = 5


@dataclass(frozen=True)
class Command:
    """`part`: which one is needed; `gathers`: it is not yet under way; `ahead`: what is to be gathered behind it."""

    kind: Kind
    part: int = NONE
    gathers: bool = False
    ahead: int = NONE


@dataclass
class Traffic:
    """Since the start, of this rank beside the weights: calls, and bytes out and in."""

    commands: int = 0
    messages: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass
class Group:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    traffic: Traffic = field(default_factory=Traffic)

    @classmethod
    def join(cls, meeting: Path, rank: int, size: int, device: torch.device) -> "Group":
        """Blocks until all ranks have come."""
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo"
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")  # noqa: TID251  the libraries' own variables, not settings
        store = dist.FileStore(str(meeting), size)  # type: ignore[attr-defined]  # torch.distributed leaves it unnamed
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_NEVER)
        return cls(rank, size, device, init_device_mesh(device.type, (size,)))

    def command(self, command: Command) -> None:
        """Of rank 0, to all."""
        dist.broadcast(torch.tensor([command.kind, command.part, command.gathers, command.ahead]), src=0)
        self.traffic.commands += 1
        self.traffic.sent_bytes += HEADER_BYTES * (self.size - 1)

    def obey(self) -> Command:
        """The next command of rank 0."""
        header = torch.empty(4, dtype=torch.int64)
        dist.broadcast(header, src=0)
        kind, part, gathers, ahead = header.tolist()
        return Command(Kind(kind), part, bool(gathers), ahead)

    def send(self, rank: int, body: bytes) -> None:
        dist.send(torch.tensor([len(body)]), dst=rank)
        dist.send(torch.frombuffer(bytearray(body), dtype=torch.uint8), dst=rank)
        self.traffic.messages += 1
        self.traffic.sent_bytes += 8 + len(body)

    def receive(self, rank: int) -> bytes:
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, src=rank)
        body = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(body, src=rank)
        self.traffic.received_bytes += 8 + len(body)
        return body.numpy().tobytes()

    def send_tensor(self, rank: int, tensor: Tensor) -> None:
        """To where `receive_tensor` expects its shape and dtype."""
        dist.send(tensor.contiguous(), dst=rank)
        self.traffic.sent_bytes += tensor.nbytes

    def receive_tensor(self, rank: int, into: Tensor) -> Tensor:
        dist.recv(into, src=rank)
        self.traffic.received_bytes += into.nbytes
        return into
