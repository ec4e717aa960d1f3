"""Loads a model of an architecture that only transformers computes, and tries it before it is served.

The only module that imports transformers. T tokens, H hidden size, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from knapper.engine.layers.lora_grouped import base
from knapper.engine.models.config import (
    HEAD,
    LoraTarget,
    described,
    end_tokens,
    expect_text_model,
)
from knapper.engine.models.fields import UnsupportedModel, read_json
from knapper.engine.models.linear_shape import Part
from knapper.engine.models.tensor_header import BrokenModel
from knapper.engine.models.transformers import Head, TransformersFacts, TransformersModel
from knapper.errors import NotFound

_TRIAL_TOKENS: Final = 12
_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest value


def load(directory: Path, dtype: torch.dtype, device: torch.device) -> TransformersModel:
    """The model in `directory`. Raises UnsupportedModel if it would be computed wrongly, BrokenModel."""
    raw = read_json(directory / "config.json")
    if raw is None:
        raise NotFound(f"{directory} has no config.json")
    _refuse(raw, directory)
    loaded = _loaded(directory, raw, dtype).to(device)
    loaded.requires_grad_(False).eval()
    config = loaded.config.get_text_config(decoder=True)
    body, output, lora_targets = _parts(loaded, directory)
    head = Head(output.weight, output.bias, _scale(config), getattr(config, "final_logit_softcapping", None))
    linears = {target.name: loaded.get_submodule(target.module) for target in lora_targets if target.part != "unembed"}
    facts = TransformersFacts(
        architecture=type(loaded).__name__,
        vocab_size=output.weight.shape[0],
        context=_context(config, directory),
        eos=end_tokens(config.to_dict(), directory),
        tied=loaded.get_input_embeddings().weight is output.weight,
        lora_targets=lora_targets,
    )
    model = TransformersModel(body, linears, head, facts, (f"transformers {transformers.__version__}",))
    model.bytes_per_token = _expect_trial(model, loaded, set(linears), directory)
    return model


def expect_structure(directory: Path) -> None:
    """Raises UnsupportedModel for a refused architecture, as far as config.json shows."""
    raw = read_json(directory / "config.json") or {}
    _refuse(raw, directory)
    configuration: Any = transformers.AutoConfig
    auto: Any = transformers.AutoModelForCausalLM
    try:
        with torch.device("meta"):
            empty = auto.from_config(
                configuration.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            )
    except Exception as error:  # it raises what any of its hundreds of models raises
        raise UnsupportedModel(f"{directory}: transformers makes no model of its config.json: {error!r}") from error
    _parts(empty, directory)


def _parts(model: Any, directory: Path) -> tuple[nn.Module, nn.Linear, tuple[LoraTarget, ...]]:
    """(body, head, target modules)."""
    head = model.get_output_embeddings()
    body = getattr(model, model.base_model_prefix, None)
    if type(head) is not nn.Linear or not isinstance(body, nn.Module) or body is model:
        raise UnsupportedModel(f"{directory}: {type(model).__name__} has no body with a linear head")
    return body, head, _lora_targets(model, head, directory)


def _refuse(raw: Mapping[str, Any], directory: Path) -> None:
    model_type = str(raw.get("model_type"))
    expect_text_model(raw, directory)
    class_name = (raw.get("architectures") or [None])[0]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    causal = causal if isinstance(causal, str) else None
    own_code = " It needs code of its own (auto_map), and code of models is never run" if raw.get("auto_map") else ""
    for refused, reason in (
        (raw.get("quantization_config") is not None, "it has quantized weights; use the unquantized model"),
        (model_type not in CONFIG_MAPPING, f"transformers {transformers.__version__} does not know it.{own_code}"),
        (causal is None, "it is no causal language model"),
        (causal is not None and class_name != causal, f"as a causal language model it would be {causal}"),
    ):
        if refused:
            raise UnsupportedModel(f"{described(raw, directory)} is not served: {reason}")


def _loaded(directory: Path, raw: Mapping[str, Any], dtype: torch.dtype) -> Any:
    logs: Any = transformers.logging  # the library has no types here
    logs.disable_progress_bar()
    logs.set_verbosity_error()  # what it would log about the weights is an error here
    # transformers' other attentions ignore Gemma 2's cap.
    attention = {"attn_implementation": "eager"} if raw.get("attn_logit_softcapping") else {}
    auto: Any = transformers.AutoModelForCausalLM
    try:
        loaded, report = auto.from_pretrained(
            directory, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, **attention,
        )  # fmt: skip
    except Exception as error:  # it raises what any of its hundreds of models raises
        raise BrokenModel(f"{directory}: transformers cannot load it: {type(error).__name__}: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            named = ", ".join(map(str, sorted(report[kind])[:5]))
            raise BrokenModel(f"{directory}: {len(report[kind])} {kind.replace('_keys', ' tensors')}: {named}")
    return loaded


def _scale(config: Any) -> float:
    """Cohere multiplies logits, Granite divides them."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


