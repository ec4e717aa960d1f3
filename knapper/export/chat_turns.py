"""A model's chat template as Ollama's: Jinja renders messages, Go's templates take their place.

The turns are read off what Jinja makes of a few conversations, and compared on others. A template that does more than
put each message between two texts has no equivalent here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from knapper.errors import KnapperError

Message = dict[str, str]
Render = Callable[[Sequence[Message], bool], str]  # messages, and whether the assistant's next words follow

_ROLES: Final = ("system", "user", "assistant")
_MARK: Final = "\x02{}\x03"
_TRIED: Final = (
    ("user",), ("system", "user"), ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"), ("system", "user", "assistant", "user", "assistant", "user"),
)  # fmt: skip


@dataclass(frozen=True)
class Turns:
    """`around`: by role, the texts before and after its content. `default`: what stands first without a system message;
    `answer`: what the assistant's next words follow. `folds`: a system message begins the user's turn after it.
    """

    around: dict[str, tuple[str, str]]
    default: str
    answer: str
    folds: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """What `template` makes of them."""
        text = "" if any(message["role"] == "system" for message in messages) else self.default
        folded = False
        for message in messages:
            before, after = self.around[message["role"]]
            text += ("" if folded else before) + message["content"] + after
            folded = self.folds and message["role"] == "system"
        return text + self.answer

    def template(self) -> str:
        """The same in Go's text/template, with the variables that Ollama fills."""
        clauses: list[str] = []
        for role in (role for role in _ROLES if role in self.around):
            before, after = map(_text, self.around[role])
            if self.folds and role == "system":
                after += "{{ $folded = true }}"
            if self.folds and role == "user":
                before = f"{{{{ if not $folded }}}}{before}{{{{ end }}}}{{{{ $folded = false }}}}"
            word = "else if" if clauses else "if"
            clauses.append(f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}')
        turns = "{{ range .Messages }}" + "".join(clauses) + "{{ end }}{{ end }}"
        declared = "{{ $folded := false }}" if self.folds else ""
        default = f"{{{{ if not .System }}}}{_text(self.default)}{{{{ end }}}}" if self.default else ""
        return declared + default + turns + _text(self.answer)


def turns(render: Render, begin: str = "") -> Turns | None:
    """None for a template that is more than turns. `begin`: the token that llama.cpp puts first by itself."""

    def shown(*roles: str, answering: bool = False) -> str:
        messages = [{"role": role, "content": _MARK.format(index)} for index, role in enumerate(roles)]
        return render(messages, answering).removeprefix(begin)

    try:
        read = _read(shown)
        if read is not None and all(_agrees(read, render, begin, roles) for roles in _TRIED):
            return read
    except (KnapperError, ValueError):  # it refuses the conversations, or drops a message
        pass
    return None


def _read(shown: Callable[..., str]) -> Turns | None:
    user, more = shown("user"), shown("user", "assistant", "user")
    first, _, rest = more.partition(_MARK.format(0))
    between, _, last = rest.partition(_MARK.format(1))
    after_answer, _, after_user = last.partition(_MARK.format(2))
    if not between.startswith(after_user):
        return None
    # What follows an answer ends it, and then begins the next message. Mostly all messages end alike.
    cuts = [len(after_user)] * after_answer.startswith(after_user) + [*range(len(after_answer) + 1)]
    cut = next(cut for cut in cuts if first.endswith(after_answer[cut:]))
    around = {
        "user": (after_answer[cut:], after_user),
        "assistant": (between.removeprefix(after_user), after_answer[:cut]),
    }
    default = first.removesuffix(around["user"][0])
    answer = shown("user", answering=True).removeprefix(user)
    try:
        with_system = shown("system", "user")
    except KnapperError:
        return Turns(around, default, answer)
    before, _, rest = with_system.partition(_MARK.format(0))
    after, _, _ = rest.partition(_MARK.format(1))
    if folds := not after.endswith(around["user"][0]):
        return Turns({"system": (before, after), **around}, default, answer, folds)
    return Turns({"system": (before, after.removesuffix(around["user"][0])), **around}, default, answer)


def _agrees(read: Turns, render: Render, begin: str, roles: Sequence[str]) -> bool:
    if "system" in roles and "system" not in read.around:
        return True
    messages = [{"role": role, "content": f"What {index}?\nA second line."} for index, role in enumerate(roles)]
    return render(messages, True).removeprefix(begin) == read.render(messages)


def _text(text: str) -> str:
    """As Go's template has it: braces only where they are no action."""
    return text.replace("{{", '{{ "{{" }}')
