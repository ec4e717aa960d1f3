"""What the handlers share: one object a process, built once, found through the request."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from starlette.requests import Request

from gateway.body_budget import Budget
from gateway.heartbeats import Heartbeats
from gateway.lookups import Records
from gateway.openai.shared import OpenAIState
from gateway.result_reader import ResultReader
from gateway.reward_client import Rewards
from gateway.sample_queue import SampleQueue
from gateway.sample_usage import Meter
from gateway.train_client import TrainStepClient
from gateway.unfinished_runs import Waits
from gateway.unservable import UnservableModels
from gateway.wakeups import Stirs
from gateway.worker_pool import Workers
from knapper.catalogue.declared_models import Declared
from knapper.jobs.presence import Present
from knapper.jobs.revive import Seen
from knapper.jobs.services import JobServices
from knapper.state.api_keys import Keyring
from knapper.state.audit import Audit
from knapper.state.checkpoints import Checkpoints
from knapper.state.gc.collector import Collector
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.results import Results
from knapper.state.ledger import Accounts
from knapper.state.signed_links import Links
from knapper.state.tenant_index import Register
from knapper.state.tokens import AccessTokens
from knapper.store import Store

if TYPE_CHECKING:
    from knapper.events.pubsub import Subscription


@dataclass(frozen=True)
class Services:
    store: Store
    acceptor: Acceptor
    results: Results
    looks: ResultReader
    records: Records
    checkpoints: Checkpoints
    register: Register
    links: Links
    audit: Audit
    collector: Collector
    bells: TrainStepClient
    refusals: UnservableModels
    samples: SampleQueue
    meter: Meter
    accounts: Accounts
    rewards: Rewards
    budget: Budget  # the memory for bodies in flight
    workers: Workers
    events_host: str  # the name under which events come; empty: this machine's own
    place: JobServices | None  # of jobs; None: there is nowhere to put their files
    subscription: "Subscription | None"  # tells of uploads; None: the inbox is looked into
    present: Present  # whether the functions' processes run, where that can be known
    seen_jobs: Seen  # how far jobs were at the last tick
    job_stalled_s: float
    heartbeats: Heartbeats
    waits: Waits
    stirs: Stirs
    openai: OpenAIState
    keys: Keyring | None  # None: they are off, and everyone is the tenant `local`
    declared: Declared | None  # None: whoever serves models publishes them, as `knapper up` does
    tokens: AccessTokens | None  # None: keys are sent as they are
    sample_url: str  # where all samples go, or empty: each model's record says
    notice: str  # the operator's, for every client that starts
    clock: Callable[[], float]  # seconds since the epoch
    new_id: Callable[[], str]  # 32 random hexadecimal digits


def parts(request: Request) -> Services:
    return cast(Services, request.app.state.parts)
