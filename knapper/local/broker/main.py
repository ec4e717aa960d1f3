"""The process: `uvicorn knapper.local.broker.main:app`. Its port takes events; beside it, the inbox is watched."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from knapper import limits
from knapper.errors import KnapperError, TooLarge, Unauthorized, Unavailable, UserError
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.events.function_key import FunctionKey
from knapper.local.broker.broker import LocalBroker
from knapper.local.broker.delivery import Letter
from knapper.local.broker.fault_injection import FaultInjection
from knapper.local.broker.subscribers import Subscribers
from knapper.local.broker.watcher import Watcher
from knapper.observability import logs
from knapper.settings import Settings
from knapper.store.factory import open_store
from knapper.web import requests

log = structlog.get_logger()


async def post(request: Request) -> Response:
    """202 once the event is accepted; like Knative's, the producer does not learn about its delivery.

    Events must be signed by this deployment, except storage events, which only the gateway receives and does not trust.
    """
    broker: LocalBroker = request.app.state.broker
    key: FunctionKey = request.app.state.key
    try:
        body = await requests.body(request, limits.event_bytes_max)
        letter = Letter(*cloudevents.as_binary(request.headers, body))
        if letter.attributes.get("type") != cloudevents.OBJECT_FINALIZED and not await key.is_signed(
            request.headers, body
        ):
            raise Unauthorized("the event has no signature of this deployment; all but storage events need one")
        await broker.post(letter)
    except (TooLarge, Unauthorized) as error:
        return _refused(error.status, error)
    except Unavailable as error:
        return _refused(503, error)
    except UserError as error:
        return _refused(400, error)
    return Response(status_code=202)


async def state(request: Request) -> Response:
    return JSONResponse({"under_way": request.app.state.broker.under_way})


def create_app(settings: Settings) -> Starlette:
    """The broker of the functions and the gateway, and the watcher of the inbox."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as client:
            store = open_store(settings)
            app.state.key = FunctionKey(store)
            subscribers = Subscribers(
                store, {"reward": settings.reward_url, "gateway": f"{settings.gateway_url}/events"}
            )
            faults = FaultInjection(int(settings.fault_injection_seed)) if settings.fault_injection_seed else None
            broker = app.state.broker = LocalBroker(
                client, subscribers.url_of, f"{settings.gateway_url}/events/dead", faults
            )

            async def tell(event: Event) -> None:
                await broker.post(Letter(*cloudevents.as_binary(*event.encode())))

            stop = asyncio.Event()
            watch_task = None
            if not settings.exchange:  # a bucket sends events of its own
                watch_task = asyncio.create_task(Watcher(settings.data, tell).watch(stop))
                watch_task.add_done_callback(_log_defect)
            yield
            stop.set()
            if watch_task is not None:
                await asyncio.wait([watch_task])
            await broker.close()

    return Starlette(routes=[Route("/", post, methods=["POST"]), Route("/", state, methods=["GET"])], lifespan=lifespan)


def _log_defect(watch_task: asyncio.Task[None]) -> None:
    if not watch_task.cancelled() and (defect := watch_task.exception()) is not None:
        log.error("watcher: defect", exc_info=defect)


def _refused(status: int, error: KnapperError) -> Response:
    return JSONResponse(error.as_json(), status_code=status)


def __getattr__(name: str) -> Starlette:
    """`app`, built when uvicorn asks for it."""
    if name == "app":
        settings = Settings.load(os.environ)
        logs.configure("broker", settings.log_level)
        return create_app(settings)
    raise AttributeError(name)
