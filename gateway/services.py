"""The services that handlers share: built once per process, reached through the request."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from starlette.requests import Request

from gateway.admission import Admission
from gateway.body_budget import Budget
from gateway.console.state import Console
from gateway.diagnostics.monitor import Monitor
from gateway.heartbeats import Heartbeats
from gateway.lookups import Lookups
from gateway.openai.state import OpenAIState
from gateway.peers import Peers
from gateway.result_reader import ResultReader
from gateway.sample_queue import SampleQueue
from gateway.sample_usage import SampleUsage
from gateway.train_client import TrainStepClient
from gateway.unfinished_runs import UnfinishedRuns
from gateway.unservable import UnservableModels
from gateway.worker_pool import WorkerPool
from knapper.catalogue.declared_models import Declared
from knapper.events.function_key import FunctionKey
from knapper.jobs.presence import Present
from knapper.jobs.quota_file import QuotaFile
from knapper.jobs.revive import Seen
from knapper.jobs.services import JobServices
from knapper.state.api_keys import Keyring
from knapper.state.audit import Audit
from knapper.state.captures import Captures
from knapper.state.checkpoints import Checkpoints
from knapper.state.gc.collector import Collector
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.results import Results
from knapper.state.ledger import Accounts
from knapper.state.prices import Prices
from knapper.state.signed_links import Links
from knapper.state.tenant_index import Register
from knapper.state.tokens import AccessTokens
from knapper.store import Store

if TYPE_CHECKING:
    from gateway.rewards import RewardClient
    from knapper.events.pubsub import Subscription


@dataclass(frozen=True)
class Wakeups:
    """Set an event to run an idle periodic task soon. They save time only: each task also runs without them.

    `jobs`: a job started, resumed or waits for files. `inbox`: an upload arrived. `collect`: there may be garbage.
    `accounts`: a run has usage that no ledger entry covers. `store`: a model is missing.
    """

    jobs: asyncio.Event = field(default_factory=asyncio.Event)
    collect: asyncio.Event = field(default_factory=asyncio.Event)
    accounts: asyncio.Event = field(default_factory=asyncio.Event)
    inbox: asyncio.Event = field(default_factory=asyncio.Event)
    store: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Services:
    store: Store
    acceptor: Acceptor
    results: Results
    result_reader: ResultReader
    lookups: Lookups
    checkpoints: Checkpoints
    tenant_index: Register
    signed_links: Links
    captures: Captures
    audit: Audit
    collector: Collector
    train_client: TrainStepClient
    unservable_models: UnservableModels
    sample_queue: SampleQueue
    peers: Peers  # the other gateways over this store
    sample_usage: SampleUsage
    monitor: Monitor
    accounts: Accounts
    admission: Admission
    quota_file: QuotaFile | None  # None: quotas are set by commands alone
    prices: Prices
    reward_client: "RewardClient"
    function_key: FunctionKey  # opens the functions to this deployment
    body_budget: Budget  # memory for request bodies
    worker_pool: WorkerPool
    events_host: str  # the host name that events are sent to; empty: this machine
    job_services: JobServices | None  # None: this gateway has no exchange for the files of jobs
    subscription: "Subscription | None"  # notifications of uploads; None: the inbox is listed instead
    presence: Present  # whether the functions' processes run, where that is known
    seen_jobs: Seen  # the progress of jobs at the last check
    job_stalled_s: float
    heartbeats: Heartbeats
    unfinished_runs: UnfinishedRuns
    wakeups: Wakeups
    openai: OpenAIState
    console: Console
    keys: Keyring | None  # None: keys are off, and every client is the tenant `local`
    declared_models: Declared | None  # None: another process publishes the served models, as `knapper up` does
    access_tokens: AccessTokens | None  # None: clients send their keys, not tokens
    sample_url: str  # the sample function for all models; empty: each model's record names its own
    notice: str  # the operator's message, shown to each client when it starts
    clock: Callable[[], float]  # seconds since the epoch
    new_id: Callable[[], str]  # 32 random hexadecimal digits


def services_of(request: Request) -> Services:
    return cast(Services, request.app.state.services)
