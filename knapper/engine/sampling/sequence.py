"""A sample request and its sequences. V vocabulary, H hidden size, k alternatives."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knapper.engine.images import placed
from knapper.engine.images.placed import PlacedImage
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_grouped import Segment
from knapper.engine.sampling.grammar import Grammar
from knapper.engine.sampling.prompt_logprobs import PromptLogprobs
from knapper.engine.sampling.stop import StopCriteria
from knapper.engine.sampling.token_sampling import uniforms
from knapper.wire.progress import Ending, TokenEvent
from knapper.wire.types import SampledSequence, SampleOutput, SampleRequest, TopK


class Isolation(IntEnum):
    """Which other requests a request may share passes with."""

    ANY = 0
    OWN_PASSES = 1  # its prompt and its parked sequences are computed in passes of their own
    ALONE = 2  # and only while no other request decodes


@dataclass(eq=False)
class SequenceGroup:
    """One request. `tokens_max` of a sequence, within the context. `images` of its prompt. `turn`: sequences that may
    start before it is the next group's turn; `PrefillQueue` sets it.
    """

    request: SampleRequest
    lora: Lora | None
    stops: StopCriteria
    tokens_max: int
    listen: Callable[[TokenEvent], None] | None = None  # on the device's thread; must return at once
    grammar: Grammar | None = None  # that its sequences follow
    images: tuple[PlacedImage, ...] = ()
    future: "Future[SampleOutput]" = field(default_factory=Future)
    turn: int = 0
    started: int = 0  # sequences
    sequences: dict[int, SampledSequence] = field(default_factory=dict)  # finished ones, by number
    past: Any = (
        None  # the prompt's keys and values: kept while sequences wait and there is capacity, else computed again
    )
    past_positions: int = 0  # what it takes of the memory
    last_1H: Tensor | None = None  # the prompt's last row
    reused: int = 0  # prompt tokens that another request had computed
    device_s: float = 0.0  # its part of the passes that it was in
    scores: PromptLogprobs | None = None  # the prompt log-probabilities that the request asks for, once complete
    isolation: Isolation = Isolation.ANY  # raised after a failed pass
    suspect: bool = False  # a decoding step with it failed: it decodes alone
    overtaken: int = 0  # sequences of later requests that started before its own
    _restarts: list["RunningSequence"] = field(default_factory=list)  # sequences that started and got no token

    @property
    def prompt(self) -> tuple[str, bytes, bytes]:
        """What its rows depend on: the adapter, the tokens and the images."""
        return self.request.adapter, self.request.prompt.tobytes(), placed.digest(self.images)

    @property
    def prompt_tokens(self) -> int:
        return int(self.request.prompt.size)

    @property
    def decodes(self) -> bool:
        """Whether its sequences need slots: the last token is never fed, so those of one token need none."""
        return self.tokens_max > 1

    @property
    def length_max(self) -> int:
        """Tokens of a sequence that may come to have keys and values."""
        return self.prompt_tokens + self.tokens_max - 1

    @property
    def left(self) -> int:
        """Sequences that have not started."""
        return self.request.num_samples - self.started + len(self._restarts)

    @property
    def needs_prefill(self) -> bool:
        return self.last_1H is None or (self.past is None and self.decodes)

    @property
    def reusable(self) -> int:
        """How many of the prompt's rows the request does not need to see."""
        if self.scores is None and PromptLogprobs.is_requested(self.request):
            return PromptLogprobs(self.request).first
        return self.prompt_tokens

    @property
    def finished(self) -> bool:
        return len(self.sequences) == self.request.num_samples

    def segment(self, start: int, rows: int) -> Segment:
        return Segment(start, start + rows, self.lora)

    def begin(self, count: int) -> list["RunningSequence"]:
        """`count` sequences, `left` at most."""
        again, self._restarts = self._restarts[:count], self._restarts[count:]
        fresh = [RunningSequence(self, self.started + index) for index in range(count - len(again))]
        self.started += len(fresh)
        return again + fresh

    def take_back(self, sequence: "RunningSequence") -> None:
        """Undo the start of a sequence that got no token."""
        self._restarts.append(sequence)

    def answer(self, result: SampleOutput | BaseException) -> None:
        """Resolve the future, if the caller still waits."""
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(result, BaseException):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)

    def forget_prompt(self) -> None:
        """Compute the prompt again: a pass over it failed."""
        self.last_1H = self.past = None

    def description(self) -> str:
        """The request, as an error message names it."""
        return f"a prompt of {self.prompt_tokens} tokens with up to {self.tokens_max} sampled ones"

    def output(self) -> SampleOutput:
        sequences = [self.sequences[index] for index in range(self.request.num_samples)]
        if self.scores is None:
            return SampleOutput(sequences, prompt_cache_hit_tokens=self.reused, device_s=self.device_s)
        return SampleOutput(
            sequences,
            prompt_cache_hit_tokens=self.reused,
            device_s=self.device_s,
            prompt_logprobs=self.scores.logprobs,
            topk_prompt_logprobs=self.scores.topk,
            target_prompt_logprobs=self.scores.targets,
            prompt_draws=self.scores.draws,
        )


