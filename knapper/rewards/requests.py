"""Requests to score a client's rollouts: the JSON of request and answer."""

import asyncio
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from knapper import limits
from knapper.errors import InvalidField, TooLarge, UserError
from knapper.rewards import scorer, spec
from knapper.rewards.rollouts import ScorableRollout
from knapper.sandbox.pool import Sandbox
from knapper.wire import json


class PromptMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: str
    content: str


class Sent(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rollout. `id`: identifies it in the request and in errors."""

    id: Annotated[str, Meta(min_length=1, max_length=limits.name_chars_max)]
    prompt: str | list[PromptMessage] = ""
    completion: str
    answer: Any = None


class ScoreRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`reward`: as in job.yaml; `files`: the texts of those that it names."""

    reward: Any
    files: Annotated[dict[str, str], Meta(max_length=limits.reward_terms_max)] = {}
    rollouts: list[Sent]


class ScoredCompletion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`reasons`: as in knapper.rewards.scorer.RewardScore."""

    id: str
    value: float
    parts: dict[str, float]
    reasons: dict[str, str] = {}


class ScoreResponse(msgspec.Struct, frozen=True, kw_only=True):
    """In the order of the rollouts."""

    scores: list[ScoredCompletion]


async def answer(body: bytes, sandbox: Sandbox) -> bytes:
    """The answer's JSON. Raises UserError for a wrong request, RewardFailed, SandboxMissing."""
    _expect_few_values(body)
    sent = json.decode(body, ScoreRequest)
    if len(sent.rollouts) > limits.rollouts_per_request_max:
        raise TooLarge(f"the request has {len(sent.rollouts)} rollouts; allowed: {limits.rollouts_per_request_max}")
    ids = [each.id for each in sent.rollouts]
    if len(set(ids)) < len(ids):
        double = next(each for n, each in enumerate(ids) if each in ids[:n])
        raise InvalidField("rollouts[].id", double, "an id that no other rollout of the request has")
    reward = spec.parse(sent.reward, {name: text.encode() for name, text in sent.files.items()})
    rollouts = [ScorableRollout(each.id, _prompt(each.prompt), each.completion, each.answer) for each in sent.rollouts]
    try:
        async with asyncio.timeout(limits.rewards_request_s):
            scores = await scorer.score(reward, rollouts, sandbox=sandbox)
    except TimeoutError as error:
        raise UserError(
            f"scoring {len(rollouts)} rollouts took over {limits.rewards_request_s:g} s; send fewer in one request, "
            "or a faster reward"
        ) from error
    return msgspec.json.encode(
        ScoreResponse(
            scores=[
                ScoredCompletion(id=of, value=each.value, parts=each.parts, reasons=each.reasons)
                for of, each in zip(ids, scores, strict=True)
            ]
        )
    )


def _expect_few_values(body: bytes) -> None:
    """Raises TooLarge for a body that would take far more memory than its bytes, before it is decoded."""
    values = sum(body.count(each) for each in (b",", b"[", b"{"))
    if values > limits.reward_request_values_max:
        raise TooLarge(
            f"the request has {values} commas and brackets; allowed: {limits.reward_request_values_max}; "
            "send fewer rollouts in one request"
        )


def _prompt(prompt: str | list[PromptMessage]) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        return prompt
    return [{"role": each.role, "content": each.content} for each in prompt]