def _context(config: Any, directory: Path) -> int:
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int) or context < 2:
        raise UnsupportedModel(f"{directory}/config.json: max_position_embeddings is {context!r}; expected 2 or more")
    # Beyond it positions are scaled by the text's length, and a row would depend on later tokens.
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        context = min(context, int(rope.get("original_max_position_embeddings") or context))
    return context


def _lora_targets(loaded: Any, output: nn.Module, directory: Path) -> tuple[LoraTarget, ...]:
    """The linears inside of layers, and the head. Raises UnsupportedModel if a layer has another kind of matrix."""
    names = [name for name, _ in loaded.named_modules()]
    parts: dict[str, Part] = {}
    for name, module in loaded.named_modules():
        in_layer = any(step.isdigit() for step in name.split("."))
        matrices = [parameter for parameter, tensor in module.named_parameters(recurse=False) if tensor.dim() > 1]
        if module is output:
            parts[name] = "unembed"
        elif in_layer and isinstance(module, nn.Linear):
            parts[name] = "attention" if "attn" in name or "attention" in name else "mlp"
        elif in_layer and matrices:
            raise UnsupportedModel(
                f"{directory}: {name} ({type(module).__name__}) keeps {', '.join(matrices)}, which no adapter of "
                "linears reaches; served: models whose layers are made of nn.Linear"
            )
    if missing := {"attention", "mlp"} - set(parts.values()):
        raise UnsupportedModel(f"{directory}: its layers have no linears of: {', '.join(sorted(missing))}")
    head = next(name for name, part in parts.items() if part == "unembed")
    order = [*(name for name in parts if name != head), head]
    return tuple(
        LoraTarget(
            name=HEAD if name == head else name,
            inputs=loaded.get_submodule(name).in_features,
            outputs=loaded.get_submodule(name).out_features,
            part=parts[name],
            module=name,
            peft_target=_peft_target(name, parts, names),
        )
        for name in order
    )


def _peft_target(name: str, parts: Mapping[str, Part], names: list[str]) -> str:
    """The shortest suffix of the name that in PEFT's target_modules means linears of this part only, or the name."""
    steps = name.split(".")
    for count in range(1, len(steps)):
        end = ".".join(steps[-count:])
        meant = [other for other in names if other == end or other.endswith(f".{end}")]
        if not steps[-count].isdigit() and all(parts.get(other) == parts[name] for other in meant):
            return end
    return name


def _expect_trial(model: TransformersModel, loaded: Any, lora_targets: set[str], directory: Path) -> int:
    """Bytes of a token's keys and values. Raises UnsupportedModel unless a trial equals the whole model."""

    def refuse(reason: str) -> None:
        raise UnsupportedModel(f"{directory}: {model.architecture} is not served: {reason}")

    tokens_T = torch.arange(_TRIAL_TOKENS, device=model.device) * 7919 % model.config.vocab_size
    with torch.no_grad():
        rows_TH, cache = model.rows(tokens_T, None, caches=True)
        keys_values = [x for layer in getattr(cache, "layers", []) for x in (layer.keys, layer.values)]
        if not keys_values or not all(isinstance(x, Tensor) for x in keys_values):
            refuse("decoding keeps something else than keys and values")
        size: int = sum(x.numel() * x.element_size() for x in keys_values) // _TRIAL_TOKENS
        if missed := lora_targets - model.adapted:
            refuse(f"it computes {min(missed)} without calling it, so no adapter would enter")
        whole_TV = loaded(input_ids=tokens_T[None], use_cache=False).logits[0]
        if not _near(model.logits(rows_TH, base), whole_TV, model.dtype):
            refuse("its head is more than a linear with a bias, a scale and a cap")
        half = _TRIAL_TOKENS // 2
        first_TH, cache = model.rows(tokens_T[:half], None, caches=True)
        drawn_rows = [model.rows(token_1, None, cache, caches=True)[0] for token_1 in tokens_T[half:].split(1)]
        if not _near(first_TH, rows_TH[:half], model.dtype):
            refuse("its rows depend on later tokens: it is not causal")
        if not _near(torch.cat(drawn_rows), rows_TH[half:], model.dtype):
            refuse("token by token it computes something else than at once")
    return size


def _near(computed: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    computed, expected = computed.float(), expected.float()
    return bool((computed - expected).abs().max() <= _TOLERANCE[dtype] * expected.abs().max())
