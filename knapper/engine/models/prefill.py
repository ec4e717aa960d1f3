"""Prefill of several prompts in one pass: shared rows are computed once, rows of an earlier prompt are reused.

N rows of all prompts, U distinct rows (`Prefixes`), P positions of an earlier prompt, T tokens of one prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knapper.engine.layers.attention import Attend, ConcatenatedAttention, ContinuedAttention, prefix_attention
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_grouped import Segment
from knapper.engine.training.prefix_sharing import Prefixes
from knapper.engine.transfer import to_device

if TYPE_CHECKING:
    from knapper.engine.models.decoder import Decoder


@dataclass(frozen=True, eq=False)
class PrefillPrompt:
    """A prompt whose first `reused` tokens (not all) are the first tokens of `past`: an earlier prompt's
    `Prefilled.past`.

    `drawn`: how many of the last tokens were drawn one by one while decoding. A model whose bits depend on that
    computes them so again.
    """

    tokens_T: NDArray[np.int32]
    lora: Lora | None
    past: Any = None
    reused: int = 0
    drawn: int = 0


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
    past: Tensor | None  # (layers, 2, P, G, D), the reused positions
    prompts: list[tuple[int, NDArray[np.int64], int]]  # (number, its rows among these, rows computed for it)


@torch.inference_mode()
def prefill(decoder: "Decoder", prompts: Sequence[PrefillPrompt]) -> list[Prefilled]:
    """In the prompts' order. A prompt has the bits that it has alone, whatever it shares and reuses."""
    first: dict[tuple[int, int, bytes], int] = {}
    same = [first.setdefault((id(p.lora), p.reused, p.tokens_T.tobytes()), n) for n, p in enumerate(prompts)]
    parts = _fresh(decoder, prompts, set(same)) + [
        _continued(n, prompts[n]) for n in sorted(set(same)) if prompts[n].reused
    ]
    parts.sort(key=lambda part: id(part.lora))  # an adapter's rows together
    rows = [len(part.tokens) for part in parts]
    starts = np.cumsum([0, *rows]).tolist()
    segments = [Segment(start, start + n, part.lora) for start, n, part in zip(starts, rows, parts, strict=False)]
    tokens_N, positions_N = (
        to_device(np.concatenate(arrays), decoder.device)
        for arrays in ([part.tokens for part in parts], [part.positions for part in parts])
    )
    hidden_NH, kv = decoder.hidden_and_kv(
        tokens_N, positions_N, ConcatenatedAttention([part.attend for part in parts], rows), segments
    )
    by_number: dict[int, Prefilled] = {}
    for start, part in zip(starts, parts, strict=False):
        for number, rows_of, computed in part.prompts:
            index = to_device(start + rows_of, decoder.device)
            # Copies: a view would keep the pass of all prompts alive for as long as one sequence waits.
            kv_of = kv.index_select(2, index)
            past = kv_of if part.past is None else torch.cat([part.past, kv_of], dim=2)
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
            members.append((number, group.new_rows(prompt.tokens_T)))
            group.add(prompt.tokens_T)
    parts = []
    for group, members in groups.values():
        rows_of_prompts = np.split(group.rows_N, np.cumsum(group.lengths)[:-1])
        of_prompts = [
            (number, rows, computed) for (number, computed), rows in zip(members, rows_of_prompts, strict=True)
        ]
        attend = prefix_attention([group], decoder.device)
        parts.append(_Part(prompts[members[0][0]].lora, group.tokens_U, group.positions_U, attend, None, of_prompts))
    return parts


def _continued(number: int, prompt: PrefillPrompt) -> _Part:
    total, past = len(prompt.tokens_T), prompt.past[:, :, : prompt.reused]
    tokens = prompt.tokens_T[prompt.reused :].astype(np.int64)
    of_prompt = [(number, np.arange(len(tokens)), len(tokens))]
    return _Part(prompt.lora, tokens, np.arange(prompt.reused, total), ContinuedAttention(past), past, of_prompt)
