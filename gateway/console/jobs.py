"""A job: its state and curve, its rollouts, and one conversation token by token."""

from dataclasses import dataclass
from typing import Any, Final, get_args

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.console import live
from gateway.console.pages import Viewer, missing, page, query_number, render
from gateway.console.tokens import advantage_shade, language_of, legend, prompt_of, tokens_of
from gateway.job_artifacts import get_file
from gateway.jobs import job_services_of
from gateway.services import Services
from knapper import limits
from knapper.errors import InvalidField
from knapper.ids import Tenant
from knapper.jobs import control, listings, rl
from knapper.jobs.artifacts import Artifacts
from knapper.jobs.names import Round, Start
from knapper.jobs.rl import RolloutGroup
from knapper.jobs.spec import RlJob, decode
from knapper.state import damage
from knapper.state.job_records import Rollouts, Started, read
from knapper.store import many

_PROMPTS: Final = 10  # of a step, on one page
_SAMPLES: Final = 32  # of a prompt, on that page
_FILES: Final = 100
_NO_METRICS: Final = 10**9


async def show(request: Request, viewer: Viewer) -> Response:
    gateway = viewer.gateway
    services = job_services_of(gateway)
    job = await listings.whole(services, viewer.tenant, request.path_params["job"], _NO_METRICS, gateway.presence)
    artifacts = await Artifacts.of(services, viewer.tenant, job["job"])
    files = await artifacts.listed()
    named = [(artifacts.name(entry), entry.size, entry.modified_at) for entry in files[:_FILES]]
    return render(
        request, viewer, "job.html", job=job, files=named, files_count=len(files),
        rows_max=limits.sweep_trials_shown_max,
    )  # fmt: skip


async def show_status(request: Request, viewer: Viewer) -> Response:
    """The part of the page that changes while the job runs."""
    gateway = viewer.gateway
    services, name = job_services_of(gateway), request.path_params["job"]
    job = await listings.whole(services, viewer.tenant, name, _NO_METRICS, gateway.presence)
    return render(request, viewer, "job_status.html", job=job, rows_max=limits.sweep_trials_shown_max)


async def curve(request: Request, viewer: Viewer) -> Response:
    start = await _start(request, viewer)
    return JSONResponse({"points": await viewer.gateway.console.job_steps.of(start)})


async def follow(request: Request, viewer: Viewer) -> Response:
    gateway, start = viewer.gateway, await _start(request, viewer)
    newest = live.newest(await gateway.console.job_steps.of(start), "step")
    state = (await control.now(gateway.store, start)).state

    async def look() -> dict[str, Any] | None:
        nonlocal newest, state
        points = [point for point in await gateway.console.job_steps.of(start) if point["step"] > newest]
        before, state = state, (await control.now(gateway.store, start)).state
        newest = live.newest(points, "step", newest)
        return {"points": points, "state": state} if points or before != state else None

    return await live.respond(request, gateway.console.watches, f"job {start}", look)


# ---- rollouts


@dataclass(frozen=True)
class _Step:
    """The prompts of one round, from `first` on."""

    number: int
    first: int
    prompts: int


async def show_rollouts(request: Request, viewer: Viewer) -> Response:
    """A step's prompts with their completions, a few prompts at a time."""
    gateway, start = viewer.gateway, await _start(request, viewer)
    started, job = await _rl(gateway, start)
    kind, n = _round(request), _number(request, "n")
    prompts = job.batch.prompts if kind == "steps" else started.held_out
    first = query_number(request, "first", 0)
    language = await language_of(gateway, started.base_model)

    async def read_group(part: int) -> dict[str, Any] | None:
        rollouts, scores = await rl.find_group(gateway.store, start, kind, n, part)
        if rollouts is None:
            return None
        group = None if scores is None else RolloutGroup(rollouts[0], scores[0], 0)
        return {
            "part": part,
            "prompt": prompt_of(language, rollouts[0].prompt),
            **_completions(job, kind, rollouts[0], group),
        }

    parts = range(first, min(first + _PROMPTS, prompts))
    groups = [group for group in await damage.readable(parts, read_group) if group is not None]
    return render(
        request, viewer, "rollouts.html", job=start.job, kind=kind, n=n, groups=groups, samples_max=_SAMPLES,
        step=_Step(n, first, prompts), page_size=_PROMPTS,
    )  # fmt: skip


