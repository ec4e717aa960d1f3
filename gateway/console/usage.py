"""Usage and stored bytes of a tenant; for an administrator those of every tenant, and the keys."""

from collections import Counter
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from gateway.console.pages import Viewer, page, query_number, render
from gateway.rest import admin
from knapper import ids, limits
from knapper.errors import NotFound, UserError
from knapper.ids import Tenant
from knapper.state import usage
from knapper.state.api_keys import Keys
from knapper.state.model_record import slug
from knapper.state.usage import HOUR_S, Window

_KEYS: Final = 500
_TYPES: Final = ("training", "sampling_prefill", "sampling_sample", "checkpoint")


async def show(request: Request, viewer: Viewer) -> Response:
    """The last day, or up to two weeks. `tenant`: another one, for an administrator."""
    gateway, tenant = viewer.gateway, _tenant(request, viewer)
    days = max(1, query_number(request, "days", 1, limits.usage_days_max))
    end = int(gateway.clock() // HOUR_S) + 1
    events, _ = await admin.used(gateway, tenant, Window(end - 24 * days, end))
    return render(request, viewer, "usage.html", tenant=tenant, days=days, rows=_sums(events), choices=(1, 3, 7, 14))


async def show_stored(request: Request, viewer: Viewer) -> Response:
    """What the tenant's bytes are spent on; a part of the page, since it reads the labels of all checkpoints."""
    tenant = _tenant(request, viewer)
    labels = await viewer.gateway.checkpoints.labels(tenant)
    names = {slug(model.name): model.name for model in await viewer.gateway.lookups.catalogue.models()}
    rows = []
    for kind, words in (
        ("weights", "training states"), ("sampler_weights", "sampler weights"), ("external_weights", "exports"),
    ):  # fmt: skip
        for model in sorted({label.model for label in labels if label.path.kind == kind}):
            of = [label for label in labels if label.path.kind == kind and label.model == model]
            rows.append(
                {"kind": words, "model": names.get(model, model), "count": len(of), "bytes": usage.stored_bytes(of)}
            )
    return render(request, viewer, "stored.html", rows=rows, total=usage.stored_bytes(labels))


async def show_admin(request: Request, viewer: Viewer) -> Response:
    _expect_admin(viewer)
    return await _admin(request, viewer)


async def make_key(request: Request, viewer: Viewer) -> Response:
    """The key is on the page that answers, and nowhere else."""
    _expect_admin(viewer)
    keys, form = _keys(viewer), request.state.form
    tenant = ids.tenant(form.get("tenant", ""))
    new_id = viewer.gateway.new_id
    key, record = await keys.create(tenant, form.get("note", ""), lambda: new_id() + new_id())
    await viewer.gateway.audit.write(viewer.tenant, "key_create", key_id=record.id, for_tenant=tenant)
    return await _admin(request, viewer, made=key)


async def revoke_key(request: Request, viewer: Viewer) -> Response:
    _expect_admin(viewer)
    record = await _keys(viewer).revoke(request.state.form.get("id", ""))
    await viewer.gateway.audit.write(viewer.tenant, "key_revoke", key_id=record.id, for_tenant=record.tenant)
    if viewer.gateway.keys is not None:
        await viewer.gateway.keys.revoke(record)  # here at once, elsewhere within a second
    return RedirectResponse("/admin", 303)


async def _admin(request: Request, viewer: Viewer, made: str = "") -> Response:
    gateway = viewer.gateway
    listed = [] if gateway.keys is None else (await Keys(gateway.store, gateway.clock).listed())[::-1]
    tenants = sorted({key.tenant for key in listed} | {viewer.tenant})
    return render(
        request, viewer, "admin.html", keys=listed[:_KEYS], count=len(listed), tenants=tenants, made=made,
        keys_on=gateway.keys is not None,
    )  # fmt: skip


def _keys(viewer: Viewer) -> Keys:
    if viewer.gateway.keys is None:
        raise UserError("keys are off on this server; its operator turns them on with KNAPPER_KEYS=true")
    return Keys(viewer.gateway.store, viewer.gateway.clock)


def _tenant(request: Request, viewer: Viewer) -> Tenant:
    """Raises NotFound for another tenant's, unless an administrator asks."""
    named = request.query_params.get("tenant", viewer.tenant)
    if named == viewer.tenant:
        return viewer.tenant
    _expect_admin(viewer)
    return ids.tenant(named)


def _expect_admin(viewer: Viewer) -> None:
    if not viewer.admin:
        raise NotFound("there is no such page for this key; the server's operator names a tenant in KNAPPER_ADMIN")


def _sums(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens, device seconds and saves by day and model, the newest day first."""
    tokens: Counter[tuple[str, str, str]] = Counter()
    seconds: Counter[tuple[str, str]] = Counter()
    for event in events:
        day, model, info = event["bucket_start"][:10], event["base_model"], event["event_info"]
        tokens[day, model, info["type"]] += info.get("token_count", info.get("count", 0))
        seconds[day, model] += info.get("device_seconds", 0.0)
    return [
        {
            "day": day, "model": model, "seconds": seconds[day, model],
            **{name: tokens[day, model, name] for name in _TYPES},
        }
        for day, model in sorted(seconds, reverse=True)
    ]  # fmt: skip


ROUTES = [
    page("/usage", show),
    page("/usage/stored", show_stored),
    page("/admin", show_admin),
    page("/admin/keys", make_key, method="POST", body_bytes_max=limits.console_form_bytes_max),
    page("/admin/keys/revoke", revoke_key, method="POST", body_bytes_max=limits.console_form_bytes_max),
]
