"""The gateway's entry: `uvicorn gateway.main:app --lifespan on`, or `create_app` for a store of one's own."""

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import httpx
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Route

from gateway import auth, clockwork, errors, futures, observing, rewards, sampling, service, training, uploads
from gateway.bells import Bells
from gateway.events import ROUTES as EVENT_ROUTES
from gateway.heartbeats import Heartbeats
from gateway.jobs import ROUTES as JOB_ROUTES
from gateway.looks import Looks
from gateway.meter import Meter
from gateway.openai.routes import ROUTES as OPENAI_ROUTES
from gateway.openai.shared import Shared
from gateway.parts import Parts
from gateway.records import Records
from gateway.rest.routes import ROUTES
from gateway.rewarding import Rewards
from gateway.samples import Samples
from gateway.tenants import Doorkeeper
from knapper import metrics, telemetry
from knapper.audit import Audit
from knapper.checkpoints import Checkpoints
from knapper.errors import KnapperError
from knapper.events import Claimed
from knapper.ids import RunId
from knapper.jobs.place import Place, open_place
from knapper.jobs.revive import Seen
from knapper.journal.accept import Acceptor, newest_manifest
from knapper.journal.results import Results
from knapper.keys import Keyring, Keys
from knapper.links import Links
from knapper.models.declared import Declared
from knapper.orphans import Orphans
from knapper.register import Register
from knapper.settings import Settings
from knapper.store import Store
from knapper.store.opening import open_store
from knapper.tokens import Tokens

log = structlog.get_logger()

_POST = {
    "auth/token": auth.token,
    "client/config": service.client_config,
    "client/dynamic_config": service.client_dynamic_config,
    "create_session": service.create_session,
    "session_heartbeat": service.session_heartbeat,
    "sessions/{session_id}/finish": service.finish_session,
    "telemetry": service.telemetry,
    "create_model": training.create_model,
    "get_info": training.get_info,
    "forward": training.forward,
    "forward_backward": training.forward_backward,
    "optim_step": training.optim_step,
    "save_weights": training.save_weights,
    "save_weights_for_sampler": training.save_weights_for_sampler,
    "save_weights_external": training.save_weights_external,
    "load_weights": training.load_weights,
    "create_custom_loss": training.create_custom_loss,
    "retrieve_future": futures.retrieve_future,
    "retrieve_futures": futures.retrieve_futures,
    "cancel_future": futures.cancel_future,
    "create_sampling_session": sampling.create_sampling_session,
    "join_sampling_session": sampling.join_sampling_session,
    "asample": sampling.asample,
    "rewards": rewards.score,
}
_GET = {
    "healthz": service.healthz,
    "auth/apikey/me": auth.describe_key,
    "get_server_capabilities": service.get_server_capabilities,
    "samplers/{sampler_id}": sampling.get_sampler,
}


