"""JSON requests about sessions, runs and futures, strict and bounded, with conversions to knapper.wire.types.

Field names and defaults are the SDK's. `decode(body, CreateModel)` checks; methods such as `adamw()` convert.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from knapper import ids, limits
from knapper.errors import InvalidField, TooLarge
from knapper.ids import RunId, SessionId
from knapper.wire import json_values, types
from knapper.wire.fields import (
    AccessToken,
    Id,
    Labels,
    Number,
    Path,
    RequestBody,
    Seed,
    Seq,
    Text,
    Ttl,
    encode,
    expect_no_access_token,
)
from knapper.wire.json import decode

__all__ = [
    "CancelFuture", "ClientConfig", "CreateModel", "CreateSession", "FinishSession", "GetInfo", "Heartbeat",
    "LoadWeights", "OptimStep", "RetrieveFuture", "RetrieveFutures", "SaveWeights", "SaveWeightsExternal",
    "SaveWeightsForSampler", "Telemetry", "decode", "encode",
]  # fmt: skip

# ---- service


class ClientConfig(RequestBody, frozen=True, kw_only=True):
    """client/config and client/dynamic_config"""

    sdk_version: Text = ""


class CreateSession(RequestBody, frozen=True, kw_only=True):
    tags: Annotated[list[Text], Meta(max_length=limits.tags_max)] = []
    user_metadata: dict[str, Any] | None = None
    sdk_version: Text = ""
    project_id: Text | None = None
    display_name: Text | None = None
    type: Literal["create_session"] = "create_session"

    def __post_init__(self) -> None:
        json_values.expect_shallow(self.user_metadata, "user_metadata")

    def user_metadata_json(self) -> str:
        return _bounded_json(self.user_metadata)


class Heartbeat(RequestBody, frozen=True, kw_only=True):
    session_id: Id
    type: Literal["session_heartbeat"] = "session_heartbeat"


class FinishReason(RequestBody, frozen=True, kw_only=True):
    type: Literal["success", "errored", "interrupted"]


class FinishSession(RequestBody, frozen=True, kw_only=True):
    reason: FinishReason
    detail: Annotated[str, Meta(max_length=limits.finish_detail_chars_max)] | None = None


class Telemetry(RequestBody, frozen=True, kw_only=True):
    """Telemetry events are neither read nor stored."""

    events: list[msgspec.Raw]
    platform: Text = ""
    sdk_version: Text = ""
    session_id: Id
    process_uuid: Text = ""


# ---- training


class LoraConfig(RequestBody, frozen=True, kw_only=True):
    rank: int
    seed: Seed | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModel(RequestBody, frozen=True, kw_only=True):
    session_id: Id
    model_seq_id: Number
    base_model: Path
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: dict[str, Any] | None = None
    type: Literal["create_model"] = "create_model"

    def __post_init__(self) -> None:
        json_values.expect_shallow(self.user_metadata, "user_metadata")

    def run(self) -> RunId:
        return ids.make_run_id(ids.session_id(self.session_id), self.model_seq_id)

    def lora(self) -> LoraConfig:
        """The checked configuration. Raises InvalidField if it is missing, trains nothing, or is not for AdamW."""
        _only_adamw("optimizer_config", self.optimizer_config)
        lora = self.lora_config
        if lora is None:
            raise InvalidField("lora_config", None, "a LoRA configuration: this server trains adapters only")
        if not 1 <= lora.rank <= limits.rank_max:
            raise InvalidField("lora_config.rank", lora.rank, f"1 to {limits.rank_max}")
        if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
            raise InvalidField(
                "lora_config.train_attn", False, "at least one of train_attn, train_mlp and train_unembed must be true"
            )
        return lora

    def user_metadata_json(self) -> str:
        return _bounded_json(self.user_metadata)


class GetInfo(RequestBody, frozen=True, kw_only=True):
    model_id: Id
    type: Literal["get_info"] = "get_info"


Unit = Annotated[float, Meta(ge=0, lt=1)]
Positive = Annotated[float, Meta(ge=0, le=1e30)]


class AdamParams(RequestBody, frozen=True, kw_only=True):
    """The SDK's defaults."""

    learning_rate: Positive = 1e-4
    beta1: Unit = 0.9
    beta2: Unit = 0.95
    eps: Positive = 1e-12
    weight_decay: Positive = 0.0
    grad_clip_norm: Positive = 0.0


class OptimStep(RequestBody, frozen=True, kw_only=True):
    model_id: Id
    seq_id: Seq
    adam_params: AdamParams | None = None
    optimizer_params: dict[str, Any] | None = None
    type: Literal["optim_step"] = "optim_step"

    def adamw(self) -> types.AdamW:
        """Raises InvalidField for another optimizer."""
        if self.optimizer_params is not None:
            _only_adamw("optimizer_params", {"type": None, **self.optimizer_params})
        if self.adam_params is None:
            raise InvalidField("adam_params", None, "AdamW's parameters: learning_rate, beta1, beta2, eps, ...")
        return types.AdamW(**msgspec.structs.asdict(self.adam_params))


