"""Prefill of several prompts in one pass: shared rows are computed once, rows of an earlier prompt are reused.

N rows of all prompts, U distinct rows (`Prefixes`), P positions of an earlier prompt, T tokens of one prompt.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knapper.engine.images import placed
from knapper.engine.images.placed import PlacedImage
from knapper.engine.layers.attention import Attend, ConcatenatedAttention, ContinuedAttention, prefix_attention
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_grouped import Segment
from knapper.engine.layers.recurrence import State, Stops, stops
from knapper.engine.training.prefix_sharing import Prefixes
from knapper.engine.transfer import to_device

if TYPE_CHECKING:
    from knapper.engine.models.decoder import Decoder


@dataclass(frozen=True, eq=False)
class Past:
    """What a prompt leaves: keys and values `kv` (layers, 2, T, G, D) and, in a model with recurrences, `states` by
    number of tokens: each layer's after so many. `shift`: what the position of a further token is beyond its number.
    """

    kv: Tensor
    states: Mapping[int, Sequence[State]] = field(default_factory=dict)
    shift: int = 0

    def reusable(self, tokens: int) -> int:
        """How many of the first `tokens` tokens a prompt that begins with them need not compute."""
        return max((stop for stop in self.states if stop <= tokens), default=0) if self.states else tokens

    def begun(self, tokens: int) -> "Past":
        """Of the first tokens, without the states that only ends of earlier prompts left."""
        kept = {*stops(0, tokens)}
        return Past(self.kv[:, :, :tokens], {stop: state for stop, state in self.states.items() if stop in kept})


@dataclass(frozen=True, eq=False)
class PrefillPrompt:
    """A prompt whose first `reused` tokens (not all) are the first tokens of `past`: an earlier prompt's
    `Prefilled.past`. `images`: of all its tokens, in order; none is reused in part.

    `drawn`: how many of the last tokens were drawn one by one while decoding. A model whose bits depend on that
    computes them so again.
    """

    tokens_T: NDArray[np.int32]
    lora: Lora | None
    past: Any = None
    reused: int = 0
    drawn: int = 0
    images: tuple[PlacedImage, ...] = ()

    @property
    def content(self) -> tuple[int, int, bytes, bytes]:
        """What its rows depend on, and which of them are wanted."""
        return id(self.lora), self.reused, self.tokens_T.tobytes(), placed.digest(self.images)


@dataclass(frozen=True)
class Prefilled:
    """`rows` (T - reused, H): of the tokens that were not reused. `past`: keys and values, for sequences and later
    prompts.

    `computed`: rows computed for this prompt, beyond those of the prompts before it.
    """

    rows: Tensor
    past: Any
    computed: int


@dataclass
class _Part:
    """Rows of one adapter that attend together, and the prompts that they belong to."""

    lora: Lora | None
    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    attend: Attend
    past: Past | None  # of the reused positions
    images: list[tuple[int, PlacedImage]]  # with the first row that each has among these
    prompts: list[tuple[int, NDArray[np.int64], int]]  # (number, its rows among these, rows computed for it)


@torch.inference_mode()
def prefill(decoder: "Decoder", prompts: Sequence[PrefillPrompt]) -> list[Prefilled]:
    """In the prompts' order. A prompt has the bits that it has alone, whatever it shares and reuses."""
    first: dict[tuple[int, int, bytes, bytes], int] = {}
    same = [first.setdefault(prompt.content, n) for n, prompt in enumerate(prompts)]
    parts = _fresh(decoder, prompts, set(same)) + [
        _continued(n, prompts[n]) for n in sorted(set(same)) if prompts[n].reused
    ]
    parts.sort(key=lambda part: id(part.lora))  # an adapter's rows together
    rows = [len(part.tokens) for part in parts]
    starts = np.cumsum([0, *rows]).tolist()
    segments = [Segment(start, start + n, part.lora) for start, n, part in zip(starts, rows, parts, strict=False)]
    tokens_N = to_device(np.concatenate([part.tokens for part in parts]), decoder.device)
    positions_N = to_device(placed.joined([part.positions for part in parts]), decoder.device)
    images = [(start + row, image) for start, part in zip(starts, parts, strict=False) for row, image in part.images]
    attend = ConcatenatedAttention([part.attend for part in parts], rows)
    hidden_NH, kv, states = decoder.hidden_and_kv(tokens_N, positions_N, attend, segments, images)
    by_number: dict[int, Prefilled] = {}
    sequences = iter(zip(*states, strict=True)) if states else itertools.repeat(())  # each layer's, in order
    for start, part in zip(starts, parts, strict=False):
        for number, rows_of, computed in part.prompts:
            index = to_device(start + rows_of, decoder.device)
            # Copies: a view would keep the pass of all prompts alive for as long as one sequence waits.
            kv_of = kv.index_select(2, index)
            past = _joined(part.past, kv_of, next(sequences), placed.shift(prompts[number].images))
            by_number[number] = Prefilled(hidden_NH.index_select(0, index), past, computed)
    return [
        by_number[n] if n == number else Prefilled(by_number[n].rows, by_number[n].past, 0)
        for number, n in enumerate(same)
    ]


def _fresh(decoder: "Decoder", prompts: Sequence[PrefillPrompt], chosen: set[int]) -> list[_Part]:
    """The prompts that reuse nothing, by adapter: common prefixes are computed once."""
    groups: dict[int, tuple[Prefixes, list[tuple[int, int]]]] = {}
    for number in sorted(chosen):
        prompt = prompts[number]
        if not prompt.reused:
            group, members = groups.setdefault(id(prompt.lora), (Prefixes(), []))
            before = len(group)
            group.add(prompt.tokens_T, prompt.images)
            members.append((number, len(group) - before))
    parts = []
    for group, members in groups.values():
        rows_of_prompts = np.split(group.rows_N, np.cumsum(group.lengths)[:-1])
        of_prompts = [
            (number, rows, computed) for (number, computed), rows in zip(members, rows_of_prompts, strict=True)
        ]
        attend = prefix_attention([group], decoder.device)
        lora = prompts[members[0][0]].lora
        parts.append(_Part(lora, group.tokens_U, group.positions_U, attend, None, group.images, of_prompts))
    return parts


def _continued(number: int, prompt: PrefillPrompt) -> _Part:
    total, past = len(prompt.tokens_T), prompt.past.begun(prompt.reused)
    tokens = prompt.tokens_T[prompt.reused :].astype(np.int64)
    of_prompt = [(number, np.arange(len(tokens)), len(tokens))]
    attend = ContinuedAttention(past.kv, past.states.get(prompt.reused, ()))
    positions = placed.positions(total, prompt.images)[prompt.reused :]
    images = [(image.at - prompt.reused, image) for image in prompt.images if image.at >= prompt.reused]
    return _Part(prompt.lora, tokens, positions, attend, past, images, of_prompt)


def _joined(before: Past | None, kv: Tensor, layers: Sequence[Stops], shift: int) -> Past:
    """`layers`: the sequence's states in each layer with a recurrence."""
    after = {stop: [layer[stop] for layer in layers] for stop in (layers[0] if layers else ())}
    if before is None:
        return Past(kv, after, shift)
    return Past(torch.cat([before.kv, kv], dim=2), {**before.states, **after}, shift)
