"""Requests of several adapters decode together, each as if it were alone.

One task on the device serves all of them: it admits what fits, computes prompts, then gives every active text one token
a step, and yields between steps, so that training takes its turns. It ends when nothing is left.

    waiting jobs --turn--> prefill --first token--> slots of the cache --step, step ...--> results
                                                          |     ^
                                                          +-> parked texts

Next is the tenant for which the fewest tokens were computed, of prompts and of samples (`FairShare`; a virtual token
counter: Sheng et al., OSDI 2024), there the job that arrived first, a quarter of the slots' worth of texts a turn, so
that a request for a thousand does not hold up the rest.

Memory: a text reserves, when it begins, the positions that it can grow to. A job's prompt's keys and values are kept
between its turns while there is room, else computed again. In room that nobody else needs they are kept for later
requests too (`Beginnings`).

What breaks is its own job's affair. A pass over several prompts that breaks is repeated, each job by itself, and one
that lacks memory once more when no other text decodes; who breaks it then fails, and says what there was too little of.
A step that lacks memory is repeated once everything that was kept for later is gone, then with the younger half of the
texts parked: they wait, and go on from where they were (on a CPU to the last bit). A step that breaks otherwise goes on
with one job after another.
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
from knapper.engine.out_of_memory import MemoryShortage, told
from knapper.engine.sampling.decode_batch import DecodeBatch
from knapper.engine.sampling.next_tokens import NonFiniteLogits, take_tokens
from knapper.engine.sampling.prefill_queue import FreeCapacity, WaitingJobs, next_parked, next_turns
from knapper.engine.sampling.prompt_logprobs import PromptLogprobs
from knapper.engine.sampling.prompts import Prefiller, SamplingCounters
from knapper.engine.sampling.sequence import Isolation, RunningSequence, SequenceGroup
from knapper.errors import Unavailable
from knapper.text.sizes import sized

_LOGIT_ROWS: Final = 64  # rows of vocabulary-wide tensors at a time: bounds memory
_PREFIX_CACHE_PART: Final = 4  # of the memory for keys and values: 1 / so much may hold prompts of earlier requests

log = structlog.get_logger()


class SamplingScheduler:
    """At most `slots_max` texts decode at once, within `kv_tokens_max` positions. `now`: seconds, for costs only."""

    def __init__(
        self, decoder: Model, device: Executor, slots_max: int, kv_tokens_max: int, now: Callable[[], float]
    ) -> None:
        assert slots_max >= 1
        self.counters = SamplingCounters()
        self._decoder, self._device = decoder, device
        self._slots_max, self._kv_tokens_max, self._now = slots_max, kv_tokens_max, now
        # Callers and the device's thread meet at these two, under the lock.
        self._lock = threading.Lock()
        self._arrivals: list[SequenceGroup] = []
        self._working = False
        # The rest belongs to the device's thread.
        self._jobs: list[SequenceGroup] = []  # all that are not finished
        self._waiting = WaitingJobs(max(1, slots_max // 4))
        self._ages = itertools.count()
        self._cache = decoder.texts(kv_tokens_max)
        self._active = DecodeBatch(self._cache, kv_tokens_max, self.counters)
        self._strained = False  # the last step lacked memory, and is tried once more before anyone joins
        self._prefilling = Prefiller(decoder, self.counters, kv_tokens_max // _PREFIX_CACHE_PART)

    @property
    def longest(self) -> int:
        """Positions that one text can have."""
        return self._cache.longest

    def positions(self, length: int) -> int:
        """What a text of so many reserves."""
        return self._cache.positions(length)

    @property
    def active(self) -> int:
        """Texts that decode."""
        return len(self._active.texts)

    @property
    def waiting(self) -> int:
        """Requests with texts that have not begun."""
        return len(self._arrivals) + len(self._waiting)

    def submit(self, job: SequenceGroup) -> None:
        """Its future has the answer. Raises Unavailable when too many wait."""
        with self._lock:
            if self.waiting >= limits.samples_waiting_max:
                raise Unavailable(f"{self.waiting} sample requests wait; allowed: {limits.samples_waiting_max}")
            self._arrivals.append(job)
            if not self._working:
                self._working = True
                self._device.submit(self._work(), "samples")

    # From here on: the device's thread.

    def _work(self) -> Work[None]:
        try:
            while self._look():
                if not (self._strained and self._active.texts):
                    yield from self._resume()
                    yield from self._admit()
                if self._active.texts:
                    self._advance()
                yield
        except BaseException as error:
            self._abandon(error)
            raise

    def _look(self) -> bool:
        """Take in what arrived and drop what was cancelled. False when nothing is left: the task then ends."""
        with self._lock:
            arrived, self._arrivals = self._arrivals, []
            self._jobs.extend(arrived)
            self._waiting.join(arrived)
            for job in [job for job in self._jobs if job.future.cancelled()]:
                self._drop(job)
                self.counters.cancelled += 1
            self._waiting.keep_shares_of(self._jobs)
            self._working = bool(self._jobs)
            return self._working

    def _abandon(self, error: BaseException) -> None:
        """Something broke that no request is to blame for: every caller hears it, the next request begins afresh."""
        with self._lock:
            jobs = self._jobs + self._arrivals
            self._jobs, self._arrivals, self._working = [], [], False
            self._waiting.clear()
            self._cache = self._decoder.texts(self._kv_tokens_max)
            self._active, self._strained = DecodeBatch(self._cache, self._kv_tokens_max, self.counters), False
            self._prefilling.trim(0)
        for job in jobs:
            self.counters.failed += 1
            job.answer(error)

    # -- beginning -----------------------------------------------------------------------------------------------------

    def _admit(self) -> Work[None]:
        """Begin what there is room for."""
        waiting = () if self._active.parked else self._waiting.in_turn()  # who has begun goes first
        if not (turns := next_turns(waiting, self._places(), self._prefilling.rows)):
            return
        self._waiting.serve(turns[0][0])
        try:
            yield from self._prefill([job for job, _ in turns if job.needs_prefill])
            self._begin(turns)
        except Exception as error:  # noqa: BLE001  what one job's prompt brings out must not fail the others
            failed = told(error)
        else:
            yield
            return
        self._part([job for job, _ in turns], failed)
        yield

    def _places(self) -> FreeCapacity:
        active = self._active
        return FreeCapacity(
            self._slots_max - len(active.texts), active.free(), active.jobs, overtaken_max=self._slots_max
        )

    def _prefill(self, jobs: Sequence[SequenceGroup]) -> Work[None]:
        """One pass over the prompts of `jobs`, then their log-probabilities if they are asked for."""
        if not jobs:
            return
        began_s = self._now()
        hidden = self._prefilling.compute(jobs)
        hardware.finish(self._decoder.device)
        self._charge(began_s, [(job, rows.shape[0]) for job, rows in zip(jobs, hidden, strict=True)])
        yield
        for job, rows in zip(jobs, hidden, strict=True):
            if job.scores is None and PromptLogprobs.wanted(job.request):
                scores = PromptLogprobs(job.request)
                before, last = job.prompt_tokens - rows.shape[0], job.prompt_tokens - 1
                for start in range(scores.first, last, _LOGIT_ROWS):  # the last row tells of the first sampled token
                    stop = min(start + _LOGIT_ROWS, last)
                    if not self._score(job, scores, start, rows[start - before : stop - before]):
                        break
                    yield
                job.scores = scores

    @torch.inference_mode()
    def _score(self, job: SequenceGroup, scores: PromptLogprobs, start: int, hidden_NH: Tensor) -> bool:
        """False when the job failed: its logits are not numbers."""
        began_s = self._now()
        logits = self._decoder.logits(hidden_NH, Segments([job.segment(0, hidden_NH.shape[0])]))
        finite = bool(logits.isfinite().all())
        if finite:
            scores.add(start, logits)
        self._charge(began_s, [(job, 1)])
        if not finite:
            self._fail(job, NonFiniteLogits.of(job))
        return finite

    @torch.inference_mode()
    def _begin(self, turns: Sequence[tuple[SequenceGroup, int]]) -> None:
        """The first token of `count` texts of each job; those that go on get their slots."""
        texts: list[RunningSequence] = []
        for job, count in turns:
            if job in self._jobs and not job.future.cancelled():
                texts += self._waiting.begin(job, count)
        for text in texts:
            text.age = next(self._ages)
            if text.job.tokens_max == 0:
                text.finish(stopped=False)
        try:
            self._first_tokens([text for text in texts if text.job.tokens_max > 0])
        finally:
            self._not_begun(texts)
            self._release_prompts()
            self._deliver()

    def _first_tokens(self, texts: Sequence[RunningSequence]) -> None:
        for start in range(0, len(texts), _LOGIT_ROWS):
            began_s, some = self._now(), texts[start : start + _LOGIT_ROWS]
            jobs = list(dict.fromkeys(text.job for text in some))
            last_JH = torch.cat([job.last_1H for job in jobs if job.last_1H is not None])
            logits_JV = self._decoder.logits(last_JH, Segments([job.segment(row, 1) for row, job in enumerate(jobs)]))
            place = {job: row for row, job in enumerate(jobs)}
            rows = torch.tensor([place[text.job] for text in some], device=logits_JV.device)
            for text in self._draw(some, logits_JV[rows]):
                self._active.seat(text, text.job.kept)
            self._charge(began_s, [(text.job, 1) for text in some])

    def _not_begun(self, texts: Sequence[RunningSequence]) -> None:
        """Those that broke off before they had a place: with a token they are parked, without one they begin again."""
        seated = set(self._active.texts.values())
        for text in texts:
            job = text.job
            if job not in self._jobs or text.finished or text in seated:
                continue
            if text.tokens:
                self._active.wait(text)
                continue
            self._waiting.take_back(text)

    def _release_prompts(self) -> None:
        """Prompts stay for texts that are still to begin, the first in line first, in room that no text reserved.

        What is left is for the prompts of earlier requests.
        """
        free = self._active.free()
        for job in self._jobs:
            if not job.left:
                job.kept = None
        self._prefilling.trim(self._waiting.keep_prompts(free))

    # -- decoding ------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """A step, which fails nobody but who breaks it alone."""
        try:
            self._step()
        except Exception as error:  # noqa: BLE001  what one text brings out must not fail the others
            failed = told(error)
        else:
            self._strained = False
            return
        self._active.restore()
        self._deliver()
        self._relieve(failed)

    @torch.inference_mode()
    def _step(self) -> None:
        """One token for every active text."""
        began_s = self._now()
        self._cache.settle()
        texts = [self._active.texts[slot] for slot in self._cache.rows]
        tokens = torch.tensor([text.tokens[-1] for text in texts], device=self._decoder.device)
        self._draw(texts, self._cache.step(tokens, [text.job.lora for text in texts]))
        self._active.leave()
        self.counters.steps += 1
        self._charge(began_s, [(text.job, 1) for text in texts])
        self._deliver()

    # -- when something breaks -----------------------------------------------------------------------------------------

    def _relieve(self, failed: Exception) -> None:
        """A step broke, and is as if it had not been: what can be done that the next one does not."""
        self._let_go()
        jobs = self._active.jobs
        if isinstance(failed, MemoryShortage) and not self._strained:
            self._strained = True
        elif isinstance(failed, MemoryShortage) and self.active > 1:
            self._active.park_younger_half()
        elif len(jobs) > 1:
            for job in jobs:
                job.suspect = True
            self._active.park_all()
        else:
            for job in jobs:
                self._fail(job, self._answer(job, failed))
        log.warning("a step broke", reason=repr(failed), decoding=self.active, parked=len(self._active.parked))

    def _part(self, jobs: Sequence[SequenceGroup], failed: Exception) -> None:
        """A pass over the jobs' prompts, or over what their parked texts had, broke: they are computed again apart."""
        self._let_go()
        present = [job for job in jobs if job in self._jobs]
        for job in present:
            job.forget_prompt()
            if len(present) > 1 or (isinstance(failed, MemoryShortage) and job.company == Isolation.ANY):
                job.company = max(job.company, Isolation.OWN_PASSES)
            elif self._may_fit_alone(job, failed):
                job.company = Isolation.NOBODY
            else:
                self._fail(job, self._answer(job, failed))

    def _may_fit_alone(self, job: SequenceGroup, failed: Exception) -> bool:
        """Whether memory is lacking that the texts of others hold."""
        if not isinstance(failed, MemoryShortage) or job.company == Isolation.NOBODY or set(self._active.jobs) <= {job}:
            return False
        others = self._cache.tokens * self._decoder.bytes_per_token
        return failed.needed is None or failed.needed <= hardware.memory_left(self._decoder.device) + others

    def _resume(self) -> Work[None]:
        """Parked texts go on, the oldest first, as far as there is room: one pass over what they had."""
        if not (texts := next_parked(self._active.parked, self._places())):
            return
        began_s = self._now()
        try:
            kept = self._prefilling.again(texts)
            hardware.finish(self._decoder.device)
            for text, own in zip(texts, kept, strict=True):
                self._active.seat(text, own)
                self._active.parked.remove(text)
        except Exception as error:  # noqa: BLE001  as above
            failed = told(error)
        else:
            self._charge(began_s, [(text.job, text.length) for text in texts])
            yield
            return
        self._part(list(dict.fromkeys(text.job for text in texts if text in self._active.parked)), failed)
        yield

    def _let_go(self) -> None:
        """Of everything that is kept only because it may be of use later."""
        for job in self._jobs:
            job.kept = None
        self._prefilling.trim(0)
        hardware.release(self._decoder.device)

    # -- of both -------------------------------------------------------------------------------------------------------

    def _charge(self, began_s: float, parts: Sequence[tuple[SequenceGroup, int]]) -> None:
        """The seconds since then were the jobs', by their rows; where none was computed, in equal parts."""
        spent_s = self._now() - began_s
        total = sum(rows for _, rows in parts)
        self.counters.device_s += spent_s
        for job, rows in parts:
            job.device_s += spent_s * (rows / total if total else 1 / len(parts))
            self._waiting.charge(job, rows)

    def _draw(self, texts: Sequence[RunningSequence], logits_NV: Tensor) -> list[RunningSequence]:
        """A token for each text. Returns those that go on; a job whose logits are not numbers fails."""
        for start in range(0, len(texts), _LOGIT_ROWS):
            some = texts[start : start + _LOGIT_ROWS]
            failed = take_tokens(some, logits_NV[start : start + _LOGIT_ROWS])
            self.counters.decoded_tokens += sum(text.job not in failed for text in some)
            for job, error in failed.items():
                self._fail(job, error)
        return [text for text in texts if text.job in self._jobs and not text.finished]

    def _deliver(self) -> None:
        for job in [job for job in self._jobs if job.finished]:
            self._drop(job)
            self.counters.finished += 1
            job.answer(job.output())

    def _fail(self, job: SequenceGroup, error: Exception) -> None:
        if job not in self._jobs:
            return
        self._drop(job)
        self.counters.failed += 1
        job.answer(error)

    def _answer(self, job: SequenceGroup, failed: Exception) -> Exception:
        """What is told to the caller of a job that fails alone."""
        if not isinstance(failed, MemoryShortage):
            return failed
        log.warning("no memory for a sample", prompt=job.prompt_tokens, needed=sized(failed.needed or 0))
        todo = "Send a shorter prompt, or lower sampling_params.max_tokens"
        return failed.error(job.what(), self._decoder.device, todo)

    def _drop(self, job: SequenceGroup) -> None:
        """The job leaves, and its slots at once."""
        self._jobs.remove(job)
        self._waiting.drop(job)
        self._active.drop(job)