def create_app(
    store: Store,
    *,
    train_step_url: str = "",
    sample_url: str = "",
    reward_url: str = "",
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    keys: bool = False,
    jwt: bool = False,
    notice: str = "",
    models: str = "",
    place: Place | None = None,
    subscription: str = "",
    job_quiet_s: float = 60.0,
    events_host: str = "",
    new_id: Callable[[], str] = lambda: secrets.token_hex(16),
) -> Starlette:
    """The gateway over `store`. An empty URL means: where the base model's catalogue record says.

    `keys`: only who has a key made by `knapper key create` is answered, as the key's tenant; else all are `local`.
    `jwt`: clients are told to exchange their keys for tokens.
    `notice`: what each prints when it starts.
    `models`: a directory that declares which models are served; they are published before anything is answered.
    `place`: of jobs; without it there are none. One that has not moved for `job_quiet_s` is rung for again.
    `subscription`: where a bucket tells of uploads; without one, the inbox is looked into now and then.
    `events_host`: the name under which only this cluster's own services reach us; events are taken there.
    """
    acceptor, results = Acceptor(store, clock), Results(store)
    records = Records(store, acceptor, monotonic)
    checkpoints = Checkpoints(store, clock)
    meter = Meter(store, clock, new_id)
    audit = Audit(store, clock, new_id)

    async def url_of(run: RunId) -> str:
        return train_step_url or (await records.model((await records.spec_of(run)).base_model)).train_step_url

    async def holder_of(run: RunId) -> Claimed | None:
        newest = await newest_manifest(store, run)
        return None if newest is None else Claimed(newest[1].epoch, newest[1].holder, newest[1].address)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with (
            httpx.AsyncClient(limits=limits, trust_env=False, follow_redirects=True) as client,
            # Samples come in crowds: httpx's pool looks at each connection for each of them, aiohttp's does not.
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
            ) as crowd,
        ):
            parts = app.state.parts = Parts(
                store=store,
                acceptor=acceptor,
                results=results,
                looks=Looks(results, monotonic),
                records=records,
                checkpoints=checkpoints,
                register=Register(store),
                links=Links(store, clock, new_id),
                audit=audit,
                orphans=Orphans(store, checkpoints, records.sessions, clock, monotonic),
                bells=Bells(client, results, url_of, holder_of, new_id, monotonic),
                samples=Samples(crowd, new_id, monotonic, meter.count, first=int(clock() * 1e6)),
                meter=meter,
                rewards=Rewards(client, reward_url),
                events_host=events_host,
                place=place,
                seen_jobs=Seen(),
                job_quiet_s=job_quiet_s,
                heartbeats=Heartbeats(monotonic),
                openai=Shared(audit),
                keys=Keyring(Keys(store, clock), monotonic) if keys else None,
                declared=Declared(Path(models), records.catalogue) if models else None,
                tokens=await Tokens.open(store, clock, new_id) if jwt else None,
                sample_url=sample_url,
                notice=notice,
                clock=clock,
                new_id=new_id,
            )
            await clockwork.begin(parts)
            ticking = asyncio.gather(clockwork.run(parts), *_uploads(parts, subscription))
            ticking.add_done_callback(_heard)
            yield
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            await parts.bells.close()
            await parts.samples.close()
            await clockwork.end(parts)

    return Starlette(
        routes=_routes(),
        middleware=[Middleware(Doorkeeper)],
        exception_handlers={
            KnapperError: errors.known,
            HTTPException: errors.http,
            ClientDisconnect: errors.disconnected,
            Exception: errors.unknown(new_id),
        },
        lifespan=lifespan,
    )


def _uploads(gateway: Parts, subscription: str) -> list[Coroutine[Any, Any, NoReturn]]:
    """What waits for uploads. A directory is watched by the broker's process; what it lost is found here."""
    if gateway.place is None:
        return []
    return [uploads.pulled(gateway, subscription) if subscription else uploads.looked_for(gateway)]


def _heard(ticking: "asyncio.Future[Any]") -> None:
    """None of it ends by itself: whatever did is a defect, and nobody waits for it until the gateway stops.

    A gather that is cancelled ends with its children's CancelledError as an exception like others."""
    defect = asyncio.CancelledError() if ticking.cancelled() else ticking.exception()
    if defect is not None and not isinstance(defect, asyncio.CancelledError):
        log.error("clockwork: defect", exc_info=defect)


def _routes() -> list[BaseRoute]:
    return [
        *(Route(f"/api/v1/{path}", handler, methods=["POST"]) for path, handler in _POST.items()),
        *(Route(f"/api/v1/{path}", handler, methods=["GET"]) for path, handler in _GET.items()),
        Route("/api/v1/auth/apikey/me", auth.delete_key, methods=["DELETE"]),
        *ROUTES,
        *JOB_ROUTES,
        *EVENT_ROUTES,
        *OPENAI_ROUTES,
        *observing.ROUTES,
    ]


def _from_environment() -> Starlette:
    settings = Settings.load(os.environ)
    telemetry.begin("gateway", settings)
    settings.expect_keys_beyond_loopback()
    store = metrics.CountedStore(open_store(settings))
    return create_app(
        store,
        train_step_url=settings.train_step_url,
        sample_url=settings.sample_url,
        reward_url=settings.reward_url,
        keys=settings.keys,
        jwt=settings.jwt,
        notice=settings.notice,
        models=settings.models,
        place=open_place(settings, store, time.time),
        subscription=settings.subscription,
        job_quiet_s=settings.job_quiet_s,
        events_host=settings.events_host,
    )


def __getattr__(name: str) -> Starlette:
    """`app`, built when uvicorn asks for it: importing this module reads no environment and opens no store."""
    if name == "app":
        return _from_environment()
    raise AttributeError(name)
