"""The gateway's entry point: `uvicorn gateway.app:app --lifespan on`, or `create_app` over a given store."""

import asyncio
import gc
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute

from gateway import (
    auth,
    errors,
    futures,
    metrics_page,
    origins,
    periodic,
    periodic_tasks,
    rewards,
    sampling,
    service,
    training,
    uploads,
)
from gateway.anthropic.routes import ROUTES as ANTHROPIC_ROUTES
from gateway.console import html
from gateway.console.routes import ROUTES as CONSOLE_ROUTES
from gateway.events import ROUTES as EVENT_ROUTES
from gateway.job_artifacts import ROUTES as ARTIFACT_ROUTES
from gateway.job_uploads import ROUTES as UPLOAD_ROUTES
from gateway.jobs import ROUTES as JOB_ROUTES
from gateway.lifespan import Sources, open_services
from gateway.openai.capture import CapturePaths
from gateway.openai.routes import ROUTES as OPENAI_ROUTES
from gateway.responses.routes import ROUTES as RESPONSES_ROUTES
from gateway.rest.routes import ROUTES
from gateway.routing import Door
from gateway.tenants import Doorkeeper
from knapper import limits
from knapper.errors import KnapperError
from knapper.exchange.factory import expect_subscribable
from knapper.jobs.services import JobServices, open_job_services
from knapper.observability import logs
from knapper.settings import Settings
from knapper.store import Store
from knapper.store.counted import CountedStore
from knapper.store.factory import open_store

_SMALL, _LABELS, _LARGE = limits.small_body_bytes_max, limits.labels_body_bytes_max, limits.body_bytes_max
# path -> (handler, body limit in bytes)
_POST = {
    "auth/token": (auth.token, _SMALL),
    "client/config": (service.client_config, _SMALL),
    "client/dynamic_config": (service.client_dynamic_config, _SMALL),
    "create_session": (service.create_session, _LABELS),
    "session_heartbeat": (service.session_heartbeat, _SMALL),
    "sessions/{session_id}/finish": (service.finish_session, _LABELS),
    "telemetry": (service.telemetry, _LABELS),
    "create_model": (training.create_model, _SMALL),
    "get_info": (training.get_info, _SMALL),
    "forward": (training.forward, _LARGE),
    "forward_backward": (training.forward_backward, _LARGE),
    "optim_step": (training.optim_step, _SMALL),
    "save_weights": (training.save_weights, _SMALL),
    "save_weights_for_sampler": (training.save_weights_for_sampler, _SMALL),
    "save_weights_external": (training.save_weights_external, _SMALL),
    "load_weights": (training.load_weights, _SMALL),
    "create_custom_loss": (training.create_custom_loss, _SMALL),
    "retrieve_future": (futures.retrieve_future, _SMALL),
    "retrieve_futures": (futures.retrieve_futures, _LABELS),
    "cancel_future": (futures.cancel_future, _SMALL),
    "create_sampling_session": (sampling.create_sampling_session, _SMALL),
    "join_sampling_session": (sampling.join_sampling_session, _SMALL),
    "asample": (sampling.asample, limits.sample_body_bytes_max),
    "rewards": (rewards.score, _LARGE),
}
_GET = {
    "healthz": service.healthz,
    "auth/apikey/me": auth.describe_key,
    "get_server_capabilities": service.get_server_capabilities,
    "samplers/{sampler_id}": sampling.get_sampler,
}


def create_app(
    store: Store,
    settings: Settings,
    *,
    job_services: JobServices | None = None,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    new_id: Callable[[], str] = lambda: secrets.token_hex(16),
) -> Starlette:
    """The gateway over `store`. Without `job_services` it serves no jobs."""
    sources = Sources(clock, monotonic, new_id)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with open_services(settings, store, job_services, sources) as services:
            app.state.services = services
            await periodic_tasks.begin(services)
            prepared = asyncio.create_task(asyncio.to_thread(html.prepare))
            async with periodic.running([*periodic_tasks.tasks(services), *uploads.tasks(services)]):
                yield
            await prepared
            await services.console.watches.close()
            await services.train_client.close()
            await services.sample_queue.close()
            await periodic_tasks.end(services)
            await services.admission.close()

    return Starlette(
        routes=_routes(),
        middleware=[Middleware(CapturePaths), *origins.middleware(settings), Middleware(Doorkeeper)],
        exception_handlers={
            KnapperError: errors.known_error,
            HTTPException: errors.http_error,
            ClientDisconnect: errors.client_disconnected,
            Exception: errors.unknown_error(new_id),
        },
        lifespan=lifespan,
    )


def _routes() -> list[BaseRoute]:
    return [
        *(
            Door(f"/api/v1/{path}", handler, methods=["POST"], body_bytes_max=limit)
            for path, (handler, limit) in _POST.items()
        ),
        *(Door(f"/api/v1/{path}", handler, methods=["GET"], body_bytes_max=0) for path, handler in _GET.items()),
        Door("/api/v1/auth/apikey/me", auth.delete_key, methods=["DELETE"], body_bytes_max=0),
        *ROUTES,
        *JOB_ROUTES,
        *ARTIFACT_ROUTES,
        *UPLOAD_ROUTES,
        *EVENT_ROUTES,
        *ANTHROPIC_ROUTES,
        *RESPONSES_ROUTES,
        *OPENAI_ROUTES,
        *metrics_page.ROUTES,
        *CONSOLE_ROUTES,
    ]


def _from_environment() -> Starlette:
    settings = Settings.load(os.environ)
    logs.begin("gateway", settings)
    settings.expect_keys_beyond_loopback()
    expect_subscribable(settings)
    store = CountedStore(open_store(settings))
    _tune_garbage_collector()
    return create_app(store, settings, job_services=open_job_services(settings, store, time.time))


def _tune_garbage_collector() -> None:
    """Skip what was imported: else every body of many values would make the collector scan it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def __getattr__(name: str) -> Starlette:
    """`app`, built on first access: importing this module reads no environment and opens no store."""
    if name == "app":
        return _from_environment()
    raise AttributeError(name)
