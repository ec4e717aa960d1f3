"""The tokens of a completion as cells of a heat map."""

from dataclasses import dataclass
from itertools import islice
from math import exp

import numpy as np

from gateway.openai.detokenizer import Characters
from gateway.services import Services
from knapper import limits
from knapper.catalogue.tokenizer import Language
from knapper.errors import KnapperError
from knapper.state.job_records import Rollouts

IMAGE = "image"
PromptPart = list[int] | int  # token ids, or how many tokens an image has

_SURPRISES = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # nats: the first shade is of tokens that are all but certain
_ADVANTAGES = (0.05, 0.5, 1.0, 1.5)  # and as many below 0; group_normalised has few beyond


@dataclass(frozen=True)
class Token:
    """`text`: the characters that it completes; empty within a character, or of a special token, which has `name`."""

    position: int
    token: int
    logprob: float
    text: str
    name: str

    @property
    def probability(self) -> float:
        return exp(min(self.logprob, 0.0))

    @property
    def shade(self) -> int:
        return surprise(self.logprob)


def surprise(logprob: float) -> int:
    """0 to 7: how little the token was expected."""
    return sum(-logprob > bound for bound in _SURPRISES)


def legend() -> list[str]:
    """What each shade stands for, in per cent of probability."""
    return [*(f"≥ {100 * exp(-bound):.2g} %" for bound in _SURPRISES), "less"]


def advantage_shade(advantage: float | None) -> int:
    """-4 to 4, 0 for none: of all tokens of a completion, since each has the advantage of the whole."""
    if advantage is None:
        return 0
    size = sum(abs(advantage) >= bound for bound in _ADVANTAGES)
    return size if advantage > 0 else -size


def tokens_of(language: Language | None, rollouts: Rollouts, sample: int, first: int) -> list[Token]:
    """The tokens of a completion from the `first` on, as many as a page has. Without `language` they have no text."""
    rollout = rollouts.rollouts[sample]
    ids = np.frombuffer(rollout.tokens, "<i4").tolist()
    logprobs = np.frombuffer(rollout.logprobs, "<f4").tolist()
    texts = texts_of(language, np.frombuffer(rollouts.prompt_tokens, "<i4").tolist(), ids, first)
    cells = zip(ids, logprobs, texts, strict=False)
    shown = islice(enumerate(cells), first, first + limits.console_tokens_max)
    return [Token(position, token, logprob, text, name) for position, (token, logprob, (text, name)) in shown]


async def language_of(gateway: Services, base_model: str) -> Language | None:
    """None if the gateway cannot read the model's tokenizer: pages then show token ids."""
    try:
        return await gateway.openai.languages.of(await gateway.lookups.model(base_model))
    except KnapperError:
        return None


def prompt_of(language: Language | None, tokens: list[int]) -> str:
    """Its text, as far as a page shows it."""
    shown = tokens[: limits.console_text_chars_max]
    if language is None:
        return " ".join(map(str, shown))
    return str(language.tokenizer.decode(shown, skip_special_tokens=False))


def parts_of(language: Language | None, parts: list[PromptPart]) -> str:
    """The text of a prompt of texts and images."""
    left, said = limits.console_text_chars_max, list[str]()
    for part in parts:
        if left > 0:
            said.append(f"[{IMAGE} of {part} tokens]" if isinstance(part, int) else prompt_of(language, part[:left]))
        left -= 1 if isinstance(part, int) else len(part)
    return (" " if language is None else "").join(said)


def texts_of(language: Language | None, prompt: list[int], ids: list[int], first: int) -> list[tuple[str, str]]:
    """(text, name) of each token up to the last that is shown. Without `language` its number is its name."""
    if language is None:
        return [("", str(token)) for token in ids[: first + limits.console_tokens_max]]
    special = language.tokenizer.get_added_tokens_decoder()
    characters, texts = Characters(language.tokenizer, prompt), []
    for token in ids[: first + limits.console_tokens_max]:
        text = characters.add(token)
        name = "" if text else str(special[token].content) if token in special else "…"
        texts.append((text, name))
    return texts
