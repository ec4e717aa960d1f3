"""What is measured: a model's shape, and the lengths and numbers of texts. True ones for a GPU, tiny ones for tests.

A model directory is made here, without a download: the true sizes are files that are all hole, whose weights the device
then draws itself (`rig`); the small ones are drawn and stored.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from knapper.engine.models.config import ModelConfig
from knapper.engine.models.weight_files import promised

Config = Mapping[str, Any]


def _qwen3(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, **changes: Any) -> Config:
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128,
        "intermediate_size": inner, "vocab_size": vocabulary, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "hidden_act": "silu", "eos_token_id": vocabulary - 1,
        **changes,
    }  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """`model`: config.json. `small`: that of the model that is compared with transformers and peft, number by number.

    `packed`, `ragged`: lengths of a request's texts; `tenants`, `small_tenants`: of the texts of several runs.
    `texts`, `adapters`: how many decode at once, prompts of `prompt` tokens and `drawn` ones after them. `groups`: a
    GRPO step's prompts, of `samples` samples each. `product`: the width of the product that the peak is found by.
    """

    name: str
    model: Config
    small: Config
    packed: Sequence[int]
    ragged: Sequence[int]
    long: Sequence[int]
    tenants: Sequence[Sequence[int]]
    small_tenants: Sequence[Sequence[int]]
    texts: Sequence[int]
    adapters: Sequence[int]
    prompt: int
    drawn: int
    groups: int
    samples: int
    product: int
    repeats: int
    rank: int = 32
    stored: bool = False  # its weights are drawn into the file


def _of_a_card(name: str, model: Config) -> Sizes:
    return Sizes(
        name, model, small=_qwen3(1024, 4, 8, 4, 3072, 8192, max_position_embeddings=4096),
        packed=[512] * 8, ragged=[40, 1900, 120, 700, 330, 90, 1200, 512, 260, 64, 1500, 410], long=[16384],
        tenants=[[1900], [100, 700], [330, 90, 512], [1200], [260, 640], [1500], [400, 110, 80], [2000]],
        small_tenants=[[256]] * 8, texts=(1, 16, 64, 256), adapters=(1, 4, 32), prompt=128, drawn=64,
        groups=8, samples=8, product=8192, repeats=3,
    )  # fmt: skip


_TINY: Final = _qwen3(
    64, 2, 4, 2, 128, 300, head_dim=32, max_position_embeddings=512, architectures=["Qwen3ForCausalLM"]
)
SIZES: Final[Mapping[str, Sizes]] = {
    "qwen3-8b": _of_a_card("qwen3-8b", _qwen3(4096, 36, 32, 8, 12288, 151936)),
    "qwen3-1.7b": _of_a_card("qwen3-1.7b", _qwen3(2048, 28, 16, 8, 6144, 151936, tie_word_embeddings=True)),
    "tiny": Sizes(
        "tiny", _TINY, _TINY, packed=[16] * 2, ragged=[9, 20], long=[40], tenants=[[9], [12, 5]],
        small_tenants=[[8]] * 2, texts=(1, 4), adapters=(1, 2), prompt=9, drawn=3, groups=1, samples=2, product=64,
        repeats=1, rank=8, stored=True,
    ),
}  # fmt: skip


def write_model(directory: Path, config: Config, *, stored: bool, seed: int = 0) -> Path:
    """A model directory. Without `stored` its file is all hole: zeros that take no disk."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    Tokenizer(models.BPE(vocab={chr(97 + n): n for n in range(26)}, merges=[])).save(str(directory / "tokenizer.json"))
    shapes = dict(promised(ModelConfig.read(directory)))
    if stored:
        generator = torch.Generator().manual_seed(seed)
        save_file({name: drawn(name, shape, generator) for name, shape in shapes.items()}, directory / _FILE)
        return directory
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / _FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return directory


_FILE: Final = "model.safetensors"


def drawn(name: str, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Weights of a size with which every layer matters to the logits, and nothing overflows."""
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    return torch.randn(*shape, generator=generator).mul_(shape[-1] ** -0.5)
