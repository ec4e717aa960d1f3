"""Sequences that decode together come and go, and each keeps its own adapter."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from knapper.engine.layers.lora import Lora
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.prefill import PrefillPrompt
from tests.engine.models.test_decoder import decoder_of, lora_of
from tests.engine.tiny import tiny_model


def steps(decoder: Decoder, adapters: Sequence[Lora | None], story: Sequence[Sequence[int]]) -> list[dict[int, Tensor]]:
    """Logits by sequence, for each step; `story`: which sequences take part in it, sequence n with `adapters[n]`."""
    decode_state = decoder.decode_state(1 << 14)
    slots: dict[int, object] = {}
    by_step = []
    for members in story:
        for gone in set(slots) - set(members):
            decode_state.remove(slots.pop(gone))  # type: ignore[arg-type]  # whatever it is
        for number in members:
            if number not in slots:
                prompt = PrefillPrompt(np.arange(20 + number, dtype=np.int32), adapters[number])
                (prefilled,) = decoder.prefill([prompt])
                slots[number] = decode_state.add(prefilled.past, len(prompt.tokens_T))
        decode_state.reserve()
        order = [next(number for number, slot in slots.items() if slot is each) for each in decode_state.rows]
        logits = decode_state.step(
            torch.tensor([7 + number for number in order]), [adapters[number] for number in order]
        )
        by_step.append(dict(zip(order, logits, strict=True)))
    return by_step


@pytest.mark.parametrize("ranks", [(4, 4, 4), (3, 5, 8), (8, 40, 16)])
def test_an_adapter_stays_a_texts_own_whoever_came_with_it_and_left(
    tmp_path: Path, ranks: tuple[int, int, int]
) -> None:
    """Adapters lie side by side for as long as half of them are used: also when one of them has all the rows."""
    decoder = decoder_of(tiny_model(tmp_path))
    adapters = [lora_of(decoder, seed=seed, rank=rank) for seed, rank in enumerate(ranks)]
    alone = [steps(decoder, [*adapters, None], [[number]] * 3) for number in range(4)]
    for story in (
        [[0, 1], [1], [1]],
        [[0, 1], [0], [0]],
        [[0, 1, 3], [1, 3], [1]],
        [[0, 1, 2], [1, 2], [2]],
        [[2, 1, 0], [2, 0], [2]],
        [[0, 3], [0], [0]],
    ):
        began: dict[int, int] = {}
        for step, logits_by_number in enumerate(steps(decoder, [*adapters, None], story)):
            for number, logits in logits_by_number.items():
                own = step - began.setdefault(number, step)
                assert torch.equal(logits, alone[number][own][number]), f"text {number} in step {step} of {story}"
