"""What the handlers share: one object a process, built once, found through the request."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from starlette.requests import Request

from gateway.bells import Bells
from gateway.heartbeats import Heartbeats
from gateway.looks import Looks
from gateway.memory import Budget
from gateway.meter import Meter
from gateway.openai.shared import Shared
from gateway.records import Records
from gateway.refusals import Refusals
from gateway.rewarding import Rewards
from gateway.samples import Samples
from gateway.stirs import Stirs
from gateway.waits import Waits
from gateway.workers import Workers
from knapper.accounts import Accounts
from knapper.audit import Audit
from knapper.checkpoints import Checkpoints
from knapper.collect.collector import Collector
from knapper.jobs.place import Place
from knapper.jobs.revive import Seen
from knapper.journal.accept import Acceptor
from knapper.journal.results import Results
from knapper.keys import Keyring
from knapper.links import Links
from knapper.models.declared import Declared
from knapper.register import Register
from knapper.store import Store
from knapper.tokens import Tokens

if TYPE_CHECKING:
    from knapper.pubsub import Subscription


@dataclass(frozen=True)
class Parts:
    store: Store
    acceptor: Acceptor
    results: Results
    looks: Looks
    records: Records
    checkpoints: Checkpoints
    register: Register
    links: Links
    audit: Audit
    collector: Collector
    bells: Bells
    refusals: Refusals
    samples: Samples
    meter: Meter
    accounts: Accounts
    rewards: Rewards
    budget: Budget  # the memory for bodies in flight
    workers: Workers
    events_host: str  # the name under which events come; empty: this machine's own
    place: Place | None  # of jobs; None: there is nowhere to put their files
    subscription: "Subscription | None"  # tells of uploads; None: the inbox is looked into
    seen_jobs: Seen  # how far jobs were at the last tick
    job_quiet_s: float
    heartbeats: Heartbeats
    waits: Waits
    stirs: Stirs
    openai: Shared
    keys: Keyring | None  # None: they are off, and everyone is the tenant `local`
    declared: Declared | None  # None: whoever serves models publishes them, as `knapper up` does
    tokens: Tokens | None  # None: keys are sent as they are
    sample_url: str  # where all samples go, or empty: each model's record says
    notice: str  # the operator's, for every client that starts
    clock: Callable[[], float]  # seconds since the epoch
    new_id: Callable[[], str]  # 32 random hexadecimal digits


def parts(request: Request) -> Parts:
    return cast(Parts, request.app.state.parts)
