"""A run: its curves, operations, pauses and bytes, and the files of its checkpoints."""

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.console import home, live
from gateway.console.pages import Viewer, page, render
from gateway.rest import runs, weights
from gateway.rest.checkpoints import path_of
from gateway.services import Services
from knapper.errors import NotFound, UserError
from knapper.ids import RunId, Tenant, session_of
from knapper.jobs import job_names
from knapper.state import alarms, damage
from knapper.state.journal import bundles
from knapper.state.journal.records import Manifest, Spec
from knapper.state.signed_links import Link

_KINDS: Final = {"weights": "training states", "sampler_weights": "sampler weights", "external_weights": "exports"}


async def show(request: Request, viewer: Viewer) -> Response:
    gateway, spec = viewer.gateway, await _spec(request, viewer)
    run = RunId(spec.run)
    job = job_names.of(await damage.unless(gateway.lookups.session(session_of(run), viewer.tenant), None))
    checkpoints, count = await home.checkpoints_of(gateway, viewer.tenant, run)
    return render(
        request, viewer, "run.html", spec=spec, run=await runs.description(gateway, spec), job=job,
        activity=home.activity_of(gateway, run), checkpoints=checkpoints, checkpoints_count=count,
    )  # fmt: skip


async def show_operations(request: Request, viewer: Viewer) -> Response:
    """The part of the page that reads the journal: it comes after the page, and again when something is new."""
    gateway, spec = viewer.gateway, await _spec(request, viewer)
    run = RunId(spec.run)
    history = await gateway.console.histories.of(run)
    manifests = await gateway.console.histories.manifests(run)
    claimed_at = {manifest.epoch: manifest.claimed_at for manifest in manifests}
    stored = await _stored(gateway, viewer.tenant, run, manifests)
    journal = sum(done.size for done in history.operations)
    return render(
        request, viewer, "operations.html", spec=spec, operations=history.newest(), pauses=history.pauses(claimed_at),
        stored=[*stored, (f"journal: bodies of {len(history.operations)} operations that were read", journal)],
        activity=home.activity_of(gateway, run), holder=manifests[-1] if manifests else None,
        alarms=await gateway.monitor.alarms.newest(run),
    )  # fmt: skip


async def curve(request: Request, viewer: Viewer) -> Response:
    """Its points, and what `knapper runs` says of it: what it does now, and its alarms, newest first."""
    gateway, run = viewer.gateway, RunId((await _spec(request, viewer)).run)
    history, activity = await gateway.console.histories.of(run), home.activity_of(gateway, run)
    told = [alarms.shown(alarm) for alarm in await gateway.monitor.alarms.newest(run)]
    now = {"state": activity.state, "reason": activity.reason}
    return JSONResponse({"points": list(history.points), "alarms": told, **now})


async def follow(request: Request, viewer: Viewer) -> Response:
    gateway, run = viewer.gateway, RunId((await _spec(request, viewer)).run)
    history = await gateway.console.histories.of(run)
    seen, newest = (history.through, home.activity_of(gateway, run).state), live.newest(history.points, "at")

    async def look() -> dict[str, Any] | None:
        nonlocal seen, newest
        history, activity = await gateway.console.histories.of(run), home.activity_of(gateway, run)
        before, seen = seen, (history.through, activity.state)
        if before == seen:
            return None
        points = [point for point in history.points if point["at"] > newest]
        newest = live.newest(points, "at", newest)
        return {"points": points, "state": activity.state, "reason": activity.reason}

    return await live.respond(request, gateway.console.watches, run, look)


async def show_checkpoint(request: Request, viewer: Viewer) -> Response:
    """A checkpoint's files."""
    path, checkpoint, index = await _checkpoint(request, viewer)
    return render(request, viewer, "checkpoint.html", path=path, checkpoint=checkpoint, parts=index.parts)


async def download(request: Request, viewer: Viewer) -> Response:
    """One file: the bytes that a signed link of the API gives."""
    path, checkpoint, index = await _checkpoint(request, viewer)
    part = request.path_params["file"]
    if part not in [each.name for each in index.parts]:
        raise NotFound(f"checkpoint {path} has no file {part[:80]!r}")
    await viewer.gateway.audit.read(viewer.tenant, checkpoint.path, "download")
    link = Link(
        kind="weights", tenant=viewer.tenant, subject=str(path), expires_at=0.0, part=part, bundle=checkpoint.bundle
    )
    return await weights.file_of(viewer.gateway, link)


async def _spec(request: Request, viewer: Viewer) -> Spec:
    """Raises NotFound, also for another tenant's."""
    return await viewer.gateway.lookups.spec(request.path_params["run_id"], viewer.tenant)


async def _checkpoint(request: Request, viewer: Viewer) -> Any:
    """(path, checkpoint, index). Raises NotFound, also for another tenant's, published or not."""
    path = path_of(request)
    checkpoint = await viewer.gateway.checkpoints.own(path, viewer.tenant)
    index = await bundles.read_index(viewer.gateway.store, checkpoint.bundle)
    if index is None:
        raise UserError(f"checkpoint {path} has no files any more; use another one")
    return path, checkpoint, index


async def _stored(gateway: Services, tenant: Tenant, run: RunId, manifests: list[Manifest]) -> list[tuple[str, int]]:
    """(what, bytes): what the run's bytes are spent on. Files that several names share count once."""
    labels = await gateway.checkpoints.labels(tenant, within=f"{run}/")
    sizes = []
    for kind, words in _KINDS.items():
        of_kind = {label.bundle: label.size_bytes for label in labels if label.path.kind == kind}
        if of_kind:
            sizes.append((f"{words}: {len(of_kind)}", sum(of_kind.values())))
    snapshots = [manifests[-1].snapshot, manifests[-1].snapshot_before] if manifests else []
    indexes = await damage.readable(
        [each for each in snapshots if each], lambda at: bundles.read_index(gateway.store, at)
    )
    there = [index for index in indexes if index is not None]
    if there:
        words = f"snapshots, from which a process goes on: {len(there)}"
        sizes.append((words, sum(part.size for index in there for part in index.parts)))
    return sizes


_ONE: Final = "/runs/{run_id}"
_CHECKPOINT: Final = "/runs/{run_id}/checkpoints/{kind}/{name}"
ROUTES = [
    page(_ONE, show),
    page(f"{_ONE}/operations", show_operations),
    page(f"{_ONE}/curve", curve),
    page(f"{_ONE}/live", follow),
    page(_CHECKPOINT, show_checkpoint),
    page(f"{_CHECKPOINT}/files/{{file}}", download),
]