class SaveWeights(RequestBody, frozen=True, kw_only=True):
    model_id: Id
    seq_id: Seq
    path: Path
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Labels | None = None
    type: Literal["save_weights"] = "save_weights"

    def __post_init__(self) -> None:
        _bounded_json(self.user_metadata)


class SaveWeightsForSampler(RequestBody, frozen=True, kw_only=True):
    model_id: Id
    seq_id: Seq
    path: Path | None = None
    sampling_session_seq_id: Number | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Ttl | None = None
    user_metadata: Labels | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"

    def __post_init__(self) -> None:
        _bounded_json(self.user_metadata)


class SaveWeightsExternal(RequestBody, frozen=True, kw_only=True):
    """A PEFT directory for download, encrypted for the age recipients if there are any."""

    model_id: Id
    seq_id: Seq
    path: Path
    ttl_seconds: Ttl | None = None
    age_encryption_recipients: list[Text] | None = None
    type: Literal["save_weights_external"] = "save_weights_external"


class LoadWeights(RequestBody, frozen=True, kw_only=True):
    """A load into an existing run (model_id, seq_id), or as the creation of a new one (session_id, model_seq_id)."""

    path: Path
    optimizer: bool
    model_id: Id | None = None
    seq_id: Seq | None = None
    session_id: Id | None = None
    model_seq_id: Number | None = None
    base_model: Path | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: dict[str, Any] | None = None
    weights_access_token: AccessToken | None = None
    type: Literal["load_weights"] = "load_weights"

    def __post_init__(self) -> None:
        json_values.expect_shallow(self.user_metadata, "user_metadata")

    def creates(self) -> RunId | None:
        """The run that it creates, or None for a load into an existing one. Raises InvalidField."""
        expect_no_access_token(self.weights_access_token)
        _only_adamw("optimizer_config", self.optimizer_config)
        if (
            self.session_id is not None
            and self.model_seq_id is not None
            and self.model_id is None
            and self.seq_id is None
        ):
            return ids.make_run_id(ids.session_id(self.session_id), self.model_seq_id)
        if (
            self.model_id is not None
            and self.seq_id is not None
            and self.session_id is None
            and self.model_seq_id is None
        ):
            return None
        names = ("model_id", "seq_id", "session_id", "model_seq_id")
        present = [name for name in names if getattr(self, name) is not None]
        raise InvalidField("load_weights", present, "model_id with seq_id, or session_id with model_seq_id")

    def session(self) -> SessionId:
        return ids.session_id(self.session_id or "")

    def user_metadata_json(self) -> str:
        return _bounded_json(self.user_metadata)


# ---- futures


class RetrieveFuture(RequestBody, frozen=True, kw_only=True):
    """`allow_metadata_only` is a permission that this server does not use: payloads come at once."""

    request_id: Id
    allow_metadata_only: bool = False


class FuturesTarget(RequestBody, frozen=True, kw_only=True):
    """One client of a sampling session: its requests have seq_id // 10^9 == `cloned_sampler_id`."""

    sampling_session_id: Id
    cloned_sampler_id: Annotated[int, Meta(ge=0, le=limits.clone_id_max)] = 0
    type: Literal["sampling_session"] = "sampling_session"


class RetrieveFutures(RequestBody, frozen=True, kw_only=True):
    """`timeout`: seconds that the poll may take; None: the server decides."""

    target: FuturesTarget
    prev_cursor: Annotated[int, Meta(ge=0, le=limits.cursor_max)] = 0
    timeout: Annotated[float, Meta(ge=0, le=limits.poll_timeout_s_max)] | None = None
    retrieved_request_ids: list[Id] = []


class CancelFuture(RequestBody, frozen=True, kw_only=True):
    request_id: Id


# ---- shared checks


def _only_adamw(name: str, config: dict[str, Any] | None) -> None:
    if config is not None and config.get("type", "adamw") != "adamw":
        raise InvalidField(
            f"{name}.type", config.get("type"), "adamw", "Use tinker.AdamParams; no other optimizer is served"
        )
    if config is not None and (extra := sorted(config.keys() - {"type"})):
        raise InvalidField(f"{name}.{extra[0]}", config[extra[0]], "no field of this name, only type")


def _bounded_json(metadata: dict[str, Any] | Labels | None) -> str:
    encoded = msgspec.json.encode(metadata or {})
    if len(encoded) > limits.user_metadata_bytes_max:
        raise TooLarge(
            f"user_metadata is {len(encoded)} bytes as JSON; allowed: at most {limits.user_metadata_bytes_max} bytes"
        )
    return encoded.decode()
