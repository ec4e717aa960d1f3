"""Sampling: requests of several adapters decode together, each as if it were alone.

One task on the device serves all of them: it admits what fits, computes prompts, then gives every active text one token
a step, and yields between steps, so that training takes its turns. It ends when nothing is left.

    waiting jobs --turn--> prefill --first token--> slots of the cache --step, step ...--> results

Memory: a text reserves, when it begins, the positions that it can grow to. Jobs begin in order of arrival, a quarter of
the slots' worth of texts a turn, so that a request for a thousand does not hold up the rest; its prompt's keys and
values are kept between turns while there is room, else computed again. In room that nobody else needs they are kept for
later requests too (`Beginnings`).
"""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Final, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from knapper import limits
from knapper.engine import hardware, sample_checks
from knapper.engine.device import Device, Task
from knapper.engine.draw import alternatives, draw
from knapper.engine.jobs import Job, Text
from knapper.engine.lora import Lora
from knapper.engine.model import Model
from knapper.engine.prefilling import Counters, Prefilling
from knapper.engine.prompt_scores import PromptScores
from knapper.engine.segments import Segments
from knapper.engine.stops import Stops
from knapper.errors import InvalidField, TooLarge, Unavailable, UserError
from knapper.wire.progress import Drawn
from knapper.wire.types import Sample, SampleOutput

_prefill_rows: Final = 512  # prompt tokens of one pass (a longer prompt goes alone): bounds how long decoding waits
_logit_rows: Final = 64  # rows of vocabulary-wide tensors at a time: bounds memory
_beginnings_part: Final = 4  # of the memory for keys and values: 1 / so much may hold prompts of earlier requests
_adapters_kept: Final = 32  # adapters kept between requests, so that a running client's is not read again for each


class NonFiniteLogits(UserError):
    """The weights give logits that are not numbers: nothing can be drawn from them."""

    code = "non_finite"


class AdapterSource(Protocol):
    async def load(self, adapter: str) -> Lora:
        """The adapter that `Sample.adapter` names, on the decoder's device. What a name holds never changes."""
        ...


