"""sample's part of episodes: a turn of all rollouts of one prompt, after what their environments have said.

A turn's prompt is the tokens of the episode so far, as they were sampled, and those of what the environment said since:
nothing is tokenized again, whatever a chat template makes of earlier turns.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec
import numpy as np

from knapper.catalogue.tool_calls import Calling
from knapper.catalogue.tools import AgentMessage, Tool, ToolCall, ToolUse
from knapper.catalogue.tools_in_words import in_words
from knapper.errors import UserError, damaged
from knapper.jobs import plays
from knapper.jobs.names import Round, Start
from knapper.state.job_records import EnvironmentAnswer, EnvironmentAnswers, Record, SampledTurn, SampledTurns, read
from knapper.store import Store, many
from knapper.wire.types import Int32, SampledSequence

if TYPE_CHECKING:
    from knapper.catalogue.tokenizer import Language  # reward reads the records of this module, and tokenizes nothing

R = TypeVar("R", bound=Record)
_MARK: Final = "what-the-model-said"  # in a conversation that shows what a template writes behind it
_BEFORE: Final[tuple[AgentMessage, ...]] = (
    {"role": "user", "content": "before"},
    {"role": "assistant", "content": _MARK},
)


@dataclass(frozen=True)
class EpisodeGroup:
    """The rollouts of one prompt so far. `turns[t]` were sampled after `answers[t]`; `limit`: turns at most."""

    answers: Sequence[EnvironmentAnswers]
    turns: Sequence[SampledTurns]
    limit: int

    def last(self, sample: int) -> EnvironmentAnswer | None:
        """What this one's environment said last; None before its first word."""
        return next((said for each in reversed(self.answers) if (said := each.answers[sample]) is not None), None)

    def of(self, sample: int) -> list[SampledTurn]:
        return [turn for each in self.turns if (turn := each.turns[sample]) is not None]

    def ended(self, sample: int) -> str:
        """By whom its episode ended; empty: it goes on, at least with an answer."""
        own, last = self.of(sample), self.last(sample)
        if last is not None and last.done:
            return "done"
        if own and own[-1].overflows:
            return "context"
        answered = sum(each.answers[sample] is not None for each in self.answers)
        return "turns" if answered > self.limit else ""

    def live(self, samples: int) -> list[int]:
        return [n for n in range(samples) if not self.ended(n)]

    @property
    def tools(self) -> list[Tool]:
        return plays.tools_of(msgspec.json.decode(self.answers[0].tools)) if self.answers[0].tools else []

    def tokens(self, sample: int) -> Int32:
        """Of the episode up to its last sampled turn."""
        parts = [np.frombuffer(part, "<i4") for turn in self.of(sample) for part in (turn.prompt, turn.tokens)]
        return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)


async def read_group(store: Store, start: Start, kind: Round, n: int, part: int, counts: tuple[int, int], limit: int
) -> EpisodeGroup:  # fmt: skip
    """`counts`: how many answers and turns there are."""

    async def answered(turn: int) -> EnvironmentAnswers:
        return await _read(store, start.answered(kind, n, part, turn), EnvironmentAnswers)

    async def sampled(turn: int) -> SampledTurns:
        return await _read(store, start.turn(kind, n, part, turn), SampledTurns)

    answers, turns = await asyncio.gather(many.each(range(counts[0]), answered), many.each(range(counts[1]), sampled))
    return EpisodeGroup(answers, turns, limit)


async def _read(store: Store, name: str, kind: type[R]) -> R:
    """Raises Corrupt."""
    if (record := await read(store, name, kind)) is None:
        raise damaged(name, "it was listed, and is missing")
    return record


@dataclass(frozen=True)
class TurnTokens:
    """Between tokens and messages. `now`: the date for chat templates, constant for a job."""

    language: "Language"
    now: float
    context: int

    def calling(self, tools: Sequence[Tool]) -> Calling:
        """Raises InvalidField for a model whose calls cannot be read."""
        return Calling.of(self.language, ToolUse(tuple(tools)))

    def first(self, said: EnvironmentAnswer, tools: Sequence[Tool]) -> Int32:
        """The tokens of what an environment's reset said. Raises UserError."""
        messages = msgspec.json.decode(said.messages)
        if isinstance(messages, str):
            return np.array(self.language.encode(messages), np.int32)
        read = plays.messages_of(messages)
        return np.array(self.calling(tools).prompt(read, self.now, {}, self.context), np.int32)

    def following(self, said: EnvironmentAnswer, tools: Sequence[Tool], sampled: bytes) -> Int32:
        """The tokens of a later word of it, up to where the model goes on: as the template writes them behind what the
        assistant said, without the token that ends that if it was sampled. Raises UserError.
        """
        messages = msgspec.json.decode(said.messages)
        text = messages if isinstance(messages, str) else self._behind(plays.messages_of(messages), tools)
        (encoded,) = self.language.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        tokens, before = np.array(encoded.ids, np.int32), np.frombuffer(sampled, "<i4")
        return tokens[1:] if tokens.size and before.size and tokens[0] == before[-1] else tokens

    def _behind(self, messages: Sequence[AgentMessage], tools: Sequence[Tool]) -> str:
        told, template = [*_BEFORE, *messages], self.language.template
        takes_tools = template is not None and template.takes_tools
        whole = self.language.render(
            told if takes_tools else in_words(told, tools), self.now, {}, tools=tools if takes_tools else ()
        )
        _, found, behind = whole.partition(_MARK)
        if not found:
            raise UserError(
                "the model's chat template leaves out what an assistant said before, so that a conversation cannot go "
                "on from what was sampled; allowed: an environment of texts, or of one turn"
            )
        return behind

    def text(self, tokens: Sequence[int], tools: Sequence[Tool]) -> str:
        """With the special tokens that mark calls, and no others."""
        shown, decode = self.calling(tools).special_tokens, self.language.tokenizer.decode
        parts, held = list[str](), list[int]()
        for token in tokens:
            if token in shown:
                parts += [str(decode(held, skip_special_tokens=True)), shown[token]]
                held = []
            else:
                held.append(token)
        return "".join([*parts, str(decode(held, skip_special_tokens=True))])

    def message(self, text: str, tools: Sequence[Tool], turn: int) -> dict[str, object]:
        """What was sampled, as OpenAI's clients have it."""
        calling = self.calling(tools)
        reader = calling.reader()
        if reader is None:
            return {"role": "assistant", "content": text}
        pieces = [*reader.add(text), *reader.end()]
        message: dict[str, object] = {
            "role": "assistant",
            "content": "".join(piece for piece in pieces if isinstance(piece, str)),
        }
        calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
        if calls:
            message["tool_calls"] = [
                {
                    "id": calling.call_id(f"{turn:04d}{n:05d}"), "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for n, call in enumerate(calls)
            ]  # fmt: skip
        return message


def sampled_turn(prompt: Int32, sequence: SampledSequence, text: str, message: dict[str, object]) -> SampledTurn:
    return SampledTurn(
        prompt=prompt.astype("<i4").tobytes(), tokens=sequence.tokens.astype("<i4").tobytes(),
        logprobs=sequence.logprobs.astype("<f4").tobytes(), text=text, message=msgspec.json.encode(message),
        stopped=sequence.stopped,
    )  # fmt: skip
