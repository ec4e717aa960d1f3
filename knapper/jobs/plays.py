"""Answers of environments: each by a cell that plays the episode from its start, and must say again what it said."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from knapper import limits
from knapper.catalogue.tool_fields import AgentChatMessage, FunctionTool, use_of
from knapper.catalogue.tools import AgentMessage, Tool
from knapper.errors import InvalidField, UserError
from knapper.rewards import sandboxed
from knapper.rewards.scorer import RewardFailed
from knapper.sandbox.pool import Order, Sandbox, SandboxMissing
from knapper.wire import json
from knapper.wire.untrusted import parsing

_PLAY = "knapper.rewards.environments:play"
_PRELOAD = ("knapper.rewards.environments",)


@dataclass(frozen=True)
class EnvironmentCode:
    """The file, and how long all its steps in one episode may take."""

    name: str
    code: str
    timeout_s: float


@dataclass(frozen=True)
class EpisodeSoFar:
    """How far a rollout is. `turns`: what was sampled, as messages; `digests`: of what was answered to these before.

    `seed`: of the environment's own randomness.
    """

    id: str
    seed: str
    prompt: str | list[dict[str, str]]
    answer: object
    turns: Sequence[dict[str, Any]] = ()
    digests: Sequence[str] = ()


class Said(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An environment's newest answer. `messages`: a text, or a list of messages that were checked."""

    messages: str | list[Any]
    reward: Annotated[float, Meta(ge=-limits.episode_score_max, le=limits.episode_score_max)]
    done: bool


class Played(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a cell wrote into its channel, which its code may have written itself."""

    digests: list[Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]]
    said: Said
    tools: list[Any]


async def play(environment: EnvironmentCode, episode: EpisodeSoFar, sandbox: Sandbox) -> Played:
    """Raises RewardFailed for an environment that does not do what it has to, and SandboxMissing."""
    try:
        preload = await sandboxed.loadable(environment.name, environment.code, sandbox)
        arguments = {
            "name": environment.name, "code": environment.code, "prompt": episode.prompt, "answer": episode.answer,
            "turns": list(episode.turns),
        }  # fmt: skip
        order = Order(_PLAY, arguments, environment.timeout_s, episode.seed)
        value = await sandboxed.result_of(order, preload=(*_PRELOAD, *preload), sandbox=sandbox)
        return await asyncio.to_thread(_checked, environment.name, episode, value)
    except SandboxMissing:
        raise
    except UserError as error:
        raise RewardFailed(episode.id, str(error)) from error


def _checked(name: str, episode: EpisodeSoFar, value: object) -> Played:
    """Raises UserError."""
    with parsing(lambda error: UserError(f"{name} answered what is not plain JSON: {error}")):
        msgspec.json.encode(value)  # as it is stored
    played = json.shape(value, Played, name)
    if len(played.digests) != len(episode.turns) + 1:
        raise UserError("it wrote something else than a result into its result channel")
    for n, (now, before) in enumerate(zip(played.digests, episode.digests, strict=False)):
        if now != before:
            at = f"turn {n}" if n else "reset"
            raise UserError(
                f"{at}: {name} answered otherwise than before, to the same turns; allowed: an environment "
                "that depends on its row, on what is sampled, and on `random`, which is seeded"
            )
    if isinstance(played.said.messages, list):
        messages_of(played.said.messages)
    tools_of(played.tools)
    return played


def messages_of(sent: Sequence[object]) -> list[AgentMessage]:
    """As chat templates take them. Raises InvalidField."""
    read = json.shape(sent, list[AgentChatMessage], "messages")
    messages = [each.agent_message(f"messages[{n}]") for n, each in enumerate(read)]
    for n, message in enumerate(messages):
        if not isinstance(message["content"], str):
            raise InvalidField(f"messages[{n}].content", "an image", "texts: jobs train on nothing else")
    return messages


def tools_of(sent: Sequence[object]) -> list[Tool]:
    """Raises InvalidField."""
    tools = [each.tool() for each in json.shape(sent, list[FunctionTool], "tools")]
    if len(tools) > limits.tools_max:
        raise UserError(f"tools: there are {len(tools)}; allowed: at most {limits.tools_max}")
    return list(use_of(tools, "auto", None, several=True).tools)
