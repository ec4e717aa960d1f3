"""Any rank but 0: holds its shards of the weights, obeys rank 0, and keeps nothing from one pass to the next.

P parameters of an adapter.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import torch
from torch import Tensor

from knapper.engine import hardware
from knapper.engine.layers.lora import layout
from knapper.engine.models.decoder import Decoder
from knapper.engine.out_of_memory import MemoryShortage
from knapper.engine.ranks import messages
from knapper.engine.ranks.group import NONE, Command, Group, Kind
from knapper.engine.ranks.messages import LaneRequest, LaneResult, RequestResult
from knapper.engine.ranks.shards import Shards
from knapper.engine.training import batch, losses
from knapper.engine.training.batch import PendingRequest
from knapper.engine.training.trainer import leaves

log = structlog.get_logger()


class _Dropped(Exception):
    """Rank 0 has given the pass up."""


class RankWorker:
    def __init__(self, group: Group, shards: Shards, model: Decoder) -> None:
        self._group, self._shards, self._model = group, shards, model
        self._whole: set[int] = set()
        self._result = LaneResult()
        self._sums: list[Tensor] = []
        model.gather = self.gather

    def obey(self) -> None:
        """Until rank 0 ends. What fails for want of memory, or by a defect, is told to it with the lane's results."""
        while True:
            command = self._group.obey()
            match command.kind:
                case Kind.GATHER | Kind.RUN:  # of a pass without a lane for this rank, or with one that failed
                    self._take(command)
                    self._shards.release(command.part)
                case Kind.LANE:
                    self._compute(messages.decode_lane(self._group.receive(0)).requests)
                case Kind.COLLECT:
                    self._tell()
                case Kind.DROP:
                    self._result, self._sums = LaneResult(), []
                case Kind.END:
                    return

    @contextmanager
    def gather(self, part: int, _step: int) -> Iterator[None]:
        """knapper.engine.layers.layerwise.Gather: waits for rank 0 to come to this part, and obeys it meanwhile."""
        if part not in self._shards or part in self._whole:
            yield
            return
        command = self._next_part()
        assert command.part == part, f"rank 0 is at part {command.part}, this rank at {part}"
        self._take(command)
        self._whole.add(part)
        try:
            yield
        finally:
            self._whole.remove(part)
            self._shards.release(part)

    def _next_part(self) -> Command:
        while True:
            command = self._group.obey()
            match command.kind:
                case Kind.RUN:
                    return command
                case Kind.GATHER:
                    self._take(command)
                    self._shards.release(command.part)
                case Kind.END:
                    raise SystemExit(0)
                case _:
                    raise _Dropped

    def _take(self, command: Command) -> None:
        if command.gathers:
            self._shards.begin(command.part)
        if command.ahead != NONE:
            self._shards.begin(command.ahead)
        self._shards.wait(command.part)

    def _compute(self, lane: list[LaneRequest]) -> None:
        self._result, self._sums = LaneResult(), []
        opened = [self._opened(request) for request in lane]
        if not opened:
            return
        try:
            for _ in batch.compute(self._model, opened):
                pass
        except _Dropped:
            return
        except Exception as error:  # the border of the rank: rank 0 gets it
            shortage = MemoryShortage.of(error)
            if shortage is None:
                log.exception("defect")
            else:
                hardware.release(self._model.device)  # the pass may come again
            self._result = LaneResult(lacked_memory=shortage is not None, defect="" if shortage else repr(error))
            return
        self._result = LaneResult([RequestResult.of(request) for request in opened])
        self._sums = [request.sums_P for request in opened if request.error is None and request.sums_P is not None]

    def _opened(self, request: LaneRequest) -> PendingRequest:
        """As rank 0 opened it, with one micro-batch and gradients of its own."""
        run_layout = layout(self._model.config, request.spec)
        weights_P = self._group.receive_tensor(0, torch.empty(run_layout.numel, device=self._model.device))
        sums_P = torch.zeros_like(weights_P) if request.differentiates else None
        lora = leaves(self._model, run_layout, weights_P, request.spec.alpha / request.spec.rank, sums_P)
        micro_batch = request.micro_batch()
        return PendingRequest(
            lora, losses.find(request.loss), request.config, sums_P, deque([micro_batch]), micro_batch.data
        )

    def _tell(self) -> None:
        """Rank 0 asks every rank; those without a lane have nothing that it would wait for."""
        if self._result.requests or self._result.lacked_memory or self._result.defect:
            self._group.send(0, messages.encode(self._result))
            for sums_P in self._sums:
                self._group.send_tensor(0, sums_P)
        self._result, self._sums = LaneResult(), []
