"""The rows of data files: every accepted form, read as one of five kinds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from knapper import limits
from knapper.catalogue.conversations import Message, Weight, conversation, weighted
from knapper.errors import InvalidField
from knapper.jobs.spec import Kind
from knapper.text.suggestions import did_you_mean
from knapper.wire import json
from knapper.wire.types import Float32, Int32

Text = Annotated[str, Meta(min_length=1)]
Messages = list[Message]
Prompt = str | Messages
Completion = str | Messages  # messages: those that follow a prompt of messages
Mask = NDArray[np.bool_]
Weights = Sequence[Weight | None]  # of each message; empty: none has one


@dataclass(frozen=True)
class RlRow:
    """A prompt. `answer`: what the reward compares completions with."""

    prompt: Prompt
    answer: Any = None


@dataclass(frozen=True)
class ChatRow:
    messages: Messages
    weights: Weights = ()


@dataclass(frozen=True)
class CompletionRow:
    """`weights`: of the completion's messages."""

    prompt: Prompt
    completion: Completion
    weights: Weights = ()


@dataclass(frozen=True)
class PairRow:
    """A prompt, a better completion and a worse one."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion


@dataclass(frozen=True)
class EpisodeSequence:
    """`sampled_T`: which tokens were sampled; `logprobs_T`: theirs, and zeros at the others."""

    tokens_T: Int32
    sampled_T: Mask
    logprobs_T: Float32


@dataclass(frozen=True)
class EpisodeRow:
    """What an agent sampled in one session, and what that was worth."""

    episode: str
    group: str
    reward: float
    sequences: Sequence[EpisodeSequence]


SftRow = ChatRow | CompletionRow
Row = RlRow | ChatRow | CompletionRow | PairRow | EpisodeRow


class RowForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to write a row. `shown`: an example, for people."""

    shown: ClassVar[str]

    def row(self) -> Row:
        """Raises InvalidField."""
        raise NotImplementedError


class PromptForm(RowForm, frozen=True, kw_only=True):
    shown = '{"prompt": ..., "answer": ...}'

    prompt: Text | list[Any]
    answer: Any = None

    def row(self) -> RlRow:
        return RlRow(_prompt(self.prompt), self.answer)


class ChatForm(RowForm, frozen=True, kw_only=True):
    shown = '{"messages": [...]}'

    messages: list[Any]

    def row(self) -> ChatRow:
        return _chat(self.messages, "messages")


class ShareGptForm(RowForm, frozen=True, kw_only=True):
    shown = '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}'

    conversations: list[Any]
    system: str | None = None
    tools: Any = None
    id: str | int | None = None  # a label; ignored

    def row(self) -> ChatRow | PairRow:
        chat = _chat(self.conversations, "conversations")
        before = self.before(chat.messages)
        return ChatRow([*before, *chat.messages], chat.weights and [*(None for _ in before), *chat.weights])

    def before(self, messages: Messages) -> Messages:
        """The message of `system`, if there is one. Raises InvalidField."""
        if self.tools not in (None, "", []):
            raise InvalidField(
                "tools", self.tools, "none: write them into a system message, as the model shall see them"
            )
        if not self.system:
            return []
        if messages[0]["role"] == "system":
            raise InvalidField("system", self.system, "none beside a conversation that begins with a system message")
        return [{"role": "system", "content": self.system}]


class CompletionForm(RowForm, frozen=True, kw_only=True):
    shown = '{"prompt": ..., "completion": ...}'

    prompt: Text | list[Any]
    completion: Text | list[Any]

    def row(self) -> CompletionRow:
        prompt, completion = _prompt(self.prompt), self.completion
        if isinstance(completion, str):
            return CompletionRow(prompt, completion)
        following = _chat(completion, "completion")
        return CompletionRow(prompt, _following(prompt, following.messages, "completion"), following.weights)


class PreferenceForm(RowForm, frozen=True, kw_only=True):
    shown = '{"prompt": ..., "chosen": ..., "rejected": ...}'

    prompt: Text | list[Any]
    chosen: Text | list[Any]
    rejected: Text | list[Any]

    def row(self) -> PairRow:
        prompt = _prompt(self.prompt)
        if isinstance(prompt, str) and isinstance(self.chosen, list) and isinstance(self.rejected, list):
            return _repeating(prompt, _diverging(self.chosen, self.rejected))
        return _pair(prompt, self.chosen, self.rejected)


