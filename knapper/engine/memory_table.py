"""docs/operating.md's table of what fits which card, by the account of memory: `python -m knapper.engine.memory_table`.

Nothing of it is measured on a GPU.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from knapper.engine import memory
from knapper.engine.memory import CARDS, ModelBytes
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.families.gemma import BOTH_SIDES
from knapper.engine.models.families.gpt_oss import CLAMPED, EXPERTS
from knapper.engine.models.layer import Layer, ScoreRule, SelfAttention
from knapper.engine.models.mlp import FeedForward, Mixture, Routing
from knapper.engine.models.rotary import Rope
from knapper.engine.ranks import plan
from knapper.errors import UserError

_SHARES: Final = (1.0, 0.45)


def _model(hidden: int, layers: int, heads: int, inner: int, *, tied: bool, family: str = "qwen3") -> ModelConfig:
    """A model by its sizes; heads of 128, 8 of them with keys and values."""
    qwen = family == "qwen3"
    mixer = SelfAttention(heads, 8, 128, ScoreRule(128**-0.5), Rope(1e6, 128), qk_norm="head" if qwen else None)
    return ModelConfig(
        model_type=family, vocab_size=151_936 if qwen else 128_256, hidden=hidden,
        layers=layers * (Layer(mixer, FeedForward(inner)),), rms_eps=1e-6, tied=tied,
        context=40_960 if qwen else 131_072, eos=(),
    )  # fmt: skip


def _gemma_3_12b() -> ModelConfig:
    mixer = SelfAttention(16, 8, 256, ScoreRule(256**-0.5), Rope(1e6, 256), qk_norm="head")
    return ModelConfig(
        model_type="gemma3_text", vocab_size=262_208, hidden=3840,
        layers=48 * (Layer(mixer, FeedForward(15_360), BOTH_SIDES),), rms_eps=1e-6, tied=True, context=131_072, eos=(),
    )  # fmt: skip


def _qwen3_30b_a3b() -> ModelConfig:
    mixer = SelfAttention(32, 4, 128, ScoreRule(128**-0.5), Rope(1e6, 128), qk_norm="head")
    experts = Mixture(768, Routing(128, 8, renormalised=True))
    return ModelConfig(
        model_type="qwen3_moe", vocab_size=151_936, hidden=2048, layers=48 * (Layer(mixer, experts),), rms_eps=1e-6,
        tied=False, context=40_960, eos=(),
    )  # fmt: skip


def _qwen3_235b_a22b() -> ModelConfig:
    mixer = SelfAttention(64, 4, 128, ScoreRule(128**-0.5), Rope(1e6, 128), qk_norm="head")
    experts = Mixture(1536, Routing(128, 8, renormalised=True))
    return ModelConfig(
        model_type="qwen3_moe", vocab_size=151_936, hidden=4096, layers=94 * (Layer(mixer, experts),), rms_eps=1e-6,
        tied=False, context=40_960, eos=(),
    )  # fmt: skip


def _gpt_oss_20b() -> ModelConfig:
    whole = SelfAttention(
        64, 8, 64, ScoreRule(64**-0.5), Rope(150000.0, 64), qkv_bias=True, output_bias=True, sinks=True
    )
    sliding = replace(whole, scores=replace(whole.scores, window=128))
    experts = Mixture(2880, Routing(32, 4, renormalised=True, biased=True), CLAMPED, EXPERTS)
    return ModelConfig(
        model_type="gpt_oss", vocab_size=201_088, hidden=2880,
        layers=12 * (Layer(sliding, experts), Layer(whole, experts)), rms_eps=1e-5, tied=False, context=131_072, eos=(),
    )  # fmt: skip


MODELS: Final[Mapping[str, ModelConfig]] = {
    "Qwen3-1.7B": _model(2048, 28, 16, 6144, tied=True),
    "Llama-3.2-3B": _model(3072, 28, 24, 8192, tied=True, family="llama"),
    "Qwen3-4B": _model(2560, 36, 32, 9728, tied=True),
    "Qwen3-8B": _model(4096, 36, 32, 12288, tied=False),
    "Gemma-3-12B, text": _gemma_3_12b(),
    "Qwen3-14B": _model(5120, 40, 40, 17408, tied=False),
    "gpt-oss-20B": _gpt_oss_20b(),
    "Qwen3-30B-A3B": _qwen3_30b_a3b(),
    "Qwen3-32B": _model(5120, 64, 64, 25600, tied=False),
}


SPREAD: Final[Mapping[str, ModelConfig]] = {
    "Llama-3.3-70B": _model(8192, 80, 64, 28672, tied=False, family="llama"),
    "Qwen3-235B-A22B": _qwen3_235b_a22b(),
}
_SPREAD_MODELS: Final = ("Qwen3-8B", "Qwen3-32B", *SPREAD)
SPREAD_CARDS: Final = ("L4 (24 GB)", "A100 (80 GB)", "H100 (80 GB)", "H200 (141 GB)")


def lines() -> Iterator[str]:
    """The table, in Markdown: rows of a pass, the longest datum, the tokens of samples in memory."""
    yield f"| base model | share | {' | '.join(CARDS)} |"
    yield "|---|---|" + "---|" * len(CARDS)
    for name, config in MODELS.items():
        model = ModelBytes.planned(config)
        for share in _SHARES:
            cells = " | ".join(_cell(model, card, share) for card in CARDS.values())
            yield f"| {name}, {model.weights / 1e9:.1f} GB | {share:g} | {cells} |"


def spread_lines() -> Iterator[str]:
    """docs/ranks.md's table: the same of a rank, by the number of cards that a model is spread over."""
    yield f"| base model | cards | {' | '.join(SPREAD_CARDS)} |"
    yield "|---|---|" + "---|" * len(SPREAD_CARDS)
    for name in _SPREAD_MODELS:
        config = {**MODELS, **SPREAD}[name]
        for devices in (1, 2, 4, 8):
            model = plan.planned(config, devices)
            cells = [_cell(model, CARDS[card], 1.0) for card in SPREAD_CARDS]
            yield f"| {name}, {ModelBytes.planned(config).weights / 1e9:.0f} GB | {devices} | {' | '.join(cells)} |"


def _cell(model: ModelBytes, card: int, share: float) -> str:
    try:
        account = memory.divide(memory.planned_left(card, share, model.weights), model, 0, is_cpu=False)
    except UserError:
        return "no"
    longest = min(account.datum_rows_max or 0, model.context)
    return f"{_short(account.rows_max)} / {_short(longest)} / {_short(account.kv_tokens)}"


def _short(count: int) -> str:
    return f"{count / 1000:.1f}k" if count < 10_000 else f"{count / 1000:.0f}k"


if __name__ == "__main__":
    sys.stdout.write("\n".join([*lines(), "", *spread_lines()]) + "\n")
