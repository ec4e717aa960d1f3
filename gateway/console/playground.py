"""A chat with a checkpoint beside its base, by the same road as /v1/chat/completions."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from gateway.console import home
from gateway.console.pages import Viewer, page, render
from gateway.openai.errors import openai_errors
from gateway.openai.routes import chat_completions
from knapper import limits
from knapper.store import many

_RUNS: Final = limits.console_page_rows_max


async def show(request: Request, viewer: Viewer) -> Response:
    """Suggests base models, and the sampler checkpoints of the newest runs; any other can be named."""
    gateway = viewer.gateway
    models = [model for model in await gateway.lookups.catalogue.models() if model.sampleable]
    runs, _ = await gateway.tenant_index.runs_page(viewer.tenant, _RUNS, home.newest(viewer))
    labels = await many.each(
        runs, lambda run: gateway.checkpoints.labels(viewer.tenant, within=f"{run}/sampler_weights/")
    )
    chosen = request.query_params.get("model", "")[: limits.text_chars_max]
    base = request.query_params.get("base", models[0].name if models else "")[: limits.text_chars_max]
    return render(
        request, viewer, "playground.html", models=[model.name for model in models], chosen=chosen, base=base,
        checkpoints=[str(newest.path) for newest, *_ in filter(None, labels)],
    )  # fmt: skip


async def chat(request: Request, _: Viewer) -> Response:
    return await openai_errors(chat_completions)(request)


ROUTES = [
    page("/playground", show),
    page("/playground/chat", chat, method="POST", body_bytes_max=limits.labels_body_bytes_max),
]
