"""Builds the gateway's services from its settings, and closes them when the gateway stops."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import httpx

from gateway.admission import Admission, Readers
from gateway.body_budget import budget
from gateway.console.state import Console
from gateway.diagnostics.monitor import Monitor
from gateway.heartbeats import Heartbeats
from gateway.lookups import Lookups
from gateway.openai.state import OpenAIState
from gateway.peers import Peers
from gateway.result_reader import ResultReader
from gateway.rewards import RewardClient
from gateway.sample_queue import SampleQueue
from gateway.sample_usage import SampleUsage
from gateway.services import Services, Wakeups
from gateway.tenant_load import TenantLoad
from gateway.train_client import TrainStepClient
from gateway.unfinished_runs import UnfinishedRuns
from gateway.unservable import UnservableModels
from gateway.worker_pool import WorkerPool
from knapper.catalogue.declared_models import Declared
from knapper.events.cloudevents import Claimed
from knapper.events.function_key import FunctionKey
from knapper.ids import RunId
from knapper.jobs import needs
from knapper.jobs.quota_file import QuotaFile
from knapper.jobs.revive import Seen
from knapper.jobs.services import JobServices
from knapper.local.state import presence, presence_at
from knapper.settings import Settings
from knapper.state import damage
from knapper.state.api_keys import Keyring, Keys
from knapper.state.audit import Audit
from knapper.state.captures import Captures
from knapper.state.checkpoints import Checkpoints
from knapper.state.daily_tokens import DailyTokens
from knapper.state.gateways import Gateways
from knapper.state.gc.collector import Collector
from knapper.state.gc.lookups import Retention
from knapper.state.holds import Holds
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.newest import Manifests
from knapper.state.journal.records import Commit
from knapper.state.journal.results import Results
from knapper.state.ledger import Accounts
from knapper.state.open_runs import OpenRuns
from knapper.state.prices import Prices
from knapper.state.quotas import QuotaBook
from knapper.state.signed_links import Links
from knapper.state.tenant_index import Register
from knapper.state.tokens import AccessTokens
from knapper.store import Store

if TYPE_CHECKING:
    from knapper.events.pubsub import Subscription


@dataclass(frozen=True)
class Sources:
    """Where time and randomness come from. Tests hand in their own."""

    clock: Callable[[], float]  # seconds since the epoch
    monotonic: Callable[[], float]  # seconds
    new_id: Callable[[], str]  # 32 random hexadecimal digits


@dataclass(frozen=True)
class _State:
    """The readers and writers of the store; none of them holds a connection."""

    store: Store
    manifests: Manifests
    acceptor: Acceptor
    results: Results
    accounts: Accounts
    collector: Collector
    lookups: Lookups


@dataclass(frozen=True)
class _Clients:
    """The clients of the three functions, and the key that opens these."""

    key: FunctionKey
    unservable_models: UnservableModels
    train: TrainStepClient
    samples: SampleQueue
    peers: Peers
    rewards: RewardClient


@asynccontextmanager
async def open_services(
    settings: Settings, store: Store, job_services: JobServices | None, sources: Sources
) -> AsyncIterator[Services]:
    """The services, whose connections stay open as long as this context. `job_services`: None serves no jobs."""
    clock, monotonic, new_id = sources.clock, sources.monotonic, sources.new_id
    wakeups, gateway = Wakeups(), new_id()
    state = _state(settings, store, sources, wakeups, gateway)
    audit, sample_usage = Audit(store, clock, new_id), SampleUsage(store, clock, new_id)
    async with AsyncExitStack() as stack:
        worker_pool = WorkerPool()
        stack.callback(worker_pool.close)
        monitor = Monitor(store, state.lookups, clock, monotonic, new_id)
        clients = await _clients(settings, state, sample_usage, monitor, sources, gateway, stack)
        watching = asyncio.create_task(monitor.work())
        stack.callback(watching.cancel)
        yield Services(
            store=store,
            acceptor=state.acceptor,
            results=state.results,
            result_reader=ResultReader(state.results, clients.train.expects_commits, monotonic),
            lookups=state.lookups,
            checkpoints=Checkpoints(store, clock),
            tenant_index=Register(store),
            signed_links=Links(store, clock, new_id),
            captures=Captures(store, clock, new_id),
            audit=audit,
            collector=state.collector,
            train_client=clients.train,
            unservable_models=clients.unservable_models,
            sample_queue=clients.samples,
            peers=clients.peers,
            sample_usage=sample_usage,
            monitor=monitor,
            accounts=state.accounts,
            admission=_admission(store, state, clients.samples.load, sample_usage, sources, gateway),
            quota_file=QuotaFile(Path(settings.quotas), QuotaBook(store, monotonic)) if settings.quotas else None,
            prices=Prices.of(settings),
            reward_client=clients.rewards,
            function_key=clients.key,
            body_budget=budget(),
            worker_pool=worker_pool,
            events_host=settings.events_host,
            job_services=job_services,
            subscription=None if job_services is None else _subscription(settings.subscription, stack),
            presence=partial(presence, settings.run_directory),
            seen_jobs=Seen(broker_began=bool(settings.gateway_url)),
            job_stalled_s=settings.job_stalled_s,
            heartbeats=Heartbeats(monotonic),
            unfinished_runs=UnfinishedRuns(monotonic),
            wakeups=wakeups,
            openai=OpenAIState(audit),
            console=Console.open(store, settings.admin, clock, monotonic, new_id),
            keys=Keyring(Keys(store, clock), monotonic) if settings.keys else None,
            declared_models=Declared(Path(settings.models), state.lookups.catalogue) if settings.models else None,
            access_tokens=await AccessTokens.open(store, clock, new_id) if settings.jwt else None,
            sample_url=settings.sample_url,
            notice=settings.notice,
            clock=clock,
            new_id=new_id,
        )


def _state(settings: Settings, store: Store, sources: Sources, wakeups: Wakeups, gateway: str) -> _State:
    clock, monotonic = sources.clock, sources.monotonic
    manifests = Manifests(store)
    acceptor = Acceptor(store, clock, manifests)
    accounts = Accounts(store, clock, monotonic, sources.new_id)
    retention = Retention.of(settings)
    collector = Collector(store, retention, clock, monotonic, partial(needs.of, store), accounts.account, gateway)
    lookups = Lookups(store, acceptor, monotonic, collector.touch_sampler, wakeups.store.set)
    return _State(store, manifests, acceptor, Results(store, manifests), accounts, collector, lookups)


def _admission(
    store: Store, state: _State, load: TenantLoad, counted: SampleUsage, sources: Sources, gateway: str
) -> Admission:
    readers = Readers(
        QuotaBook(store, sources.monotonic),
        DailyTokens.over(store, state.accounts, sources.clock),
        OpenRuns(store, sources.clock),
        Checkpoints(store, sources.clock),
        state.acceptor,
    )
    return Admission(readers, Holds(store, gateway, sources.clock), load, counted, sources.monotonic)


async def _clients(
    settings: Settings,
    state: _State,
    sample_usage: SampleUsage,
    monitor: Monitor,
    sources: Sources,
    gateway: str,
    stack: AsyncExitStack,
) -> _Clients:
    key = FunctionKey(state.store, sources.new_id)
    try:
        await key.headers()  # made now if there is none
    except damage.ERRORS as error:  # this gateway starts all the same: whoever needs a function is told
        damage.report(error)
    http = await stack.enter_async_context(_http_client(key))
    session = await stack.enter_async_context(_http_session(key))
    unservable_models = UnservableModels()

    def note_committed(run: RunId, n: int, commit: Commit) -> None:
        state.accounts.note_committed(run, n, commit)
        monitor.note_committed(run, commit)

    train = TrainStepClient(
        session,
        unservable_models,
        state.results,
        url_of=partial(_train_step_url, state.lookups, settings.train_step_url),
        holder_of=partial(_holder_of, state.manifests),
        on_commit=note_committed,
        on_missing_run=state.lookups.forget_run,
        new_id=sources.new_id,
        now=sources.monotonic,
    )
    first = int(sources.clock() * 1e6)
    samples = SampleQueue(
        session,
        unservable_models,
        lambda: f"{gateway}-{sources.new_id()}",  # any gateway sees in a request's id who keeps the sample
        sources.monotonic,
        sample_usage.count,
        first,
        on_drawn=monitor.note_sample,
        presence=partial(presence_at, settings.run_directory),
    )
    gateways = Gateways(state.store, gateway, settings.address, sources.clock, sources.monotonic)
    peers = Peers(await stack.enter_async_context(_plain_http_session()), gateways, sources.monotonic)
    return _Clients(key, unservable_models, train, samples, peers, RewardClient(http, settings.reward_url))


class _KeyAuth(httpx.Auth):
    """Sends the key of the functions. Raises Corrupt in place of a request while it cannot be read."""

    def __init__(self, key: FunctionKey) -> None:
        self._key = key

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        request.headers.update(await self._key.headers())
        yield request


def _http_client(key: FunctionKey) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(auth=_KeyAuth(key), limits=limits, trust_env=False)


def _http_session(key: FunctionKey) -> aiohttp.ClientSession:
    """For doorbells and samples: httpx is slower per request, and scans every connection of its pool for each."""

    async def send(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        request.headers.update(await key.headers())
        return await handler(request)

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar(), middlewares=(send,)
    )


def _plain_http_session() -> aiohttp.ClientSession:
    """For requests to other gateways, which get the credentials of the client and none of ours."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar())


def _subscription(name: str, stack: AsyncExitStack) -> "Subscription | None":
    if not name:
        return None
    from knapper.events import pubsub  # its client takes half a second to import, and few gateways need it

    subscription = pubsub.Subscription(name)
    stack.callback(subscription.close)
    return subscription


async def _train_step_url(lookups: Lookups, url_for_all: str, run: RunId) -> str:
    """The URL of the run's train_step: `url_for_all` if set, else the one in its base model's record."""
    return url_for_all or (await lookups.model((await lookups.spec_of(run)).base_model)).train_step_url


async def _holder_of(manifests: Manifests, run: RunId) -> Claimed | None:
    newest = await manifests.newest(run)
    return None if newest is None else Claimed(newest[1].epoch, newest[1].holder, newest[1].address)
