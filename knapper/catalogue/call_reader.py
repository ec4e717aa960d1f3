"""Finds calls of tools in a text that comes in pieces; what is none is text, and is passed on as soon as it is sure."""

from collections.abc import Mapping

from knapper.catalogue.call_formats import CallFormat
from knapper.catalogue.tools import Tool, ToolCall

Piece = str | ToolCall


class CallReader:
    """One text. Blanks around calls are dropped. `several`: whether calls after the first are passed on."""

    def __init__(self, form: CallFormat, tools: Mapping[str, Tool], several: bool = True) -> None:
        self._form, self._tools, self._several = form, tools, several
        self._held = ""  # text that may belong to a call, or be blank before one
        self._block: str | None = None  # what came since an opening
        self._blanks = ""  # before that
        self._begun = False  # something other than blanks was passed on
        self.calls = 0

    def add(self, text: str) -> list[Piece]:
        """What is sure now."""
        pieces: list[Piece] = []
        self._held += text
        while self._held and (found := self._next()) is not None:
            pieces += found
        return pieces

    def end(self) -> list[Piece]:
        """What is left when the text has ended. A call that lacks nothing but its closing is one."""
        pieces = self._finished() if self._block is not None else []
        rest, self._held = self._held, ""
        return pieces + self._text(rest if rest.strip() or not self.calls else "")

    def _next(self) -> list[Piece] | None:
        """The next pieces of what is held; None: more has to come."""
        if self._block is not None:
            return self._inside(self._block)
        at = self._held.find(self._form.opening)
        if self._form.at_start_only and (self._begun or (at > 0 and self._held[:at].strip())):
            at = -1
        if at >= 0:
            before, self._held = self._held[:at], self._held[at + len(self._form.opening) :]
            self._block, self._blanks = "", before[len(before.rstrip()) :]
            return self._text(before.rstrip())
        sure = len(self._held) - self._unsure()
        if not sure:
            return None
        text, self._held = self._held[:sure], self._held[sure:]
        return self._text(text) or None

    def _inside(self, block: str) -> list[Piece] | None:
        closing = self._form.closing
        whole = block + self._held
        at = -1 if closing is None else whole.find(closing, max(0, len(block) - len(closing or "")))
        if closing is None or at < 0:
            self._block, self._held = whole, ""
            return None
        self._block, self._held = whole[:at], whole[at + len(closing) :]
        return self._finished(closing)

    def _finished(self, closing: str = "") -> list[Piece]:
        block, self._block = self._block or "", None
        found = self._form.parse(block, self._tools)
        if found is None:
            return self._text(self._blanks + self._form.opening + block + closing)
        fresh = found if self._several else found[: max(0, 1 - self.calls)]
        self.calls += len(found)
        return list(fresh)

    def _text(self, text: str) -> list[Piece]:
        """Nothing after a call that is the only one."""
        if not text or (self.calls and not self._several):
            return []
        self._begun = self._begun or bool(text.strip())
        return [text]

    def _unsure(self) -> int:
        """How many characters at the end may begin a call, or be blanks before one."""
        held, opening = self._held, self._form.opening
        if self._form.at_start_only and (self._begun or held.strip()):
            return 0
        partial = next((n for n in range(min(len(opening) - 1, len(held)), 0, -1) if opening.startswith(held[-n:])), 0)
        body = held[: len(held) - partial]
        return partial + len(body) - len(body.rstrip())
