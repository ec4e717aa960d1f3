"""Names of jobs and of their starts; `knapper.state.layout` maps them to keys.

A round is a step (its rollouts, their scores, trained) or the evaluation of a version of the adapter.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from knapper import ids
from knapper.errors import InvalidField
from knapper.ids import RunId, SessionId, Tenant
from knapper.state import layout
from knapper.state.layout import ObjectKind

_CHOSEN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_JOB = re.compile(rf"{_CHOSEN.pattern}(\.[1-9][0-9]{{0,3}})?")  # with the number of a sweep's trial
_START = re.compile(r"[0-9a-f]{16}")
_ARTIFACT = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]{0,127}/){0,2}[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_CHOSEN_ALLOWED = "1 to 63 small letters, digits and '-', the first a letter or digit"

JOB_YAML, JOB_ERROR = "job.yaml", "job.error.json"
Round = Literal["steps", "evaluations"]
FINAL = "final"  # the checkpoint of a job that is completed
STEP = "step-"  # checkpoints of versions while the job needs them


def step_name(version: int) -> str:
    """The checkpoint name of a version while the job needs it."""
    return f"{STEP}{version}"


def job(value: str) -> str:
    """The name of any job, checked. Raises InvalidField."""
    if not _JOB.fullmatch(value):
        raise InvalidField("job", value, f"{_CHOSEN_ALLOWED}; of a sweep's trial, '.' and its number after them")
    return value


def chosen(value: str) -> str:
    """A name that people give to a job, checked. Raises InvalidField."""
    if not _CHOSEN.fullmatch(value):
        raise InvalidField("job", value, _CHOSEN_ALLOWED)
    return value


def trial(sweep: str, n: int) -> str:
    """The job of a sweep's trial, from 1: a name that nobody else can choose."""
    return f"{sweep}.{n}"


def sweep_of(name: str) -> str:
    """The sweep whose trial has this name; empty for any other job."""
    return name.rpartition(".")[0]


def file(value: str) -> str:
    """The name of a file beside job.yaml, checked. Raises InvalidField."""
    if not _FILE.fullmatch(value):
        allowed = "1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit"
        raise InvalidField("file", value, allowed, "Put it beside job.yaml, without '/'")
    return value


def is_artifact(name: str) -> bool:
    """Whether a job can publish a file under this name; no such name leaves the job's folder."""
    return _ARTIFACT.fullmatch(name) is not None


def sha256(value: str) -> str:
    """64 hexadecimal digits, checked. Raises InvalidField."""
    if not _SHA256.fullmatch(value):
        raise InvalidField("sha256", value, "64 small hexadecimal digits")
    return value


@dataclass(frozen=True)
class Start:
    """One start of a job: other content of job.yaml, or of a file that it names, makes another start."""

    tenant: Tenant
    job: str
    id: str

    @staticmethod
    def of(tenant: Tenant, job: str, content: str) -> "Start":
        """`content`: a digest of everything that the start depends on."""
        content_name = f"{layout.inbox(tenant, job)}{JOB_YAML}#{content}"
        return Start(tenant, job, hashlib.sha256(content_name.encode()).hexdigest()[:16])

    @staticmethod
    def parse(subject: str) -> "Start":
        """Parse an event's subject. Raises InvalidField."""
        parts = subject.split("/")
        if len(parts) != 3 or not _START.fullmatch(parts[2]):
            raise InvalidField("subject", subject, "<tenant>/<job>/<start>")
        return Start(ids.tenant(parts[0]), job(parts[1]), parts[2])

    def __str__(self) -> str:
        return f"{self.tenant}/{self.job}/{self.id}"

    @property
    def _fields(self) -> tuple[str, str, str]:
        return self.tenant, self.job, self.id

    @property
    def prefix(self) -> str:
        """The prefix of all its records except its indexes."""
        return f"{ObjectKind.JOB_STARTED.under(self.tenant, self.job)}{self.id}/"

    @property
    def started(self) -> str:
        return ObjectKind.JOB_STARTED.key(*self._fields)

    @property
    def listed(self) -> str:
        """Exists once the start is in the tenant's lists."""
        return ObjectKind.JOB_LISTED.key(*self._fields)

    @property
    def working(self) -> str:
        """Exists while the start has open work."""
        return ObjectKind.JOB_WORKING.key(*self._fields)

    @property
    def expected(self) -> str:
        """Exists while the start waits for files."""
        return ObjectKind.JOB_EXPECTED.key(*self._fields)

    @property
    def waiting(self) -> str:
        return ObjectKind.JOB_WAITING.key(*self._fields)

    @property
    def repetitions(self) -> str:
        """Marks that the same content is started once more, under another id."""
        return ObjectKind.JOB_AGAIN.under(*self._fields)

    @property
    def controls(self) -> str:
        """Cancelled, resumed, failed, completed: the highest number wins."""
        return ObjectKind.JOB_CONTROL.under(*self._fields)

    @property
    def refusals(self) -> str:
        return ObjectKind.JOB_REFUSAL.under(*self._fields)

    @property
    def trials(self) -> str:
        """The prefix of a sweep's trials."""
        return ObjectKind.JOB_TRIAL.under(*self._fields)

    def trial(self, n: int) -> "Start":
        """The start of a sweep's trial, from 1: a function of this one."""
        return Start.of(self.tenant, trial(self.job, n), f"trial of {self.id}")

    def tried(self, n: int) -> str:
        """The values of a trial, from 1."""
        return ObjectKind.JOB_TRIAL.key(*self._fields, n)

    def trial_ended(self, n: int) -> str:
        return ObjectKind.JOB_TRIAL_ENDED.key(*self._fields, n)

    def taken(self, function: str) -> str:
        """When a process of the function began to work on it."""
        return ObjectKind.JOB_TAKEN.under(*self._fields, function)

    def content(self, sha256: str) -> str:
        """A file's content when the job started."""
        return ObjectKind.JOB_FILE.key(*self._fields, sha256)

    def rounds(self, kind: Round) -> str:
        return ObjectKind.JOB_TRAINED.under(*self._fields, kind)

    def rollouts(self, kind: Round, n: int, part: int) -> str:
        return ObjectKind.JOB_ROLLOUTS.key(*self._fields, kind, n, part)

    def scores(self, kind: Round, n: int, part: int) -> str:
        return ObjectKind.JOB_SCORES.key(*self._fields, kind, n, part)

    def turn(self, kind: Round, n: int, part: int, turn: int) -> str:
        """What the rollouts of one prompt sampled in one turn, from 0."""
        return ObjectKind.JOB_TURN.key(*self._fields, kind, n, part, turn)

    def answered(self, kind: Round, n: int, part: int, turn: int) -> str:
        """What their environments said before that turn."""
        return ObjectKind.JOB_ANSWERED.key(*self._fields, kind, n, part, turn)

    def trained(self, step: int) -> str:
        return ObjectKind.JOB_TRAINED.key(*self._fields, "steps", step)

    def evaluated(self, version: int) -> str:
        return ObjectKind.JOB_EVALUATED.key(*self._fields, "evaluations", version)

    @property
    def session(self) -> SessionId:
        """A session like a client's, so that the job's run and checkpoints are like any others."""
        return SessionId(f"ses-{hashlib.sha256(f'job:{self}'.encode()).hexdigest()[:32]}")

    @property
    def run(self) -> RunId:
        return ids.make_run_id(self.session, 0)

    @property
    def reference(self) -> RunId:
        """dpo's reference: a run that is never trained."""
        return ids.make_run_id(self.session, 1)
