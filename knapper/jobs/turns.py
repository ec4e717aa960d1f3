"""sample's part of episodes: a turn of all rollouts of one prompt, after what their environments have said.

A turn's prompt is the tokens of the episode so far, as they were sampled, and those of what the environment said since:
nothing is tokenized again, whatever a chat template makes of earlier turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from knapper.catalogue.tokenizer import Language
from knapper.catalogue.tool_calls import Calling
from knapper.catalogue.tools import AgentMessage, Tool, ToolCall, ToolUse
from knapper.catalogue.tools_in_words import in_words
from knapper.errors import UserError
from knapper.jobs import plays
from knapper.state.job_records import EnvironmentAnswer, SampledTurn
from knapper.wire.types import Int32, SampledSequence

_MARK: Final = "what-the-model-said"  # in a conversation that shows what a template writes behind it
_BEFORE: Final[tuple[AgentMessage, ...]] = (
    {"role": "user", "content": "before"},
    {"role": "assistant", "content": _MARK},
)


@dataclass(frozen=True)
class TurnTokens:
    """Between tokens and messages. `now`: the date for chat templates, constant for a job."""

    language: Language
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
