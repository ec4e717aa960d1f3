"""Where a job lies: its records in the store, and what people see in the exchange.

jobs/<tenant>/<job>/<start>/started            what was asked, written last: the job exists once this does
                           /files/<sha256>     the files as they were then
                           /control/<n>        cancelled, resumed, failed, completed: the highest n wins
                           /steps/<k>/...      rollouts/<prompt>, scores/<prompt>, trained
                           /evaluations/<v>/.. of version v of the adapter: rollouts/<prompt>, scores/<prompt>, scored
                           /refused/<n>        why it was not started
                           /taken/<function>/<microseconds>   a process of the function began to work on it
                           /again/<n>          the same content is to be started once more, under another <start>
tenants/<tenant>/jobs/<microseconds>/<job>/<start>    a list of all that were ever looked at
tenants/<tenant>/starts/<job>/<microseconds>/<start>  the same by job
working/<tenant>/<job>/<start>                 an index of those with work undone; deleted at the end
expected/<tenant>/<job>/<start>                and of those whose files are awaited
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from knapper import ids
from knapper.errors import InvalidField
from knapper.ids import RunId, SessionId, Tenant, number

_JOB = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_START = re.compile(r"[0-9a-f]{16}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

JOB_YAML, JOB_ERROR = "job.yaml", "job.error.json"
Round = Literal["steps", "evaluations"]


def job(value: str) -> str:
    """The name, checked. Raises InvalidField."""
    if not _JOB.fullmatch(value):
        raise InvalidField("job", value, "1 to 63 small letters, digits and '-', the first a letter or digit")
    return value


def file(value: str) -> str:
    """The name of a file beside job.yaml, checked. Raises InvalidField."""
    if not _FILE.fullmatch(value):
        allowed = "1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit"
        raise InvalidField("file", value, allowed, "Put it beside job.yaml, without '/'")
    return value


@dataclass(frozen=True)
class Start:
    """One start of a job: with any other content of job.yaml, or of a file that it names, it is another."""

    tenant: Tenant
    job: str
    id: str

    @staticmethod
    def of(tenant: Tenant, job: str, content: str) -> "Start":
        """`content`: a digest of everything that the start depends on."""
        told = f"{inbox(tenant, job)}{JOB_YAML}#{content}"
        return Start(tenant, job, hashlib.sha256(told.encode()).hexdigest()[:16])

    @staticmethod
    def parse(subject: str) -> "Start":
        """Of an event's subject. Raises InvalidField."""
        parts = subject.split("/")
        if len(parts) != 3 or not _START.fullmatch(parts[2]):
            raise InvalidField("subject", subject, "<tenant>/<job>/<start>")
        return Start(ids.tenant(parts[0]), job(parts[1]), parts[2])

    def __str__(self) -> str:
        return f"{self.tenant}/{self.job}/{self.id}"

    @property
    def prefix(self) -> str:
        return f"jobs/{self}/"

    @property
    def started(self) -> str:
        return f"{self.prefix}started"

    @property
    def working(self) -> str:
        return f"working/{self}"

    @property
    def expected(self) -> str:
        return f"expected/{self}"

    @property
    def waiting(self) -> str:
        return f"{self.prefix}waiting"

    @property
    def repetitions(self) -> str:
        return f"{self.prefix}again/"

    @property
    def controls(self) -> str:
        return f"{self.prefix}control/"

    @property
    def refusals(self) -> str:
        return f"{self.prefix}refused/"

    def taken(self, function: str) -> str:
        return f"{self.prefix}taken/{function}/"

    def content(self, sha256: str) -> str:
        return f"{self.prefix}files/{sha256}"

    def round(self, kind: Round, n: int) -> str:
        return f"{self.prefix}{kind}/{number(n)}/"

    def rollouts(self, kind: Round, n: int, part: int) -> str:
        return f"{self.round(kind, n)}rollouts/{number(part)}"

    def scores(self, kind: Round, n: int, part: int) -> str:
        return f"{self.round(kind, n)}scores/{number(part)}"

    def trained(self, step: int) -> str:
        return f"{self.round('steps', step)}trained"

    def evaluated(self, version: int) -> str:
        return f"{self.round('evaluations', version)}evaluated"

    @property
    def session(self) -> SessionId:
        """A session as clients have them, so that the job's run and checkpoints are like any others."""
        return SessionId(f"ses-{hashlib.sha256(f'job:{self}'.encode()).hexdigest()[:32]}")

    @property
    def run(self) -> RunId:
        return ids.make_run_id(self.session, 0)

    @property
    def reference(self) -> RunId:
        """Of dpo: a run that is never trained."""
        return ids.make_run_id(self.session, 1)


def inbox(tenant: Tenant, job: str) -> str:
    """In the exchange: what users put there."""
    return f"inbox/{tenant}/{job}/"


def outputs(tenant: Tenant, job: str) -> str:
    """In the exchange: what users get."""
    return f"jobs/{tenant}/{job}/"


def awaited(tenant: Tenant, job: str) -> str:
    """Starts of the job whose files are awaited; of the current job.yaml, if of any."""
    return f"expected/{tenant}/{job}/"


def listed(tenant: Tenant) -> str:
    return f"tenants/{tenant}/jobs/"


def starts(tenant: Tenant, job: str) -> str:
    return f"tenants/{tenant}/starts/{job}/"
