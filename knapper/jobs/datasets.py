"""Data files: JSON Lines with every row checked, and errors with their line. Needs no tokenizer."""

import codecs
from collections.abc import Iterator, Sequence
from typing import Any

from knapper import limits
from knapper.errors import InvalidField, UserError
from knapper.jobs import rows as forms
from knapper.jobs.rows import ChatRow, EpisodeRow, PairRow, RlRow, Row, SftRow
from knapper.jobs.spec import AnyJob, DpoJob, EpisodesJob, Kind, RlJob, SftJob
from knapper.jobs.yaml_document import JobError


def rl(name: str, data: bytes) -> list[RlRow]:
    """Raises JobError."""
    return [row for _, row in _read("rl", name, data)]


def sft(name: str, data: bytes, loss_on: str | Sequence[str]) -> list[SftRow]:
    """`loss_on`: if it names roles, a row without roles is an error. Raises JobError."""
    rows: list[SftRow] = []
    for line, row in _read("sft", name, data):
        rows.append(row)
        if not isinstance(loss_on, str) and not isinstance(row, ChatRow):
            raise JobError(line, "prompt", "there", "rows of messages, as `loss_on` names roles", file=name)
        if isinstance(row, ChatRow):
            _check_roles(name, line, row, loss_on)
        _check_weights(name, line, row, loss_on)
    return rows


def _check_roles(name: str, line: int, row: ChatRow, loss_on: str | Sequence[str]) -> None:
    roles = [message["role"] for message in row.messages]
    if any(_learns(loss_on, role) for role in roles):
        return
    if isinstance(loss_on, str):
        raise JobError(line, "messages: roles", "no assistant", "an assistant's message to learn", file=name)
    raise JobError(line, "messages: roles", roles, f"one of {', '.join(loss_on)} at least", file=name)


def _check_weights(name: str, line: int, row: SftRow, loss_on: str | Sequence[str]) -> None:
    """Whether something is left to learn, and no message that `loss_on` leaves out has a weight of 1."""
    at, said = ("messages", row.messages) if isinstance(row, ChatRow) else ("completion", row.completion)
    if isinstance(said, str) or not row.weights:
        return
    learns = [_learns(loss_on, message["role"]) for message in said]
    for n, weight in enumerate(row.weights):
        if weight and not learns[n]:
            allowed = f"0 or none: `loss_on` leaves out what the {said[n]['role']} says"
            raise JobError(line, f"{at}[{n}].weight", weight, allowed, "Or name the role in `loss_on`", file=name)
    if not any(each and weight != 0 for each, weight in zip(learns, row.weights, strict=True)):
        raise JobError(line, f"{at}: weights", list(row.weights), "one message to learn at least", file=name)


def _learns(loss_on: str | Sequence[str], role: str) -> bool:
    return loss_on == "all" or role in (["assistant"] if loss_on == "completions" else loss_on)


def dpo(name: str, data: bytes) -> list[PairRow]:
    """Raises JobError."""
    return [row for _, row in _read("dpo", name, data)]


def episodes(name: str, data: bytes) -> list[EpisodeRow]:
    """Raises JobError."""
    return [row for _, row in _read("episodes", name, data)]


def rows(job: AnyJob, name: str, data: bytes) -> Sequence[Row]:
    """The rows of a data file of this job, `data` or `evaluate.data`. Raises JobError."""
    match job:
        case RlJob():
            return rl(name, data)
        case SftJob():
            return sft(name, data, job.loss_on)
        case DpoJob():
            return dpo(name, data)
        case EpisodesJob():
            return episodes(name, data)


def line_of(name: str, data: bytes, row: int) -> int:
    """The line, from 1, of a row, from 0."""
    return next(line for n, (line, _) in enumerate(_lines(name, data)) if n == row)


def _lines(name: str, data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line that is not empty."""
    count = 0
    for number, text in enumerate(data.split(b"\n"), 1):
        text = text.removeprefix(codecs.BOM_UTF8)  # of any line: files with such a mark get concatenated, too
        if text.strip():
            count += 1
            if count > limits.job_rows_max:
                raise JobError(number, "its number of rows", count, f"at most {limits.job_rows_max}", file=name)
            yield number, text
    if not count:
        raise JobError(1, "its content", "empty", "a row of JSON in each line", file=name)


def _read(kind: Kind, name: str, data: bytes) -> Iterator[tuple[int, Any]]:
    """(line, row) of each."""
    for line, text in _lines(name, data):
        try:
            yield line, forms.read(kind, text)
        except InvalidField as error:
            raise JobError(line, error.field or "", error.value, error.allowed, error.todo, file=name) from error
        except UserError as error:
            raise JobError(line, "the line", text[:80], "one JSON object", message=str(error), file=name) from error
