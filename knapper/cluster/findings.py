"""What `knapper doctor` checks, and what it reports."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal

from knapper.cluster.api import Api
from knapper.cluster.kustomize import Object

Verdict = Literal["good", "wrong", "unknown"]


@dataclass(frozen=True)
class Finding:
    """The result of one check. `remedy`: a command, or what to do; empty if good."""

    subject: str
    verdict: Verdict
    seen: str
    remedy: str = ""


@dataclass(frozen=True)
class DoctorTarget:
    """What is checked: the cluster, this version's manifests, and how long a cold start may take."""

    api: Api
    root: Path  # holds knative/
    today: date
    cold_start_s: float = 900.0
    more: Sequence[Callable[[Object], Iterator[Finding]]] = field(default=())  # called with the services' settings
