"""One pass of a run: which weights drew its data, its datums, and each token as sampler and trainer saw it.

T tokens of a datum. What the journal keeps no more is not shown.
"""

from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from gateway import bodies
from gateway.console.pages import Viewer, missing, page, query_number, render
from gateway.console.tokens import IMAGE, PromptPart, language_of, parts_of, surprise, texts_of
from knapper import limits
from knapper.errors import InvalidField
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal.records import Operation, Result, decode
from knapper.store import many
from knapper.wire import prompts, proto
from knapper.wire.types import Datum, Image

_DATUMS: Final = 50  # on one page
_DIFFERENCES: Final = (0.01, 0.05, 0.2, 1.0)  # nats; rounding is below the first shade
_SHADES: Final = len(_DIFFERENCES)


class DatumRow(msgspec.Struct, frozen=True):
    """One datum. `tokens`: those that are trained on. Means over these; None where the pass has no such values."""

    number: int
    tokens: int
    logprob: float
    k1: float | None
    k2: float | None
    largest: float | None
    advantage: float | None


class TokenRow(msgspec.Struct, frozen=True):
    """One target: its log-probability by the trainer, by the sampler, and its advantage, where there are such.

    `image`: it is of an image, and its id says nothing.
    """

    position: int
    image: bool
    token: int
    trainer: float
    sampler: float | None
    advantage: float | None


@dataclass(frozen=True)
class TokenCell:
    """A token of the heat map. `scale`: the largest advantage of the datum."""

    row: TokenRow
    text: str
    name: str
    scale: float

    @property
    def difference(self) -> float | None:
        return None if self.row.sampler is None else self.row.trainer - self.row.sampler

    @property
    def shades(self) -> str:
        """CSS classes: s0 to s7 by surprise, d-4 to d4 by difference, a-4 to a4 by advantage."""
        return f"s{surprise(self.row.trainer)} d{_signed(self.difference)} a{self._advantage()}"

    def _advantage(self) -> int:
        value = self.row.advantage
        if not value:
            return 0
        size = int(np.ceil(_SHADES * abs(value) / self.scale))
        return size if value > 0 else -size


def _signed(difference: float | None) -> int:
    if difference is None:
        return 0
    size = sum(abs(difference) >= bound for bound in _DIFFERENCES)
    return size if difference > 0 else -size


def legend() -> list[tuple[int, str]]:
    """(shade, what it stands for) of differences, in nats."""
    above = [(n, f"+{bound:g}") for n, bound in enumerate(_DIFFERENCES, 1)]
    return [*((-n, f"\u2212{words[1:]}") for n, words in reversed(above)), (0, "none"), *above]


async def show(request: Request, viewer: Viewer) -> Response:
    operation, result = await _pass(request, viewer)
    first = query_number(request, "first", 0, limits.datums_per_request_max)
    rows, count = await bodies.in_worker(request, rows_of, operation.body(), result.body, first)
    return render(
        request, viewer, "pass.html", run=operation.run, seq=operation.seq, rows=rows, count=count, first=first,
        page_size=_DATUMS, provenance=operation.provenance, accepted_at=operation.accepted_at,
    )  # fmt: skip


async def show_datum(request: Request, viewer: Viewer) -> Response:
    operation, result = await _pass(request, viewer)
    number, first = _number(request, "datum"), query_number(request, "first", 0)
    found = await bodies.in_worker(request, tokens_of, operation.body(), result.body, number)
    if found is None:
        raise missing(f"operation {operation.seq} of {operation.run} has no datum {number}")
    parts, rows = found
    prompt = next((part for part in reversed(parts) if isinstance(part, list)), [])
    spec = await viewer.gateway.lookups.spec(operation.run, viewer.tenant)
    language = await language_of(viewer.gateway, spec.base_model)
    ids = [row.token for row in rows]
    texts = await many.off_loop(lambda _: texts_of(language, prompt, ids, first), None)
    scale = max((abs(row.advantage) for row in rows if row.advantage is not None), default=0.0)
    cells = [
        TokenCell(row, *(("", IMAGE) if row.image else text), scale) for row, text in zip(rows, texts, strict=False)
    ]
    return render(
        request, viewer, "pass_tokens.html", run=operation.run, seq=operation.seq, number=number,
        cells=cells[first:], first=first, count=len(rows), page_size=limits.console_tokens_max,
        prompt=parts_of(language, parts), readable=language is not None, legend=legend(),
        sampled=any(row.sampler is not None for row in rows), taught=scale > 0,
    )  # fmt: skip


