"""Tiny random checkpoints of images and text, written as those on the hub are: in shards, of either order of names."""

import json
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from tests.engine.strange import NATIVE
from tests.engine.tiny import tiny_model

_VISION: Final[dict[str, Any]] = {"hidden_size": 32, "intermediate_size": 48, "image_size": 28, "patch_size": 14}
_SIGLIP: Final = {**_VISION, "num_hidden_layers": 1, "num_attention_heads": 2}
_QWEN: Final[dict[str, Any]] = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
_IMAGE_TOKENS: Final = {"image_token_id": 250, "video_token_id": 251}
_QWEN2: Final = {name: value for name, value in NATIVE["qwen2"][1].items() if name != "use_sliding_window"}

_OF_TEXT: Final = ("norm_topk_prob", "num_local_experts")

# (configuration, that of its text, what it has beside it)
COMPOSITE: Final[dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "gemma3": (
        "Gemma3Config",
        NATIVE["gemma3"][1],
        {"vision_config": _SIGLIP, "mm_tokens_per_image": 4, "image_token_index": 250},
    ),
    "mistral3": (
        "Mistral3Config",
        {**NATIVE["mistral"][1], "model_type": "mistral"},
        {
            "vision_config": {**_SIGLIP, "model_type": "pixtral", "head_dim": 16},
            "image_token_index": 250,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {**_QWEN2, "rope_parameters": {"type": "mrope", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        {"vision_config": {**_QWEN, "out_hidden_size": 64, "fullatt_block_indexes": [0]}, **_IMAGE_TOKENS},
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {
            **{name: value for name, value in NATIVE["qwen3_yarn"][1].items() if name != "rope_parameters"},
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True,
            },
        },
        {
            "vision_config": {
                **_QWEN, "depth": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1],
                "num_position_embeddings": 16,
            },
            **_IMAGE_TOKENS,
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        {
            **{name: value for name, value in NATIVE["qwen3_moe"][1].items() if name not in _OF_TEXT},
            "num_experts": 6,
            "mlp_only_layers": [1],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True,
            },
        },
        {
            "vision_config": {
                **_QWEN, "out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
            },
            "tie_word_embeddings": False,
            **_IMAGE_TOKENS,
        },
    ),
    "qwen3_5": (
        "Qwen3_5Config",
        {
            **NATIVE["qwen3_5"][1],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25,
                "mrope_section": [2, 1, 1], "mrope_interleaved": True,
            },
        },
        {"vision_config": {**_QWEN, "out_hidden_size": 64, "num_position_embeddings": 16}, **_IMAGE_TOKENS},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeConfig",
        {
            **NATIVE["qwen3_5_moe"][1],
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25,
                "mrope_section": [2, 1, 1], "mrope_interleaved": True,
            },
        },
        {"vision_config": {**_QWEN, "out_hidden_size": 64, "num_position_embeddings": 16}, **_IMAGE_TOKENS},
    ),
    "kimi_k25": (
        "Kimi_K25Config",
        {**NATIVE["deepseek_v3"][1], "model_type": "deepseek_v3"},
        {
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                "pos_emb_height": 4, "pos_emb_width": 4,
            },
            "projection_hidden_size": 32,
            "image_token_id": 250,
            "video_token_id": 251,
            "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
_SEEDS: Final = {"qwen3_5_moe": 2}  # a draw that does not make much of rounding
_LATEST: Final = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")  # of which there are no older files
# Names as transformers has them now, and as most published files do.
LAYOUTS: Final = ("present", "older")
CASES: Final = [
    (kind, layout) for kind in COMPOSITE for layout in LAYOUTS if layout == "present" or kind not in _LATEST
]
_OLDER: Final = {
    "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
    "model.mm_projector.": "mm_projector.",
    "model.vision_tower.": "vision_tower.", "model.multi_modal_projector.": "multi_modal_projector.",
}  # fmt: skip
_OLDER_QWEN: Final = {"model.language_model.": "model.", "model.visual.": "visual."}


def composite_model(directory: Path, kind: str, layout: str = "present") -> Path:
    """`directory`, now holding a composite with the tiny tokenizer; no parameter of its text is neutral."""
    tiny_model(directory)
    (directory / "model.safetensors").unlink()
    before = json.loads((directory / "config.json").read_text())
    ids = {name: before[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    class_name, text, more = COMPOSITE[kind]
    config = getattr(transformers, class_name)(text_config={**text, **ids}, **more)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(_SEEDS.get(kind, 0))
        model = AutoModelForImageTextToText.from_config(config)  # type: ignore[no-untyped-call]  # the library has no types here
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.08 if "embed" in name else 1.5 * 64**-0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    _save(directory, {_named(name, kind, layout): tensor for name, tensor in _parameters(model).items()})
    return directory


def _parameters(model: Any) -> dict[str, torch.Tensor]:
    """Of a tied head the matrix once; joined experts as files have them."""
    turned = model.config.model_type == "qwen3_vl_moe"
    found = {
        name: (tensor.transpose(1, 2) if turned and ".experts." in name else tensor).detach().contiguous()
        for name, tensor in model.named_parameters()
    }
    if model.config.model_type != "kimi_k25":
        return found
    for name in [name for name in found if ".experts." in name]:  # one by one
        block, _, joined = name.rpartition(".")
        for expert, matrix in enumerate(found.pop(name)):
            parts = matrix.chunk(2) if joined == "gate_up_proj" else [matrix]
            names = ("gate_proj", "up_proj") if joined == "gate_up_proj" else (joined,)
            found |= {f"{block}.{expert}.{own}.weight": part.clone() for own, part in zip(names, parts, strict=True)}
    return found | {name: buffer for name, buffer in model.named_buffers() if name.endswith("correction_bias")}


def _named(name: str, kind: str, layout: str) -> str:
    if layout == "older":
        for now, then in (_OLDER_QWEN if kind.startswith("qwen") else _OLDER).items():
            if name.startswith(now):
                return then + name.removeprefix(now)
    return name


def _save(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """In three shards, parts of text and of images mixed."""
    shards = {f"model-{n}.safetensors": list(tensors)[n::3] for n in range(3)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, directory / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
