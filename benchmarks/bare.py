"""The bare loops: transformers and peft in this process, no server, batches padded by hand."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Bare:
    """Adapters of rank 16 on every linear of a layer, trained one after another."""

    def __init__(self, directory: Path, adapters: int = 1, dtype: torch.dtype = torch.float32) -> None:
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        config = LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS)
        self.model: PeftModel = get_peft_model(base, config, adapter_name="run0")
        for index in range(1, adapters):
            self.model.add_adapter(f"run{index}", config)
        self.names = [f"run{index}" for index in range(adapters)]
        self._optimizers = {name: self._optimizer(name) for name in self.names}

    def _optimizer(self, name: str) -> torch.optim.Optimizer:
        self.model.set_adapter(name)
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)

    def step(
        self, texts: Sequence[Sequence[int]], weights: Sequence[Sequence[float]], name: str = "run0", at_once: int = 0
    ) -> float:
        """Cross entropy of the next tokens, summed, and one AdamW step; the loss.

        `at_once`: texts of a forward and backward (0: all), where all together take more memory than there is.
        """
        if len(self.names) > 1:
            self.model.set_adapter(name)
        self.model.train()
        size = at_once or len(texts)
        loss = sum(
            self._accumulate(texts[first : first + size], weights[first : first + size])
            for first in range(0, len(texts), size)
        )
        optimizer = self._optimizers[name]
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def _accumulate(self, texts: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]) -> float:
        tokens_BT, mask_BT, weights_BT = _padded(texts, weights)
        logits_BTV = self.model(input_ids=tokens_BT[:, :-1], attention_mask=mask_BT[:, :-1]).logits
        losses_BT = F.cross_entropy(logits_BTV.float().transpose(1, 2), tokens_BT[:, 1:], reduction="none")
        loss = (losses_BT * weights_BT[:, 1:]).sum()
        loss.backward()
        return float(loss.detach())

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> Tensor:
        """`tokens` sampled tokens of each prompt; prompts have one length."""
        self.model.eval()
        prompt_ids = torch.tensor([list(prompt) for prompt in prompts])
        sequences = self.model.generate(  # type: ignore[no-untyped-call]  # peft has no types here
            input_ids=prompt_ids, attention_mask=torch.ones_like(prompt_ids), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip
        assert isinstance(sequences, Tensor)
        return sequences


def _padded(texts: Sequence[Sequence[int]], weights: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(map(len, texts))
    tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return tokens, mask, torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in weights])