async def _pass(request: Request, viewer: Viewer) -> tuple[Operation, Result]:
    """Raises NotFound, also for another tenant's, and for an operation that is no pass, or is kept no more."""
    gateway, seq = viewer.gateway, _number(request, "seq")
    run = RunId((await gateway.lookups.spec(request.path_params["run_id"], viewer.tenant)).run)
    name = layout.operation(run, seq)
    data = await gateway.store.get(name)
    operation = None if data is None else await many.off_loop(lambda data: decode(data, Operation, name), data)
    result = None if operation is None else await gateway.result_reader.find(run, seq)
    if operation is None or operation.kind != "forward_backward" or result is None or result.failed:
        raise missing(f"operation {seq} of {run} is no pass with a result, or the journal keeps it no more")
    return operation, result


def _number(request: Request, name: str) -> int:
    text = request.path_params[name]
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(limits.offset_max))):
        raise InvalidField(name, text[:80], "a whole number")
    return int(text)


# ---- in a worker process, since a pass may be large


def rows_of(body: bytes, output: bytes, first: int) -> tuple[list[DatumRow], int]:
    """(the datums of a page, how many there are). Raises UserError."""
    both = _joined(body, output)
    return [_row(n, *each) for n, each in enumerate(both[first : first + _DATUMS], first)], len(both)


def tokens_of(body: bytes, output: bytes, number: int) -> tuple[list[PromptPart], list[TokenRow]] | None:
    """(the prompt, the targets from the first one that is trained on). None without such a datum. Raises UserError."""
    both = _joined(body, output)
    if number >= len(both):
        return None
    datum, trainer_T = both[number]
    targets_T, trained_T, sampler_T, advantages_T = _arrays(datum, trainer_T)
    begin = int(np.argmax(trained_T)) if trained_T.any() else 0
    seen = {at for image in datum.images for at in range(image.at, image.at + image.tokens)}
    rows = [
        TokenRow(
            position=at - begin, image=at + 1 in seen, token=int(targets_T[at]), trainer=float(trainer_T[at]),
            sampler=None if sampler_T is None or not trained_T[at] else float(sampler_T[at]),
            advantage=None if advantages_T is None else float(advantages_T[at]),
        )
        for at in range(begin, len(targets_T))
    ]  # fmt: skip
    shown = [image for image in datum.images if image.at + image.tokens <= begin + 1]
    cut = prompts.cut(datum.tokens[: begin + 1], shown)
    return [part.tokens if isinstance(part, Image) else part.tolist() for part in cut], rows


Array = NDArray[Any]


def _joined(body: bytes, output: bytes) -> list[tuple[Datum, Array]]:
    """Each datum with the trainer's log-probabilities (T): of several targets a position, the first."""
    data = proto.decode_forward_backward(body).data
    outputs = proto.decode_forward_backward_output(output).outputs
    return [
        (datum, np.asarray(each["logprobs"], np.float64).reshape(len(datum.tokens), -1)[:, 0])
        for datum, each in zip(data, outputs, strict=True)
    ]


def _arrays(datum: Datum, trainer_T: Array) -> tuple[Array, Array, Array | None, Array | None]:
    """(targets, which are trained on, the sampler's log-probabilities, advantages), each (T)."""
    first = {name: each.reshape(len(trainer_T), -1)[:, 0] for name, each in datum.inputs.items()}
    sampler_T, weights_T = first.get("logprobs"), first.get("weights")
    if sampler_T is not None:
        trained_T = sampler_T != 0
    else:
        trained_T = np.ones(len(trainer_T), bool) if weights_T is None else weights_T != 0
    return first["target_tokens"], trained_T, sampler_T, first.get("advantages")


def _row(number: int, datum: Datum, trainer_T: Array) -> DatumRow:
    _, trained_T, sampler_T, advantages_T = _arrays(datum, trainer_T)
    count = int(trained_T.sum())
    own_S = trainer_T[trained_T]
    k1 = k2 = largest = advantage = None
    if sampler_T is not None and count:
        distance_S = own_S - sampler_T[trained_T]
        k1, k2 = float(-distance_S.mean()), float(0.5 * (distance_S**2).mean())
        largest = float(np.abs(distance_S).max())
    if advantages_T is not None and count:
        advantage = float(advantages_T[trained_T].mean())
    return DatumRow(number, count, float(own_S.mean()) if count else 0.0, k1, k2, largest, advantage)


_ONE: Final = "/runs/{run_id}/passes/{seq}"
ROUTES = [page(_ONE, show), page(f"{_ONE}/{{datum}}", show_datum)]