class DivergingForm(RowForm, frozen=True, kw_only=True):
    shown = '{"chosen": [...], "rejected": [...]} with the same messages before the first that differs'

    chosen: Text | list[Any]
    rejected: Text | list[Any]

    def row(self) -> PairRow:
        if isinstance(self.chosen, str) or isinstance(self.rejected, str):
            todo = "Or write `chosen` and `rejected` as whole conversations, which begin with it"
            raise InvalidField("prompt", None, "a value: in two texts its end cannot be recognised", todo)
        return _diverging(self.chosen, self.rejected)


class ShareGptPair(ShareGptForm, frozen=True, kw_only=True):
    shown = '{"conversations": [...], "chosen": {"from": "gpt", "value": "..."}, "rejected": {...}}'

    chosen: Text | dict[str, Any] | list[Any]
    rejected: Text | dict[str, Any] | list[Any]

    def row(self) -> PairRow:
        chosen, rejected = ([each] if isinstance(each, dict) else each for each in (self.chosen, self.rejected))
        messages = conversation(self.conversations, "conversations")
        return _pair([*self.before(messages), *messages], chosen, rejected)


class SequenceForm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`sampled`: [first, end) of each part of the tokens that was sampled; `logprobs`: of all of these, at most 0 but
    for rounding.
    """

    tokens: Annotated[list[Annotated[int, Meta(ge=0, le=2**31 - 1)]], Meta(min_length=2)]
    sampled: Annotated[list[tuple[int, int]], Meta(min_length=1)]
    logprobs: list[Annotated[float, Meta(ge=limits.logprob_min, le=limits.logprob_max)]]

    def sequence(self, at: str) -> EpisodeSequence:
        """Raises InvalidField."""
        before, sampled_T = 1, np.zeros(len(self.tokens), np.bool_)
        for n, (first, end) in enumerate(self.sampled):
            if not before <= first < end <= len(self.tokens):
                allowed = f"[first, end] with {before} <= first < end <= {len(self.tokens)}, the number of its tokens"
                raise InvalidField(f"{at}.sampled[{n}]", [first, end], allowed)
            sampled_T[first:end], before = True, end
        if len(self.logprobs) != (count := int(sampled_T.sum())):
            raise InvalidField(f"the length of {at}.logprobs", len(self.logprobs), f"{count}, as many as are sampled")
        logprobs_T = np.zeros(len(self.tokens), np.float32)
        logprobs_T[sampled_T] = self.logprobs
        return EpisodeSequence(np.array(self.tokens, np.int32), sampled_T, logprobs_T)


class EpisodeForm(RowForm, frozen=True, kw_only=True):
    shown = (
        '{"episode": "a", "group": "", "reward": 1.0, '
        '"sequences": [{"tokens": [5, 6, 7], "sampled": [[1, 3]], "logprobs": [-0.5, -1.5]}]}'
    )

    reward: Annotated[float, Meta(ge=-limits.episode_score_max, le=limits.episode_score_max)]
    sequences: Annotated[list[SequenceForm], Meta(min_length=1)]
    episode: str = ""
    group: str = ""

    def row(self) -> EpisodeRow:
        sequences = [each.sequence(f"sequences[{n}]") for n, each in enumerate(self.sequences)]
        return EpisodeRow(self.episode, self.group, self.reward, sequences)


FORMS: Mapping[Kind, tuple[type[RowForm], ...]] = {
    "rl": (PromptForm,),
    "sft": (ChatForm, CompletionForm, ShareGptForm),
    "dpo": (PreferenceForm, DivergingForm, ShareGptPair),
    "episodes": (EpisodeForm,),
}


def read(kind: Kind, text: bytes) -> Row:
    """Raises UserError: InvalidField for a wrong field; an unknown form's error shows all forms."""
    sent = json.loads(text)
    forms = FORMS[kind]
    if not isinstance(sent, dict):
        return json.decode(text, forms[0]).row()
    if fitting := next((form for form in forms if _required(form) <= sent.keys() <= _names(form)), None):
        return json.decode(text, fitting).row()
    shown = f"Rows of {kind} are: " + ", or ".join(form.shown for form in forms)
    known = list(dict.fromkeys(name for form in forms for name in form.__struct_fields__))
    for name in (field for field in sent if field not in known):
        todo = f"{did_you_mean(name, known)} {shown}".strip()
        raise InvalidField(name, sent[name], f"no field of this name, only {', '.join(known)}", todo)
    nearest = max(forms, key=lambda form: (len(sent.keys() & _names(form)), -len(_required(form) - sent.keys())))
    try:
        return json.decode(text, nearest).row()
    except InvalidField as error:
        todo = f"{error.todo} {shown}".strip()
        raise InvalidField(str(error.field), error.value, error.allowed, todo) from error


