"""The queue of waiting requests, and which of them start or resume in the next pass over prompts."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from knapper.concurrency.fair_share import FairShare
from knapper.engine.sampling.sequence import Isolation, RunningSequence, SequenceGroup

_ROWS_MAX: Final = 512  # tokens of one pass over prompts (a longer prompt goes alone); bounds how long decoding waits
_GROUPS_MAX: Final = 64  # of one pass; bounds vocabulary-wide tensors


class PrefillQueue:
    """Requests with sequences that have not started. Tenants share by computed tokens; a tenant's requests are in
    order.

    `turn`: sequences that a request may start before it goes to the end of the queue.
    """

    def __init__(self, turn: int) -> None:
        self._turn = turn
        self._queue: deque[SequenceGroup] = deque()
        self._shares = FairShare()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[SequenceGroup]:
        return iter(self._queue)

    def join(self, groups: Iterable[SequenceGroup]) -> None:
        for group in groups:
            group.turn = self._turn
            self._queue.append(group)
            self._shares.join(group.request.tenant)

    def drop(self, group: SequenceGroup) -> None:
        if group in self._queue:
            self._queue.remove(group)

    def clear(self) -> None:
        self._queue.clear()

    def in_turn(self) -> Iterator[SequenceGroup]:
        """Requests in the order of service, as if the sequences of the earlier ones were computed already."""
        queues: dict[str, deque[SequenceGroup]] = {}
        for group in self._queue:
            queues.setdefault(group.request.tenant, deque()).append(group)
        served = {tenant: self.served(tenant) for tenant in queues}
        while queues:
            tenant = min(queues, key=served.__getitem__)
            group = queues[tenant].popleft()
            served[tenant] += group.prompt_tokens + min(group.left, group.turn)
            if not queues[tenant]:
                del queues[tenant]
            yield group

    def served(self, tenant: str) -> float:
        """What the tenant of an unfinished request has had, in tokens; the least goes first."""
        return self._shares.rank(tenant)[0]

    def ahead_of(self, parked: Iterable[RunningSequence]) -> Iterator[SequenceGroup]:
        """Requests in order, only those of tenants that have had less than each of the parked sequences' tenants."""
        least = min((self.served(sequence.group.request.tenant) for sequence in parked), default=math.inf)
        return (group for group in self.in_turn() if self.served(group.request.tenant) < least)

    def begin(self, group: SequenceGroup, count: int) -> list[RunningSequence]:
        """Start `count` of its sequences. It stays first while its turn lasts, then goes to the end."""
        self._queue.remove(group)
        sequences = group.begin(count)
        group.turn -= count
        if group.left and group.turn > 0:
            self._queue.appendleft(group)
        elif group.left:
            group.turn = self._turn
            self._queue.append(group)
        return sequences

    def take_back(self, sequence: RunningSequence) -> None:
        """Put back a sequence that got no token: it starts again, before others."""
        group = sequence.group
        group.take_back(sequence)
        group.turn += 1
        if group not in self._queue:
            self._queue.appendleft(group)

    def keep_prompts(self, free: int) -> int:
        """Keep prompts in queue order within `free` positions. Returns the positions that are left."""
        for group in self._queue:
            if group.past is not None:
                free -= group.past_positions
                if free < 0:
                    group.past = None
        return free

    def serve(self, group: SequenceGroup) -> None:
        """Mark the request as the first of a pass."""
        self._shares.serve(group.request.tenant)

    def charge(self, group: SequenceGroup, tokens: int) -> None:
        """Charge the request's tenant for computed tokens."""
        self._shares.charge(tokens, group.request.tenant)

    def keep_shares_of(self, groups: Iterable[SequenceGroup]) -> None:
        """Forget the shares of tenants without an unfinished request."""
        self._shares.leave((group.request.tenant,) for group in groups)


@dataclass(frozen=True)
class FreeCapacity:
    """Free `slots` and `positions`. `decoding`: the requests that hold the others. `cost`: positions that a request's
    sequence needs to start or resume with so many tokens.
    """

    slots: int
    positions: int
    cost: Callable[[SequenceGroup, int], int]
    decoding: Sequence[SequenceGroup]
    overtaken_max: int  # sequences that may start before those of an earlier request


def next_turns(
    waiting: Iterable[SequenceGroup], capacity: FreeCapacity, rows_of: Callable[[SequenceGroup], int]
) -> list[tuple[SequenceGroup, int]]:
    """Requests that start now, with a number of sequences each, in order, until the first that does not fit.

    A request that must decode alone is overtaken, `overtaken_max` times at most. `rows_of`: rows of a request's prompt.
    """
    turns: list[tuple[SequenceGroup, int]] = []
    skipped: list[SequenceGroup] = []
    slots, free, rows = capacity.slots, capacity.positions, 0
    prompts: set[tuple[str, bytes, bytes]] = set()  # of this pass: each is computed once
    for group in waiting:
        if not _may_decode_beside(group, [*capacity.decoding, *(other for other, _ in turns)]):
            skipped.append(group)
            continue
        if any(other.overtaken >= capacity.overtaken_max for other in skipped):
            break
        if group.needs_prefill and group.prompt not in prompts:
            prompts.add(group.prompt)
            rows += rows_of(group)
        if turns and (
            _need_own_pass(*(other for other, _ in turns), group) or rows > _ROWS_MAX or len(turns) == _GROUPS_MAX
        ):
            break
        cost = capacity.cost(group, group.prompt_tokens) if group.decodes else 0
        wanted = min(group.left, group.turn) if cost else group.left
        count = min(wanted, slots, free // cost) if cost else wanted
        if count > 0:
            turns.append((group, count))
            for other in skipped:
                other.overtaken += count
        if count < wanted:
            break
        slots, free = slots - (count if cost else 0), free - count * cost
    return turns


def next_parked(parked: Iterable[RunningSequence], capacity: FreeCapacity) -> list[RunningSequence]:
    """Parked sequences that resume now, in order, until the first that does not fit."""
    chosen: list[RunningSequence] = []
    slots, free, rows = capacity.slots, capacity.positions, 0
    for sequence in parked:
        slots, free = slots - 1, free - capacity.cost(sequence.group, sequence.length)
        rows += sequence.length
        groups = [parked_sequence.group for parked_sequence in chosen]
        if slots < 0 or free < 0 or not _may_decode_beside(sequence.group, [*capacity.decoding, *groups]):
            break
        if chosen and (_need_own_pass(*groups, sequence.group) or rows > _ROWS_MAX):
            break
        chosen.append(sequence)
    return chosen


def _need_own_pass(*groups: SequenceGroup) -> bool:
    """Whether one of them shares no pass over prompts."""
    return any(group.isolation > Isolation.ANY for group in groups)


def _may_decode_beside(group: SequenceGroup, decoding: Iterable[SequenceGroup]) -> bool:
    """Whether the request's sequences may decode beside those of `decoding`."""
    others = set(decoding) - {group}
    alone = group.suspect or group.isolation == Isolation.ALONE or any(other.suspect for other in others)
    return not (alone and others)
