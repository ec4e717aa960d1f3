"""Requests for samplers and samples: those of clients, and the gateway's calls of the sample function.

Field names and defaults are the SDK's.
"""

from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType

from knapper import limits
from knapper.errors import InvalidField
from knapper.wire import prompts, types
from knapper.wire.fields import Id, Number, Path, RequestBody, Seed, Token, encode
from knapper.wire.json import decode
from knapper.wire.json_tensors import TensorData
from knapper.wire.prompts import Prompt

__all__ = [
    "AsampleBody",
    "CreateSamplingSession",
    "JoinSamplingSession",
    "PromptBody",
    "SampleCall",
    "address",
    "decode",
    "encode",
]


class CreateSamplingSession(RequestBody, frozen=True, kw_only=True):
    session_id: Id
    sampling_session_seq_id: Number
    base_model: Path | None = None
    model_path: Path | None = None
    type: Literal["create_sampling_session"] = "create_sampling_session"


class JoinSamplingSession(RequestBody, frozen=True, kw_only=True):
    sampling_session_id: Id
    type: Literal["join_sampling_session"] = "join_sampling_session"


class Chunk(RequestBody, frozen=True, kw_only=True):
    """A chunk of a prompt. Types other than encoded_text and image are parsed, to be refused by name."""

    type: Literal["encoded_text", "image", "image_asset_pointer", "dmel"] = "encoded_text"
    tokens: list[Token] | UnsetType = UNSET
    data: bytes | UnsetType = UNSET
    format: str | UnsetType = UNSET
    expected_tokens: int | UnsetType | None = UNSET
    location: str | UnsetType = UNSET
    dmel: str | UnsetType = UNSET


class PromptBody(RequestBody, frozen=True, kw_only=True):
    chunks: Annotated[list[Chunk], Meta(max_length=limits.datum_parts_max)]

    @property
    def images(self) -> int:
        return sum(chunk.type == "image" for chunk in self.chunks)

    def whole(self, field: str = "prompt") -> Prompt:
        """The chunks as one. Raises InvalidField for one that is neither text nor image, or an empty prompt."""
        whole = Prompt(field)
        for i, chunk in enumerate(self.chunks):
            if chunk.type == "encoded_text" and chunk.tokens is not UNSET:
                whole.add_text(np.array(chunk.tokens, dtype=np.int32))
            elif chunk.type == "image" and chunk.data is not UNSET:
                whole.add_image(i, chunk.data, chunk.format or "", chunk.expected_tokens or None)
            else:
                raise prompts.refused(field, i, chunk.type)
        if not len(whole.tokens):
            raise InvalidField(field, "empty", "at least one token")
        return whole


