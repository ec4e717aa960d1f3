"""The same model once more, by transformers and peft, and the published formulas once more, in plain torch.

N positions of a datum, K targets a position, V vocabulary.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from tinker import types
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.conformance.server import Dtype
from tests.nearness import expect_near

T = TypeVar("T")


class Reference:
    """The base model in `dtype`, with the adapter in `adapter` if there is one, its weights trainable."""

    def __init__(self, model: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager")
        with warnings.catch_warnings():
            # PEFT cannot know that an output adapter of its own beside a tied embedding is meant.
            warnings.filterwarnings("ignore", ".*tie_word_embeddings")
            self.module = base if adapter is None else PeftModel.from_pretrained(base, adapter, is_trainable=True)

    def distribution(self, tokens: list[int]) -> Tensor:
        """log p(next token) after each token, (N, V)."""
        logits = self.module(input_ids=torch.tensor([tokens])).logits[0].float()
        return torch.log_softmax(logits, dim=-1)

    def after(self, prompt: list[int], text: list[int], temperature: float = 1.0) -> Tensor:
        """log p(each token of `text`), tempered, (N, V)."""
        return torch.log_softmax(self.distribution(prompt + text[:-1])[len(prompt) - 1 :] / temperature, dim=-1)

    def continued(self, prompt: list[int], text: list[int], temperature: float = 1.0) -> Tensor:
        """Of `text` after the prompt, (N)."""
        return self.after(prompt, text, temperature).gather(1, torch.tensor(text)[:, None])[:, 0]

    def logprobs(self, datum: types.Datum) -> Tensor:
        """Of the datum's targets, (N) or (N, K)."""
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()
        distribution_NV = self.distribution(datum.model_input.to_ints())
        found = distribution_NV.gather(1, targets if targets.dim() == 2 else targets[:, None])
        return found if targets.dim() == 2 else found[:, 0]

    def all_logprobs(self, batch: Iterable[types.Datum]) -> Tensor:
        """Of every datum's targets, one after another."""
        return torch.cat([self.logprobs(datum).flatten() for datum in batch])

    def trainable(self) -> dict[str, Tensor]:
        """The adapter's matrices, by the names that PEFT saves them under."""
        return {name.replace(".default", ""): p for name, p in self.module.named_parameters() if p.requires_grad}


class Standard:
    """What a server that computes in `dtype` is measured by: see tests/nearness.py."""

    def __init__(self, model: Path, adapter: Path | None, dtype: Dtype) -> None:
        self.truth = Reference(model, adapter)
        self.peer = self.truth if dtype == "float32" else Reference(model, adapter, getattr(torch, dtype))

    def both(self, compute: Callable[[Reference], T]) -> tuple[T, T]:
        """Of the truth, and of the peer; `compute` may train the reference."""
        truth = compute(self.truth)
        return truth, truth if self.peer is self.truth else compute(self.peer)

    def expect(self, found: Any, compute: Callable[[Reference], Tensor], what: str = "") -> None:
        """`found` is as near the truth as the peer is."""
        with torch.no_grad():
            expect_near(torch.as_tensor(found), *self.both(compute), what=what)


def loss(name: str, datum: types.Datum, p: Tensor, config: Mapping[str, float]) -> Tensor:
    """The sum over the datum's tokens; `p`: the learner's log-probabilities of the targets."""
    given = {key: value.to_torch() for key, value in datum.loss_fn_inputs.items()}
    weights = given.get("weights", torch.ones_like(p))
    if name == "cross_entropy":
        return -(weights * p).sum()
    q, a = given["logprobs"], given["advantages"]
    ratio = torch.exp(p - q)
    low, high = (
        given.get(key, torch.tensor(config.get(key, default)))
        for key, default in zip(
            ("clip_low_threshold", "clip_high_threshold"), _clips.get(name, (0.0, 0.0)), strict=True
        )
    )
    if name == "importance_sampling":
        return -(weights * ratio * a).sum()
    if name == "dro":
        return -(weights * p * a).sum() + 0.5 * config.get("beta", 0.05) * (weights * (p - q) ** 2).sum()
    if name == "cispo":
        return -(weights * ratio.detach().clamp(low, high) * p * a).sum()
    if name == "gspo":
        mask = given["sequence_ratio_mask"].bool()
        ratio = torch.exp((p - q)[mask].mean()).detach() * torch.exp(p - p.detach())
    return -(weights * torch.minimum(ratio * a, ratio.clamp(low, high) * a)).sum()


_clips = {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0)}
