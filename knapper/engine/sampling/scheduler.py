"""Continuous batching: requests of several adapters decode together, each with the bits that it has alone.

One task on the device serves all requests. It admits what fits, computes prompts, gives every active sequence one token
a step, and yields between steps so that training gets its share. It ends when no request is left.

    waiting requests --turn--> prefill --first token--> slots of the cache --step, step ...--> results
                                                          |     ^
                                                          +-> parked sequences

Order: the tenant with the fewest computed tokens, prompts and samples alike (`FairShare`; the virtual token counter of
Sheng et al., OSDI 2024), then its oldest request. A turn starts at most a quarter of the slots' worth of sequences, so
that a request for a thousand does not block the rest.

Memory: a sequence takes positions as it grows. Where the next token of all does not fit, a sequence of the tenant that
has had the most is parked, the youngest first; it resumes later, with its tokens, and its keys and values are computed
again. Before that go a request's prompt keys and values, kept between its turns, and those of earlier requests
(`PrefixCache`).

Failures stay with the request that causes them. If a pass over several prompts fails, each request repeats it alone;
one that then lacks memory repeats it when no other sequence decodes, and else fails with an error that names the lack.
If a step lacks memory, it is repeated without any cache, then with the younger half of the sequences parked; these
resume where they were (on a CPU to the last bit). After any other failure of a step, requests decode one by one.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Final

import structlog
import torch
from torch import Tensor

from knapper import limits
from knapper.engine import hardware
from knapper.engine.executor import Executor, Work
from knapper.engine.layers.lora_grouped import Segments
from knapper.engine.models.base import Model
from knapper.engine.out_of_memory import MemoryShortage, as_shortage
from knapper.engine.sampling.decode_batch import DecodeBatch
from knapper.engine.sampling.next_tokens import NonFiniteLogits, take_tokens
from knapper.engine.sampling.prefill_queue import FreeCapacity, PrefillQueue, next_parked, next_turns
from knapper.engine.sampling.prompt_logprobs import PromptLogprobs
from knapper.engine.sampling.prompts import Prefiller, SamplingCounters
from knapper.engine.sampling.sequence import Isolation, RunningSequence, SequenceGroup
from knapper.engine.sampling.token_sampling import finite_rows
from knapper.engine.transfer import to_device
from knapper.errors import Unavailable
from knapper.text.sizes import sized

_LOGIT_ROWS: Final = 64  # rows of vocabulary-wide tensors at a time; bounds memory
_PREFIX_CACHE_PART: Final = 4  # prompts of earlier requests may take 1 / this of the key/value memory

log = structlog.get_logger()


class SamplingScheduler:
    """At most `slots_max` sequences decode at once, within `kv_tokens_max` positions. `now`, in seconds: for costs."""

    def __init__(
        self, decoder: Model, device: Executor, slots_max: int, kv_tokens_max: int, now: Callable[[], float]
    ) -> None:
        assert slots_max >= 1
        self.counters = SamplingCounters()
        self._decoder, self._device = decoder, device
        self._slots_max, self._kv_tokens_max, self._now = slots_max, kv_tokens_max, now
        # Shared by callers and the device's thread, under the lock.
        self._lock = threading.Lock()
        self._arrivals: list[SequenceGroup] = []
        self._working = False
        # Used by the device's thread only.
        self._groups: list[SequenceGroup] = []  # all unfinished requests
        self._waiting = PrefillQueue(max(1, slots_max // 4))
        self._ages = itertools.count()
        self._cache = decoder.decode_state(kv_tokens_max)
        self._batch = DecodeBatch(self._cache, kv_tokens_max, self.counters)
        self._short_of_memory = False  # the last step lacked memory and is retried before anything else starts
        self._prefiller = Prefiller(decoder, self.counters, kv_tokens_max // _PREFIX_CACHE_PART)

    @property
    def longest(self) -> int:
        """Positions that one sequence can have at most."""
        return self._cache.longest

    def positions(self, length: int) -> int:
        """Positions that a sequence of this length reserves."""
        return self._cache.positions(length)

    @property
    def active(self) -> int:
        """Sequences that decode."""
        return len(self._batch.sequences)

    @property
    def waiting(self) -> int:
        """Requests with sequences that have not started."""
        return len(self._arrivals) + len(self._waiting)

    def submit(self, group: SequenceGroup) -> None:
        """The group's future gets the output. Raises Unavailable when too many requests wait."""
        with self._lock:
            if self.waiting >= limits.samples_waiting_max:
                raise Unavailable(f"{self.waiting} sample requests wait; allowed: {limits.samples_waiting_max}")
            self._arrivals.append(group)
            if not self._working:
                self._working = True
                self._device.submit(self._work(), "samples")

    # The rest runs on the device's thread.

    def _work(self) -> Work[None]:
        try:
            while self._take_arrivals():
                if not (self._short_of_memory and self._batch.sequences):
                    if next(self._waiting.ahead_of(self._batch.parked), None) is None:
                        yield from self._resume()
                    yield from self._admit()
                if self._batch.sequences:
                    self._advance()
                yield
        except BaseException as error:
            self._abandon(error)
            raise

    def _take_arrivals(self) -> bool:
        """Accept arrivals and drop cancelled requests. False when none is left: the task then ends."""
        with self._lock:
            arrived, self._arrivals = self._arrivals, []
            self._groups.extend(arrived)
            self._waiting.join(arrived)
            for group in [group for group in self._groups if group.future.cancelled()]:
                self._drop(group)
                self.counters.cancelled += 1
            self._waiting.keep_shares_of(self._groups)
            self._working = bool(self._groups)
            return self._working

    def _abandon(self, error: BaseException) -> None:
        """Fail every request after an error that no single request caused; the next request starts afresh."""
        with self._lock:
            groups = self._groups + self._arrivals
            self._groups, self._arrivals, self._working = [], [], False
            self._waiting.clear()
            self._cache = self._decoder.decode_state(self._kv_tokens_max)
            self._batch, self._short_of_memory = DecodeBatch(self._cache, self._kv_tokens_max, self.counters), False
            self._prefiller.trim(0)
        for group in groups:
            self.counters.failed += 1
            group.answer(error)

    # -- start ---------------------------------------------------------------------------------------------------------

    def _admit(self) -> Work[None]:
        """Start what fits."""
        waiting = self._waiting.ahead_of(self._batch.parked)
        if not (turns := next_turns(waiting, self._free_capacity(), self._prefiller.rows)):
            return
        self._waiting.serve(turns[0][0])
        try:
            yield from self._prefill([group for group, _ in turns if group.needs_prefill])
            self._begin(turns)
        except Exception as error:  # noqa: BLE001  what one request's prompt brings out must not fail the others
            failure = as_shortage(error)
        else:
            yield
            return
        self._isolate([group for group, _ in turns], failure)
        yield

    def _free_capacity(self) -> FreeCapacity:
        active = self._batch
        return FreeCapacity(
            self._slots_max - len(active.sequences), active.free(), active.cost, active.groups, self._slots_max
        )

    def _prefill(self, groups: Sequence[SequenceGroup]) -> Work[None]:
        """One pass over the prompts of `groups`, then the prompt log-probabilities that they request."""
        if not groups:
            return
        began_s = self._now()
        hidden = self._prefiller.compute(groups)
        hardware.finish(self._decoder.device)
        self._charge(began_s, [(group, rows.shape[0]) for group, rows in zip(groups, hidden, strict=True)])
        yield
        for group, rows in zip(groups, hidden, strict=True):
            if group.scores is None and PromptLogprobs.is_requested(group.request):
                scores = PromptLogprobs(group.request)
                before, last = group.prompt_tokens - rows.shape[0], group.prompt_tokens - 1
                for start in range(scores.first, last, _LOGIT_ROWS):  # the last row scores the first sampled token
                    stop = min(start + _LOGIT_ROWS, last)
                    if not self._score(group, scores, start, rows[start - before : stop - before]):
                        break
                    yield
                group.scores = scores

    @torch.inference_mode()
    def _score(self, group: SequenceGroup, scores: PromptLogprobs, start: int, hidden_NH: Tensor) -> bool:
        """False if the request failed because its logits are not finite."""
        began_s = self._now()
        logits = self._decoder.logits(hidden_NH, Segments([group.segment(0, hidden_NH.shape[0])]))
        finite = bool(finite_rows(logits).all())
        if finite:
            scores.add(start, logits)
        self._charge(began_s, [(group, 1)])
        if not finite:
            self._fail(group, NonFiniteLogits.of(group))
        return finite

    @torch.inference_mode()
    def _begin(self, turns: Sequence[tuple[SequenceGroup, int]]) -> None:
        """Draw the first token of `count` sequences of each request; those that continue get slots."""
        sequences: list[RunningSequence] = []
        for group, count in turns:
            if group in self._groups and not group.future.cancelled():
                sequences += self._waiting.begin(group, count)
        for sequence in sequences:
            sequence.age = next(self._ages)
            if sequence.group.tokens_max == 0:
                sequence.finish(stopped=False)
        try:
            self._first_tokens([sequence for sequence in sequences if sequence.group.tokens_max > 0])
        finally:
            self._not_begun(sequences)
            for group in self._groups:
                if not group.left:
                    group.past = None
            self._deliver()

    def _first_tokens(self, sequences: Sequence[RunningSequence]) -> None:
        for start in range(0, len(sequences), _LOGIT_ROWS):
            began_s, chunk = self._now(), sequences[start : start + _LOGIT_ROWS]
            groups = list(dict.fromkeys(sequence.group for sequence in chunk))
            last_JH = torch.cat([group.last_1H for group in groups if group.last_1H is not None])
            segments = Segments([group.segment(row, 1) for row, group in enumerate(groups)])
            logits_JV = self._decoder.logits(last_JH, segments)
            row_of = {group: row for row, group in enumerate(groups)}
            rows = to_device([row_of[sequence.group] for sequence in chunk], logits_JV.device)
            for sequence in self._draw(chunk, logits_JV[rows]):
                self._batch.add(sequence, sequence.group.past)
            self._charge(began_s, [(sequence.group, 1) for sequence in chunk])

    def _not_begun(self, sequences: Sequence[RunningSequence]) -> None:
        """Sequences that failed before they got a slot: with a token they are parked, else they start again."""
        decoding = set(self._batch.sequences.values())
        for sequence in sequences:
            group = sequence.group
            if group not in self._groups or sequence.finished or sequence in decoding:
                continue
            if sequence.tokens:
                self._batch.park(sequence)
            else:
                self._waiting.take_back(sequence)

    # -- decoding ------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Run a step; an error fails only the request that causes it."""
        try:
            self._step()
        except Exception as error:  # noqa: BLE001  what one sequence brings out must not fail the others
            failure = as_shortage(error)
        else:
            self._short_of_memory = False
            return
        self._batch.restore()
        self._deliver()
        self._relieve(failure)

    @torch.inference_mode()
    def _step(self) -> None:
        """One token for every active sequence."""
        began_s = self._now()
        # Prompts of sequences still to start go on in what decoding leaves, and cached ones in the rest.
        self._prefiller.trim(self._waiting.keep_prompts(self._batch.make_room(self._waiting.served)))
        self._cache.reserve()
        sequences = [self._batch.sequences[slot] for slot in self._cache.rows]
        tokens = to_device([sequence.tokens[-1] for sequence in sequences], self._decoder.device)
        self._draw(sequences, self._cache.step(tokens, [sequence.group.lora for sequence in sequences]))
        self._batch.remove_finished()
        self.counters.steps += 1
        self._charge(began_s, [(sequence.group, 1) for sequence in sequences])
        self._deliver()

    # -- failures ------------------------------------------------------------------------------------------------------

    def _relieve(self, failure: Exception) -> None:
        """Undo a failed step's cause as far as possible: free memory, park, isolate; fail a request that is alone."""
        self.release_caches()
        groups = self._batch.groups
        if isinstance(failure, MemoryShortage) and not self._short_of_memory:
            self._short_of_memory = True
        elif isinstance(failure, MemoryShortage) and self.active > 1:
            self._batch.park_younger_half()
        elif len(groups) > 1:
            for group in groups:
                group.suspect = True
            self._batch.park_all()
        else:
            for group in groups:
                self._fail(group, self._error_for(group, failure))
        log.warning("a step broke", reason=repr(failure), decoding=self.active, parked=len(self._batch.parked))

    def _isolate(self, groups: Sequence[SequenceGroup], failure: Exception) -> None:
        """After a failed pass over prompts or parked sequences: compute each request again in a pass of its own."""
        self.release_caches()
        present = [group for group in groups if group in self._groups]
        for group in present:
            group.forget_prompt()
            if len(present) > 1 or (isinstance(failure, MemoryShortage) and group.isolation == Isolation.ANY):
                group.isolation = max(group.isolation, Isolation.OWN_PASSES)
            elif self._may_fit_alone(group, failure):
                group.isolation = Isolation.ALONE
            else:
                self._fail(group, self._error_for(group, failure))

    def _may_fit_alone(self, group: SequenceGroup, failure: Exception) -> bool:
        """Whether the sequences of other requests hold the memory that is lacking."""
        alone = group.isolation == Isolation.ALONE or set(self._batch.groups) <= {group}
        if alone or not isinstance(failure, MemoryShortage):
            return False
        others = self._cache.tokens * self._decoder.bytes_per_token
        return failure.needed is None or failure.needed <= hardware.memory_left(self._decoder.device) + others

    def _resume(self) -> Work[None]:
        """Resume parked sequences that fit, the oldest first: one pass recomputes their keys and values."""
        by_share = sorted(self._batch.parked, key=lambda parked: self._waiting.served(parked.group.request.tenant))
        if not (sequences := next_parked(by_share, self._free_capacity())):
            return
        began_s = self._now()
        try:
            pasts = self._prefiller.recompute(sequences)
            hardware.finish(self._decoder.device)
            for sequence, past in zip(sequences, pasts, strict=True):
                self._batch.add(sequence, past)
                self._batch.parked.remove(sequence)
        except Exception as error:  # noqa: BLE001  as above
            failure = as_shortage(error)
        else:
            self._charge(began_s, [(sequence.group, sequence.length) for sequence in sequences])
            yield
            return
        self._isolate(
            list(dict.fromkeys(sequence.group for sequence in sequences if sequence in self._batch.parked)), failure
        )
        yield

    def release_caches(self) -> None:
        """Drop everything that is kept only for reuse. On the device's thread."""
        for group in self._groups:
            group.past = None
        self._prefiller.trim(0)
        hardware.release(self._decoder.device)

    # -- shared --------------------------------------------------------------------------------------------------------

    def _charge(self, began_s: float, parts: Sequence[tuple[SequenceGroup, int]]) -> None:
        """Charge the seconds since `began_s` to the requests by their rows; in equal parts if no row was computed."""
        spent_s = self._now() - began_s
        total = sum(rows for _, rows in parts)
        self.counters.device_s += spent_s
        for group, rows in parts:
            group.device_s += spent_s * (rows / total if total else 1 / len(parts))
            self._waiting.charge(group, rows)

    def _draw(self, sequences: Sequence[RunningSequence], logits_NV: Tensor) -> list[RunningSequence]:
        """Draw a token for each sequence. Returns those that continue; a request with non-finite logits fails."""
        for start in range(0, len(sequences), _LOGIT_ROWS):
            chunk = sequences[start : start + _LOGIT_ROWS]
            failures = take_tokens(chunk, logits_NV[start : start + _LOGIT_ROWS])
            self.counters.decoded_tokens += sum(sequence.group not in failures for sequence in chunk)
            for group, error in failures.items():
                self._fail(group, error)
        return [sequence for sequence in sequences if sequence.group in self._groups and not sequence.finished]

    def _deliver(self) -> None:
        for group in [group for group in self._groups if group.finished]:
            self._drop(group)
            self.counters.finished += 1
            group.answer(group.output())

    def _fail(self, group: SequenceGroup, error: Exception) -> None:
        if group not in self._groups:
            return
        self._drop(group)
        self.counters.failed += 1
        group.answer(error)

    def _error_for(self, group: SequenceGroup, failure: Exception) -> Exception:
        """The error for the caller of a request that fails alone."""
        if not isinstance(failure, MemoryShortage):
            return failure
        log.warning("no memory for a sample", prompt=group.prompt_tokens, needed=sized(failure.needed or 0))
        todo = "Send a shorter prompt, or lower sampling_params.max_tokens"
        return failure.error(group.description(), self._decoder.device, todo)

    def _drop(self, group: SequenceGroup) -> None:
        """Remove the request and free its slots."""
        self._groups.remove(group)
        self._waiting.drop(group)
        self._batch.drop(group)