@cache
def _names(form: type[RowForm]) -> frozenset[str]:
    return frozenset(field.encode_name for field in msgspec.structs.fields(form))


@cache
def _required(form: type[RowForm]) -> frozenset[str]:
    return frozenset(field.encode_name for field in msgspec.structs.fields(form) if field.required)


def _prompt(sent: str | list[Any]) -> Prompt:
    return sent if isinstance(sent, str) else conversation(sent, "prompt")


def _chat(sent: list[Any], at: str) -> ChatRow:
    messages, weights = weighted(sent, at)
    return ChatRow(messages, weights if any(weight is not None for weight in weights) else ())


def _completion(prompt: Prompt, sent: str | list[Any], at: str) -> Completion:
    return sent if isinstance(sent, str) else _following(prompt, conversation(sent, at), at)


def _following(prompt: Prompt, messages: Messages, at: str) -> Messages:
    """The messages. Raises InvalidField unless they clearly follow the prompt."""
    if isinstance(prompt, str):
        raise InvalidField(at, messages, "a text, as `prompt` is one", "Or write both as messages")
    if messages[: len(prompt)] == prompt:
        raise InvalidField(at, messages, "only the messages that follow those of `prompt`")
    if prompt[-1]["role"] == "assistant":
        raise InvalidField(
            "the role of the prompt's last message", "assistant", "another: the completion is the assistant's"
        )
    for n in (0, -1):
        if messages[n]["role"] != "assistant":
            raise InvalidField(
                f"the role of the {'last' if n else 'first'} message of {at}", messages[n]["role"], "assistant"
            )
    return messages


def _pair(prompt: Prompt, chosen: str | list[Any], rejected: str | list[Any]) -> PairRow:
    better, worse = _completion(prompt, chosen, "chosen"), _completion(prompt, rejected, "rejected")
    if isinstance(better, str) != isinstance(worse, str):
        raise InvalidField("rejected", rejected, "of the same form as `chosen`: both texts, or both messages")
    if better == worse:
        raise InvalidField("rejected", rejected, "another text than `chosen`")
    return PairRow(prompt, better, worse)


def _diverging(chosen: list[Any], rejected: list[Any]) -> PairRow:
    """Two whole conversations: their common beginning is the prompt. Raises InvalidField."""
    better, worse = conversation(chosen, "chosen"), conversation(rejected, "rejected")
    same = 0
    while same < min(len(better), len(worse)) and better[same] == worse[same]:
        same += 1
    if not same:
        raise InvalidField("rejected", rejected, "a conversation that begins as `chosen` does", "Or give a `prompt`")
    if same in (len(better), len(worse)):
        raise InvalidField(
            "rejected", rejected, "a conversation that ends otherwise than `chosen`, and is no part of it"
        )
    return _pair(better[:same], better[same:], worse[same:])


def _repeating(prompt: str, row: PairRow) -> PairRow:
    """Whole conversations beside a text prompt. Raises InvalidField if they do not contain the prompt."""
    messages = [] if isinstance(row.prompt, str) else row.prompt
    if {"role": "user", "content": prompt} not in messages:
        todo = "Write the prompt as messages, or leave it out, or write `chosen` and `rejected` as texts"
        raise InvalidField("prompt", prompt, "what a user says in `chosen` and `rejected` before they differ", todo)
    return row
