"""The same model once more, by transformers and peft, and the published formulas once more, in plain torch.

N positions of a datum, K targets a position, V vocabulary.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from tinker import types
from torch import Tensor
from transformers import AutoModelForCausalLM


class Reference:
    """The base model, with the adapter in `adapter` if there is one, its weights trainable."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        with warnings.catch_warnings():
            # PEFT cannot know that an output adapter of its own beside a tied embedding is meant.
            warnings.filterwarnings("ignore", ".*tie_word_embeddings")
            self.module = base if adapter is None else PeftModel.from_pretrained(base, adapter, is_trainable=True)

    def distribution(self, tokens: list[int]) -> Tensor:
        """log p(next token) after each token, (N, V)."""
        logits = self.module(input_ids=torch.tensor([tokens])).logits[0].float()
        return torch.log_softmax(logits, dim=-1)

    def logprobs(self, datum: types.Datum) -> Tensor:
        """Of the datum's targets, (N) or (N, K)."""
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()
        distribution_NV = self.distribution(datum.model_input.to_ints())
        found = distribution_NV.gather(1, targets if targets.dim() == 2 else targets[:, None])
        return found if targets.dim() == 2 else found[:, 0]

    def trainable(self) -> dict[str, Tensor]:
        """The adapter's matrices, by the names that PEFT saves them under."""
        return {name.replace(".default", ""): p for name, p in self.module.named_parameters() if p.requires_grad}


def loss(name: str, datum: types.Datum, p: Tensor, config: Mapping[str, float]) -> Tensor:
    """The sum over the datum's tokens; `p`: the learner's log-probabilities of the targets."""
    given = {key: value.to_torch() for key, value in datum.loss_fn_inputs.items()}
    if name == "cross_entropy":
        return -(given["weights"] * p).sum()
    q, a = given["logprobs"], given["advantages"]
    ratio = torch.exp(p - q)
    low, high = (
        given.get(key, torch.tensor(config.get(key, default)))
        for key, default in zip(
            ("clip_low_threshold", "clip_high_threshold"), _clips.get(name, (0.0, 0.0)), strict=True
        )
    )
    if name == "importance_sampling":
        return -(ratio * a).sum()
    if name == "dro":
        return -(p * a).sum() + 0.5 * config.get("beta", 0.05) * ((p - q) ** 2).sum()
    if name == "cispo":
        return -(ratio.detach().clamp(low, high) * p * a).sum()
    if name == "gspo":
        mask = given["sequence_ratio_mask"].bool()
        ratio = torch.exp((p - q)[mask].mean()).detach() * torch.exp(p - p.detach())
    return -torch.minimum(ratio * a, ratio.clamp(low, high) * a).sum()


_clips = {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0)}