class RunningSequence:
    """One sample of a request. Its random numbers come from (seed, its number) alone, one a token."""

    def __init__(self, group: SequenceGroup, number: int) -> None:
        self.group = group
        self.age = -1  # start order; the youngest has the highest
        self.tokens: list[int] = []
        self.grammar = None if group.grammar is None else group.grammar.start()  # stays while it is parked
        self._number = number
        self._uniforms = uniforms(group.request.seed, number)
        self._uniform: float | None = None
        self._logprobs: list[float] = []
        self._topk: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        """Tokens with keys and values: the next step feeds the last one."""
        return self.group.prompt_tokens + len(self.tokens) - 1

    @property
    def fed_T(self) -> NDArray[np.int32]:
        """The tokens with keys and values."""
        return np.concatenate([self.group.request.prompt, np.array(self.tokens[:-1], dtype=np.int32)])

    @property
    def finished(self) -> bool:
        return self._number in self.group.sequences

    def uniform(self) -> float:
        """The next token's random number; the same until that token is taken."""
        if self._uniform is None:
            self._uniform = float(self._uniforms.random())
        return self._uniform

    def take(self, token: int, logprob: float, topk: tuple[Tensor, Tensor] | None) -> bool:
        """Add a token. True when the sequence ends with it; the group then has the finished sequence."""
        if self.grammar is not None:
            self.grammar.take(token)
        self.tokens.append(token)
        self._uniform = None
        self._logprobs.append(logprob)
        if topk is not None:
            self._topk.append(topk)
        stopped = self.group.stops.ended(self.tokens)
        full = len(self.tokens) >= self.group.tokens_max
        if self.group.listen is not None:
            ending: Ending = "stop" if stopped else "length" if full else ""
            ids, logprobs = ([], []) if topk is None else (topk[0].tolist(), topk[1].tolist())
            alternatives = list(zip(ids, logprobs, strict=True))
            self.group.listen(TokenEvent(self._number, len(self.tokens) - 1, token, logprob, ending, alternatives))
        if stopped or full:
            self.finish(stopped)
        return stopped or full

    def finish(self, stopped: bool) -> None:
        k = self.group.request.topk_sample_logprobs
        self.group.sequences[self._number] = SampledSequence(
            tokens=np.array(self.tokens, dtype=np.int32),
            logprobs=np.array(self._logprobs, dtype=np.float32),
            stopped=stopped,
            topk=_topk(self._topk, k) if k else None,
        )


def _topk(rows: list[tuple[Tensor, Tensor]], k: int) -> TopK:
    if not rows:
        return TopK(np.zeros((0, k), dtype=np.int32), np.zeros((0, k), dtype=np.float32))
    return TopK(
        tokens=torch.stack([tokens for tokens, _ in rows]).cpu().numpy().astype(np.int32),
        logprobs=torch.stack([logprobs for _, logprobs in rows]).cpu().numpy().astype(np.float32),
    )