class Sampler:
    """Continuous batching over one decoder: `slots_max` texts decode at once, within `kv_tokens_max` positions.

    `now`, in seconds, only tells what a request costs.
    """

    def __init__(
        self,
        decoder: Model,
        device: Device,
        adapters: AdapterSource,
        tokenizer: Tokenizer | None,
        *,
        slots_max: int,
        kv_tokens_max: int,
        now: Callable[[], float],
    ) -> None:
        assert slots_max >= 1
        self.counters = Counters()
        self._decoder, self._device, self._source, self._tokenizer = decoder, device, adapters, tokenizer
        self._slots_max, self._kv_tokens_max, self._now = slots_max, kv_tokens_max, now
        self._turn = max(1, slots_max // 4)
        self._loads: OrderedDict[str, asyncio.Future[Lora]] = OrderedDict()
        # Callers and the device's thread meet at these two, under the lock.
        self._lock = threading.Lock()
        self._arrivals: list[Job] = []
        self._working = False
        # The rest belongs to the device's thread.
        self._jobs: list[Job] = []  # all that are not finished
        self._waiting: deque[Job] = deque()  # those with texts that have not begun
        self._texts: dict[Hashable, Text] = {}
        self._cache = decoder.texts()
        self._prefilling = Prefilling(decoder, self.counters, kv_tokens_max // _beginnings_part)

    @property
    def active(self) -> int:
        """Texts that decode."""
        return len(self._texts)

    @property
    def waiting(self) -> int:
        """Requests with texts that have not begun."""
        return len(self._arrivals) + len(self._waiting)

    async def sample(self, request: Sample, listen: Callable[[Drawn], None] | None = None) -> SampleOutput:
        """The samples of one request: in float32 the same tokens for the same request, whoever else is there.

        The log-probabilities are those of the distribution that each token was drawn from (`draw.draw` says more);
        those of the prompt are untempered; only alternatives to its tokens are drawn at the request's temperature, and
        without its top_k and top_p. max_tokens 0 only scores the prompt. Cancelling the caller frees the slots.
        `listen` hears each token as it is drawn: on the device's thread, which waits for it.
        Raises InvalidField or UserError for what cannot be asked, TooLarge for what can never fit, NonFiniteLogits for
        broken weights, Unavailable when too many wait.
        """
        config, params = self._decoder.config, request.params
        sample_checks.check(request, config)
        if params.stop_strings and self._tokenizer is None:
            allowed = "token ids only, as this model has no tokenizer.json"
            raise InvalidField("sampling_params.stop", params.stop_strings[0], allowed)
        room = config.context - int(request.prompt.size)
        ends = () if params.ignore_eos else config.eos
        job = Job(
            request=request,
            lora=await self._lora(request.adapter) if request.adapter else None,
            stops=Stops((*ends, *params.stop_tokens), params.stop_strings, self._tokenizer),
            tokens_max=room if params.max_tokens is None else min(params.max_tokens, room),
            turn=self._turn,
            listen=listen,
        )
        if job.cost > self._kv_tokens_max:
            raise TooLarge(
                f"a prompt of {job.prompt_tokens} tokens with up to {job.tokens_max} sampled ones needs {job.cost} "
                f"positions of key/value memory; allowed: {self._kv_tokens_max}. Lower sampling_params.max_tokens"
            )
        self._enter(job)
        return await asyncio.wrap_future(job.future)

    def _enter(self, job: Job) -> None:
        with self._lock:
            if self.waiting >= limits.samples_waiting_max:
                raise Unavailable(f"{self.waiting} sample requests wait; allowed: {limits.samples_waiting_max}")
            self._arrivals.append(job)
            if not self._working:
                self._working = True
                self._device.submit(self._work(), "samples")

    async def _lora(self, adapter: str) -> Lora:
        load = self._loads.get(adapter)
        if load is None or load.cancelled() or (load.done() and load.exception() is not None):
            load = self._loads[adapter] = asyncio.ensure_future(self._source.load(adapter))
        self._loads.move_to_end(adapter)
        while len(self._loads) > _adapters_kept:
            self._loads.popitem(last=False)
        lora = await asyncio.shield(load)  # one caller's end must not take it from another
        sample_checks.check_adapter(adapter, lora, self._decoder.config)
        return lora

    # From here on: the device's thread.

    def _work(self) -> Task[None]:
        try:
            while self._look():
                if turns := self._next_turns():
                    yield from self._prefill([job for job, _ in turns if job.needs_prefill])
                    self._begin(turns)
                    yield
                if self._texts:
                    self._step()
                    yield
        except BaseException as error:
            self._abandon(error)
            raise

    def _look(self) -> bool:
        """Take in what arrived and drop what was cancelled. False when nothing is left: the task then ends."""
        with self._lock:
            arrived, self._arrivals = self._arrivals, []
            self._jobs.extend(arrived)
            self._waiting.extend(arrived)
            for job in [job for job in self._jobs if job.future.cancelled()]:
                self._drop(job)
                self.counters.cancelled += 1
            self._working = bool(self._jobs)
            return self._working

    def _abandon(self, error: BaseException) -> None:
        """Something broke that no request is to blame for: every caller hears it, the next request begins afresh."""
        with self._lock:
            jobs = self._jobs + self._arrivals
            self._jobs, self._arrivals, self._working = [], [], False
            self._waiting.clear()
            self._texts.clear()
            self._cache = self._decoder.texts()
            self._prefilling.trim(0)
        for job in jobs:
            self.counters.failed += 1
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(error)

    def _next_turns(self) -> list[tuple[Job, int]]:
        """Which jobs begin now and how many texts each, in order, until the first for which there is no room."""
        turns: list[tuple[Job, int]] = []
        slots = self._slots_max - len(self._texts)
        free = self._unreserved()
        rows = 0
        prompts: set[tuple[str, bytes]] = set()  # of this turn: each is computed once
        for job in self._waiting:
            if job.needs_prefill and (prompt := (job.request.adapter, job.request.prompt.tobytes())) not in prompts:
                prompts.add(prompt)
                rows += self._prefilling.rows(job)
            if turns and (rows > _prefill_rows or len(turns) == _logit_rows):
                break
            wanted = job.left if job.cost == 0 else min(job.left, job.turn)
            count = wanted if job.cost == 0 else min(wanted, slots, free // job.cost)
            if count > 0:
                turns.append((job, count))
            if count < wanted:
                break
            slots, free = slots - (count if job.cost else 0), free - count * job.cost
        return turns

    def _prefill(self, jobs: Sequence[Job]) -> Task[None]:
        """One pass over the prompts of `jobs`, then their log-probabilities if they are asked for."""
        if not jobs:
            return
        began_s = self._now()
        hidden = self._prefilling.compute(jobs)
        hardware.finish(self._decoder.device)
        self._charge(began_s, [(job, rows.shape[0]) for job, rows in zip(jobs, hidden, strict=True)])
        yield
        for job, rows in zip(jobs, hidden, strict=True):
            if job.scores is None and PromptScores.wanted(job.request):
                scores = PromptScores(job.request)
                before, last = job.prompt_tokens - rows.shape[0], job.prompt_tokens - 1
                for start in range(scores.first, last, _logit_rows):  # the last row tells of the first sampled token
                    stop = min(start + _logit_rows, last)
                    if not self._score(job, scores, start, rows[start - before : stop - before]):
                        break
                    yield
                job.scores = scores

    def _unreserved(self) -> int:
        """Positions that no text has reserved."""
        return self._kv_tokens_max - sum(text.job.cost for text in self._texts.values())

    @torch.inference_mode()
    def _score(self, job: Job, scores: PromptScores, start: int, hidden_NH: Tensor) -> bool:
        """False when the job failed: its logits are not numbers."""
        began_s = self._now()
        logits = self._decoder.logits(hidden_NH, Segments([job.segment(0, hidden_NH.shape[0])]))
        finite = bool(logits.isfinite().all())
        if finite:
            scores.add(start, logits)
        self._charge(began_s, [(job, 1)])
        if not finite:
            self._fail(job)
        return finite

    @torch.inference_mode()
    def _begin(self, turns: Sequence[tuple[Job, int]]) -> None:
        """The first token of `count` texts of each job; those that go on get their slots."""
        texts: list[Text] = []
        for job, count in turns:
            if job in self._jobs and not job.future.cancelled():
                self._waiting.remove(job)
                texts += job.begin(count)
                job.turn -= count
                if job.left:
                    self._queue(job)
        for text in texts:
            if text.job.tokens_max == 0:
                text.finish(stopped=False)
        texts = [text for text in texts if text.job.tokens_max > 0]
        for start in range(0, len(texts), _logit_rows):
            began_s, some = self._now(), texts[start : start + _logit_rows]
            jobs = list(dict.fromkeys(text.job for text in some))
            last_JH = torch.cat([job.last_1H for job in jobs if job.last_1H is not None])
            logits_JV = self._decoder.logits(last_JH, Segments([job.segment(row, 1) for row, job in enumerate(jobs)]))
            place = {job: row for row, job in enumerate(jobs)}
            rows = torch.tensor([place[text.job] for text in some], device=logits_JV.device)
            for text in self._draw(some, logits_JV[rows]):
                self._texts[self._cache.add(text.job.kept, text.job.prompt_tokens)] = text
            self._charge(began_s, [(text.job, 1) for text in some])
        self._release_prompts()
        self._deliver()

    def _queue(self, job: Job) -> None:
        """First in line again while its turn lasts, else last."""
        if job.turn > 0:
            self._waiting.appendleft(job)
        else:
            job.turn = self._turn
            self._waiting.append(job)

    def _release_prompts(self) -> None:
        """Prompts stay for texts that are still to begin, the first in line first, in room that no text reserved.

        What is left is for the prompts of earlier requests.
        """
        free = self._unreserved()
        for job in self._jobs:
            if not job.left:
                job.kept = None
        for job in self._waiting:
            if job.kept is not None:
                free -= job.prompt_tokens
                if free < 0:
                    job.kept = None
        self._prefilling.trim(free)

    @torch.inference_mode()
    def _step(self) -> None:
        """One token for every active text."""
        began_s = self._now()
        self._cache.settle()
        slots = self._cache.rows
        texts = [self._texts[slot] for slot in slots]
        tokens = torch.tensor([text.tokens[-1] for text in texts], device=self._decoder.device)
        going = set(self._draw(texts, self._cache.step(tokens, [text.job.lora for text in texts])))
        for slot, text in zip(slots, texts, strict=True):
            if text not in going and slot in self._texts:
                del self._texts[slot]
                self._cache.remove(slot)
        self.counters.steps += 1
        self._charge(began_s, [(text.job, 1) for text in texts])
        self._deliver()

    def _charge(self, began_s: float, parts: Sequence[tuple[Job, int]]) -> None:
        """The seconds since then were the jobs', by their rows; where none was computed, in equal parts."""
        spent_s = self._now() - began_s
        total = sum(rows for _, rows in parts)
        self.counters.device_s += spent_s
        for job, rows in parts:
            job.device_s += spent_s * (rows / total if total else 1 / len(parts))

    def _draw(self, texts: Sequence[Text], logits_NV: Tensor) -> list[Text]:
        """A token for each text. Returns those that go on; a job whose logits are not numbers fails."""
        going: list[Text] = []
        for start in range(0, len(texts), _logit_rows):
            some, logits = texts[start : start + _logit_rows], logits_NV[start : start + _logit_rows]
            finite = logits.isfinite().all(-1, keepdim=True)
            drawn = draw(
                torch.where(finite, logits, 0.0),
                [text.job.request.params for text in some],
                [t.uniform() for t in some],
            )
            widest = max(text.job.request.topk_sample_logprobs for text in some)
            likeliest = alternatives(drawn.logprobs_NV, widest) if widest else None
            for row, (text, token, logprob, fine) in enumerate(
                zip(some, drawn.tokens_N.tolist(), drawn.logprobs_N.tolist(), finite[:, 0].tolist(), strict=True)
            ):
                if not fine:
                    self._fail(text.job)
                    continue
                k = text.job.request.topk_sample_logprobs
                topk = (likeliest[0][row, :k], likeliest[1][row, :k]) if likeliest is not None and k else None
                self.counters.decoded_tokens += 1
                if not text.take(token, logprob, topk):
                    going.append(text)
        return [text for text in going if text.job in self._jobs]

    def _deliver(self) -> None:
        for job in [job for job in self._jobs if job.finished]:
            self._drop(job)
            self.counters.finished += 1
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(job.output())

    def _fail(self, job: Job) -> None:
        if job not in self._jobs:
            return
        self._drop(job)
        self.counters.failed += 1
        if job.future.set_running_or_notify_cancel():
            weights = f"adapter {job.request.adapter}" if job.request.adapter else f"model {job.request.base_model}"
            job.future.set_exception(
                NonFiniteLogits(
                    f"{weights} gives logits that are not finite: broken weights. Use an earlier checkpoint"
                )
            )

    def _drop(self, job: Job) -> None:
        """The job leaves, and its slots at once."""
        self._jobs.remove(job)
        if job in self._waiting:
            self._waiting.remove(job)
        for slot in [slot for slot, text in self._texts.items() if text.job is job]:
            del self._texts[slot]
            self._cache.remove(slot)