class SamplingParamsBody(RequestBody, frozen=True, kw_only=True):
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    seed: Seed | None = None
    stop: str | list[str | int] | None = None
    temperature: Annotated[float, Meta(ge=0, le=limits.temperature_max)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = -1
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0

    def params(self) -> types.SamplingParams:
        """Raises InvalidField for stop sequences that are empty, mixed or too many, and for top_k 0."""
        if self.top_k == 0:
            raise InvalidField("sampling_params.top_k", 0, "-1 (all tokens), or at least 1")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        strings = tuple(s for s in stop if isinstance(s, str))
        tokens = tuple(s for s in stop if isinstance(s, int))
        if len(stop) > limits.stop_sequences_max:
            raise InvalidField("sampling_params.stop: count", len(stop), f"at most {limits.stop_sequences_max}")
        if (strings and tokens) or "" in strings or any(not 0 <= token < 2**31 for token in tokens):
            raise InvalidField(
                "sampling_params.stop", self.stop, "a text, texts, or token ids (at least 0); none empty"
            )
        return types.SamplingParams(
            max_tokens=self.max_tokens, seed=self.seed, stop_strings=strings, stop_tokens=tokens,
            ignore_eos=self.stop == [], temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
        )  # fmt: skip


TopK = Annotated[int, Meta(ge=0, le=limits.top_logprobs_max)]
SampleSeq = Annotated[int, Meta(ge=0, le=limits.cursor_max)]  # clone k of a client counts from k * 10^9, k to 10^9
LastN = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class AsampleBody(RequestBody, frozen=True, kw_only=True):
    """asample"""

    prompt: PromptBody
    sampling_params: SamplingParamsBody
    sampling_session_id: Id | None = None
    seq_id: SampleSeq | None = None
    base_model: Path | None = None
    model_path: Path | None = None
    num_samples: Annotated[int, Meta(ge=1, le=limits.num_samples_max)] = 1
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: TopK = 0
    topk_sample_logprobs: TopK = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: TopK = 0
    prompt_logprobs_last_n: LastN | None = None
    record_stability_info: bool | None = None
    type: Literal["sample"] = "sample"

    def call(self, base_model: str, adapter: str, seed: int) -> "SampleCall":
        """The call of the sample function; `seed` is used if the client sent none. Raises InvalidField."""
        if self.record_stability_info:
            raise InvalidField(
                "record_stability_info", True, "false, since only the loss stable_reinforce reads what it records, "
                "and that loss is not published",
                "Create the sampling client without it, and pass the loss importance_sampling, ppo or cispo",
            )  # fmt: skip
        if self.prompt_logprobs_last_n is not None and not self.prompt_logprobs:
            allowed = "none without prompt_logprobs, whose range it is"
            raise InvalidField("prompt_logprobs_last_n", self.prompt_logprobs_last_n, allowed)
        if self.target_prompt_logprobs is not None:
            self.target_prompt_logprobs.cells("target_prompt_logprobs")  # check it before it is queued
        params = self.sampling_params.params()
        prompts.expect_few(self.prompt.images)
        prompt = self.prompt.whole()
        return SampleCall(
            base_model=base_model,
            adapter=adapter,
            prompt=prompt.tokens.tolist(),
            images=prompt.images or UNSET,
            params=params,
            seed=seed if params.seed is None else params.seed,
            num_samples=self.num_samples,
            prompt_logprobs=bool(self.prompt_logprobs),
            topk_prompt_logprobs=self.topk_prompt_logprobs,
            topk_sample_logprobs=self.topk_sample_logprobs,
            target_prompt_logprobs=self.target_prompt_logprobs,
            prompt_alt_tokens_k=self.prompt_alt_tokens_k,
            prompt_logprobs_last_n=self.prompt_logprobs_last_n,
        )


class _Address(msgspec.Struct):
    """The fields of a request that are decoded first."""

    sampling_session_id: Id | None = None
    seq_id: SampleSeq | None = None


def address(body: bytes) -> tuple[str, int]:
    """(sampling_session_id, seq_id) of a sample request; the rest is not decoded. Raises InvalidField without them."""
    fields = decode(body, _Address)
    if fields.sampling_session_id is None or fields.seq_id is None:
        pair = (fields.sampling_session_id, fields.seq_id)
        raise InvalidField("(sampling_session_id, seq_id)", pair, "both; create_sampling_client makes the session")
    return fields.sampling_session_id, fields.seq_id


class SampleCall(RequestBody, frozen=True, kw_only=True):
    """The gateway's call of the sample function: a JSON request with a protobuf response."""

    base_model: Path
    adapter: Path
    prompt: Annotated[list[Token], Meta(min_length=1)]
    params: types.SamplingParams
    seed: Seed
    num_samples: Annotated[int, Meta(ge=1, le=limits.num_samples_max)] = 1
    prompt_logprobs: bool = False
    topk_prompt_logprobs: TopK = 0
    topk_sample_logprobs: TopK = 0
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: TopK = 0
    prompt_logprobs_last_n: LastN | None = None
    images: list[types.Image] | UnsetType = UNSET  # not sent where there is none
    stream: bool = False  # respond with the frames of knapper.wire.progress
    grammar: Annotated[str, Meta(max_length=limits.grammar_bytes_max)] | UnsetType = (
        UNSET  # not sent where there is none
    )

    def sample(self, tenant: str = "") -> types.SampleRequest:
        targets = self.target_prompt_logprobs
        return types.SampleRequest(
            base_model=self.base_model,
            adapter=self.adapter,
            prompt=np.array(self.prompt, dtype=np.int32),
            params=self.params,
            seed=self.seed,
            num_samples=self.num_samples,
            prompt_logprobs=self.prompt_logprobs,
            topk_prompt_logprobs=self.topk_prompt_logprobs,
            topk_sample_logprobs=self.topk_sample_logprobs,
            target_prompt_logprobs=None if targets is None else targets.cells("target_prompt_logprobs"),
            prompt_alt_tokens_k=self.prompt_alt_tokens_k,
            prompt_logprobs_last_n=self.prompt_logprobs_last_n,
            tenant=tenant,
            grammar=self.grammar or "",
            images=tuple(self.images or ()),
        )