async def show_conversation(request: Request, viewer: Viewer) -> Response:
    """One completion: its text, and its tokens as far as a page holds them."""
    gateway, start = viewer.gateway, await _start(request, viewer)
    started, job = await _rl(gateway, start)
    kind, n, part, sample = _round(request), *(_number(request, name) for name in ("n", "part", "sample"))
    rollouts, scores = await rl.find_group(gateway.store, start, kind, n, part)
    if rollouts is None or sample >= len(rollouts[0].rollouts):
        raise missing(f"job {start.job!r} has no completion {sample} of prompt {part} in {kind} {n}")
    group = None if scores is None else RolloutGroup(rollouts[0], scores[0], 0)
    language = await language_of(gateway, started.base_model)
    rollout, first = rollouts[0].rollouts[sample], query_number(request, "first", 0)
    tokens = await many.off_loop(lambda _: tokens_of(language, rollouts[0], sample, first), None)
    shown = _completions(job, kind, rollouts[0], group, sample)["completions"][0]
    return render(
        request, viewer, "conversation.html", job=start.job, kind=kind, n=n, part=part, sample=sample, tokens=tokens,
        first=first, count=len(rollout.tokens) // 4, page_size=limits.console_tokens_max,
        prompt=prompt_of(language, rollouts[0].prompt), shown=shown, samples=len(rollouts[0].rollouts),
        advantage=advantage_shade(shown["advantage"]), readable=language is not None, legend=legend(),
    )  # fmt: skip


def _completions(
    job: RlJob, kind: Round, rollouts: Rollouts, group: RolloutGroup | None, only: int | None = None
) -> dict[str, Any]:
    """Of one prompt; scores and advantages as far as they are known."""
    advantages = None
    if group is not None and kind == "steps":
        advantages = rl.advantages_of_group(job, group)
    refused = "" if group is None else group.scores.refused
    scored = group is not None and not refused
    numbers = range(min(len(rollouts.rollouts), _SAMPLES)) if only is None else [only]
    completions = []
    for n in numbers:
        rollout, score = rollouts.rollouts[n], group.scores.scores[n] if group is not None and scored else None
        sequence = rl.sequence_of(np.zeros(0, np.int32), rollout)
        completions.append({
            "n": n, "text": rollout.text, "tokens": rollout.sampled_tokens, "stopped": rollout.stopped,
            "reward": None if score is None else score.value, "parts": {} if score is None else score.parts,
            "reasons": {} if score is None else score.reasons,
            "advantage": None if advantages is None else float(advantages[n]),
            "logprob": float(sequence.logprobs_T[sequence.sampled_T].mean()) if rollout.sampled_tokens else 0.0,
        })  # fmt: skip
    return {"completions": completions, "count": len(rollouts.rollouts), "refused": refused}


async def _start(request: Request, viewer: Viewer) -> Start:
    """The job's newest start. Raises NotFound, also for another tenant's."""
    return (await listings.newest(viewer.gateway.store, Tenant(viewer.tenant), request.path_params["job"])).start


async def _rl(gateway: Services, start: Start) -> tuple[Started, RlJob]:
    """Raises NotFound for a job that samples nothing."""
    started = await read(gateway.store, start.started, Started)
    job = None if started is None else decode(started.spec_json)
    if started is None or not isinstance(job, RlJob):
        raise missing(f"job {start.job!r} has no rollouts: it is not of kind rl, or has not started")
    return started, job


def _round(request: Request) -> Round:
    kind = request.path_params["round"]
    if kind not in get_args(Round):
        raise InvalidField("round", kind, "steps or evaluations")
    return kind  # type: ignore[no-any-return]  # checked against the type's own values


def _number(request: Request, name: str) -> int:
    text = request.path_params[name]
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise InvalidField(name, text, "a whole number")
    return int(text)


async def download(request: Request, _: Viewer) -> Response:
    return await get_file(request)


_ONE: Final = "/jobs/{job}"
ROUTES = [
    page(_ONE, show),
    page(f"{_ONE}/status", show_status),
    page(f"{_ONE}/curve", curve),
    page(f"{_ONE}/live", follow),
    page(f"{_ONE}/files/{{file:path}}", download),
    page(f"{_ONE}/rollouts/{{round}}/{{n}}", show_rollouts),
    page(f"{_ONE}/rollouts/{{round}}/{{n}}/{{part}}/{{sample}}", show_conversation),
]
