"""The parts of a gateway, put together out of its settings, and closed at its end."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import httpx

from gateway.body_budget import budget
from gateway.heartbeats import Heartbeats
from gateway.lookups import Records
from gateway.openai.shared import OpenAIState
from gateway.result_reader import ResultReader
from gateway.reward_client import Rewards
from gateway.sample_queue import SampleQueue
from gateway.sample_usage import Meter
from gateway.services import Services
from gateway.train_client import TrainStepClient
from gateway.unfinished_runs import Waits
from gateway.unservable import UnservableModels
from gateway.wakeups import Stirs
from gateway.worker_pool import Workers
from knapper.catalogue.declared_models import Declared
from knapper.events.cloudevents import Claimed
from knapper.events.function_key import FunctionKey
from knapper.ids import RunId
from knapper.jobs import needs
from knapper.jobs.revive import Seen
from knapper.jobs.services import JobServices
from knapper.local.state import presence
from knapper.settings import Settings
from knapper.state.api_keys import Keyring, Keys
from knapper.state.audit import Audit
from knapper.state.checkpoints import Checkpoints
from knapper.state.gc.collector import Collector
from knapper.state.gc.lookups import Retention
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.newest import Manifests
from knapper.state.journal.results import Results
from knapper.state.ledger import Accounts
from knapper.state.signed_links import Links
from knapper.state.tenant_index import Register
from knapper.state.tokens import AccessTokens
from knapper.store import Store

if TYPE_CHECKING:
    from knapper.events.pubsub import Subscription


@asynccontextmanager
async def assembled(
    settings: Settings,
    store: Store,
    place: JobServices | None,
    *,
    clock: Callable[[], float],
    monotonic: Callable[[], float],
    new_id: Callable[[], str],
) -> AsyncIterator[Services]:
    """The parts, with connections that live as long as this is open. `place`: of jobs; without it there are none."""
    manifests = Manifests(store)
    acceptor, results = Acceptor(store, clock, manifests), Results(store, manifests)
    accounts = Accounts(store, clock, monotonic, new_id)
    keep = Retention.of(settings)
    collector = Collector(store, keep, clock, monotonic, partial(needs.of, store), accounts.account)
    records = Records(store, acceptor, monotonic, collector.ask)
    checkpoints = Checkpoints(store, clock)
    meter = Meter(store, clock, new_id)
    audit = Audit(store, clock, new_id)
    url_of, holder_of = partial(_url_of, records, settings.train_step_url), partial(_holder_of, manifests)
    async with AsyncExitStack() as connections:
        workers = Workers()
        connections.callback(workers.close)
        opening = await FunctionKey(store, new_id).headers()
        client = await connections.enter_async_context(_client(opening))
        crowd = await connections.enter_async_context(_crowd(opening))
        refusals = UnservableModels()
        bells = TrainStepClient(
            crowd,
            refusals,
            results,
            url_of,
            holder_of,
            accounts.answered,
            records.forget_run,
            new_id,
            monotonic,
        )
        yield Services(
            store=store,
            acceptor=acceptor,
            results=results,
            looks=ResultReader(results, bells.told, monotonic),
            records=records,
            checkpoints=checkpoints,
            register=Register(store),
            links=Links(store, clock, new_id),
            audit=audit,
            collector=collector,
            bells=bells,
            refusals=refusals,
            samples=SampleQueue(crowd, refusals, new_id, monotonic, meter.count, first=int(clock() * 1e6)),
            meter=meter,
            accounts=accounts,
            rewards=Rewards(client, settings.reward_url),
            budget=budget(),
            workers=workers,
            events_host=settings.events_host,
            place=place,
            subscription=None if place is None else _subscribed(settings.subscription, connections),
            present=partial(presence, settings.run_directory),
            seen_jobs=Seen(),
            job_stalled_s=settings.job_stalled_s,
            heartbeats=Heartbeats(monotonic),
            waits=Waits(monotonic),
            stirs=Stirs(),
            openai=OpenAIState(audit),
            keys=Keyring(Keys(store, clock), monotonic) if settings.keys else None,
            declared=Declared(Path(settings.models), records.catalogue) if settings.models else None,
            tokens=await AccessTokens.open(store, clock, new_id) if settings.jwt else None,
            sample_url=settings.sample_url,
            notice=settings.notice,
            clock=clock,
            new_id=new_id,
        )


def _client(headers: Mapping[str, str]) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(headers=headers, limits=limits, trust_env=False)


def _crowd(headers: Mapping[str, str]) -> aiohttp.ClientSession:
    """For bells and samples: httpx takes longer for each request, and looks at every connection of its pool for it."""
    return aiohttp.ClientSession(
        headers=headers, connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()
    )


def _subscribed(name: str, connections: AsyncExitStack) -> "Subscription | None":
    if not name:
        return None
    from knapper.events import pubsub  # its client takes half a second to import, and few gateways need it

    subscription = pubsub.Subscription(name)
    connections.callback(subscription.close)
    return subscription


async def _url_of(records: Records, everywhere: str, run: RunId) -> str:
    """Where the run's train_step listens: the same for all runs if settings say so, else its base model's."""
    return everywhere or (await records.model((await records.spec_of(run)).base_model)).train_step_url


async def _holder_of(manifests: Manifests, run: RunId) -> Claimed | None:
    newest = await manifests.newest(run)
    return None if newest is None else Claimed(newest[1].epoch, newest[1].holder, newest[1].address)
