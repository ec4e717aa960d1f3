"""The layout of the object store: one table of all keys. Every other module makes and parses keys with it.

A key is a pattern with its fields filled in. A number has 20 digits, so that keys sort as numbers do.
"""

import hashlib
import re
from enum import Enum
from typing import Final

from knapper.ids import EpisodeName, RunId, SamplerId, SessionId, TinkerPath, number

_FORMS: Final = {  # regular expressions of fields; any other field is a segment, or part of one
    **dict.fromkeys(("n", "seq", "epoch", "day", "hour", "us"), r"\d{20}"),  # us: microseconds since the epoch
    "sha256": "[0-9a-f]{64}",
    "part": "(?!index$)[^/]+",
    "round": "steps|evaluations",
    "secret": "functions|links|tokens",
}
EMPTY, PART, NAMED_BY_HASH = "", "part", "named by hash"  # objects that are no record


class ObjectKind(Enum):
    """(pattern, its record or one of the three constants above, the modules that write it)"""

    # A run: <place> is made by `run_prefix`. Numbers are consecutive; the first writer of one has it.
    OPERATION = ("runs/<place>/in/<n>", "Operation", "state.journal.accept")
    COMMIT = ("runs/<place>/out/<n>", "Commit", "state.journal.own_objects, state.journal.ends")
    MANIFEST = ("runs/<place>/manifest/<n>", "Manifest", "state.journal.own_objects, state.gc.journal")
    END = ("runs/<place>/end/<n>", "End", "state.journal.ends")
    ALARM = ("runs/<place>/alarm/<seq>/<alarm>", "Alarm", "state.alarms")
    ACCOUNTED = ("runs/<place>/used/<through>", EMPTY, "state.ledger")
    # Bundles: the index is written last.
    SNAPSHOT_INDEX = ("runs/<place>/snap/<seq>-<epoch>/index", "Index", "state.journal.bundles")
    SNAPSHOT_PART = ("runs/<place>/snap/<seq>-<epoch>/<part>", PART, "state.journal.bundles")
    EXPORT_INDEX = ("adapters/<run>/<seq>-<epoch>/index", "Index", "state.journal.bundles")
    EXPORT_PART = ("adapters/<run>/<seq>-<epoch>/<part>", PART, "state.journal.bundles")
    # Users' names of exports; the highest n wins. A label repeats fields of its version.
    CHECKPOINT = ("checkpoints/<tenant>/<run>/<type>/<name>/<n>", "Checkpoint", "state.checkpoints")
    LABEL = (
        "labels/<tenant>/<run>/<type>/<name>/<n>/<label>", EMPTY, "state.checkpoints, state.checkpoint_index",
    )  # fmt: skip
    # Sessions and samplers
    SESSION = ("sessions/<session>/created", "Session", "state.sessions")
    FINISH = ("sessions/<session>/finished", "Finish", "state.sessions")
    ASSIGNMENT = ("sessions/<session>/project/<n>", "Assignment", "state.sessions")
    HEARTBEAT = ("sessions/<session>/heard/<day>", EMPTY, "state.sessions")
    SAMPLER = ("samplers/<sampler>", "Sampler", "state.sessions")
    INFLIGHT = ("inflight/<run>/<seq>", "Sampler", "state.sessions")
    CLONE = ("clones/<sampler>/<n>", EMPTY, "state.sessions")
    # The lists of a tenant
    TENANT_SESSION = ("tenants/<tenant>/sessions/<us>-<session>", EMPTY, "state.tenant_index")
    TENANT_RUN = ("tenants/<tenant>/runs/<us>-<session>/<n>", EMPTY, "state.tenant_index")
    TENANT_JOB = ("tenants/<tenant>/jobs/<us>/<job>/<start>", EMPTY, "jobs.starts")
    TENANT_START = ("tenants/<tenant>/starts/<job>/<us>/<start>", EMPTY, "jobs.starts")
    # Usage
    USAGE = ("usage/<tenant>/<hour>/<id>", "Samplings", "gateway.sample_usage, jobs.sample_usage")
    LEDGER_LINE = ("used/<tenant>/<hour>/<run>/<line>", EMPTY, "state.ledger_entries")
    LEDGER_MARK = ("using/<tenant>/<run>/<us>-<id>", EMPTY, "state.ledger")
    LEDGER_BEGAN = ("accounts/began", EMPTY, "state.ledger")
    # Quotas: all tenants' in one record, of which the highest n wins; and what each gateway has under way for a tenant
    QUOTAS = ("quotas/<n>", "Quotas", "state.quotas")
    HOLD = ("held/<tenant>/<gateway>/<hold>", EMPTY, "state.holds")
    # Where a gateway that keeps samples is reached by the others
    GATEWAY = ("gateways/<gateway>/<us>-<address>", EMPTY, "state.gateways")
    # Which weights drew recent samples
    DRAWN = ("drawn/<tenant>/<us>-<id>", "DrawnSamples", "state.drawn_samples")
    # Agents' sessions, captured: the tenant's list of episodes, the turns of each (<n>: the record's bytes), its scores
    EPISODE = ("episodes/<tenant>/<us>/<group>/<episode>", EMPTY, "state.captures")
    CAPTURED_TURN = ("captured/<tenant>/<group>/<episode>/turns/<us>-<id>-<n>", "CapturedTurn", "state.captures")
    EPISODE_SCORE = ("captured/<tenant>/<group>/<episode>/scores/<n>", "EpisodeScore", "state.captures")
    # The collector's marks, and which samplers each gateway's clients use
    COLLECT_BEGUN = ("collect/begun", EMPTY, "state.gc.marks")
    COLLECT_NOW = ("collect/now/<session>/<what>", EMPTY, "state.gc.marks")
    COLLECT_LATER = ("collect/later/<us>/<session>", EMPTY, "state.gc.marks")
    SAMPLERS_IN_USE = ("sampled/<session>/<us>-<gateway>", "SamplersInUse", "state.gc.uses")
    # The deployment
    API_KEY = ("keys/<id>/<n>", "Key", "state.api_keys")
    MODEL = ("models/<slug>/<n>", "ModelRecord", "catalogue.served_models")
    AUDIT = ("audit/<tenant>/<date>/<us>-<id>", "Entry", "state.audit")
    DEAD_LETTER = ("dead/<sha256>", "DeadLetter", "state.dead_letters")
    SECRET = ("secrets/<secret>", "Secret", "state.secrets")
    PROBE_RESULT = ("probes/<fingerprint>/<sha256>", "ProbeResult", "state.probe_results")
    # Jobs: one exists once `started` does.
    JOB_STARTED = ("jobs/<tenant>/<job>/<start>/started", "Started", "jobs.starts")
    JOB_WAITING = ("jobs/<tenant>/<job>/<start>/waiting", "Waiting", "jobs.inbox")
    JOB_LISTED = ("jobs/<tenant>/<job>/<start>/listed", EMPTY, "jobs.starts")
    JOB_TAKEN = ("jobs/<tenant>/<job>/<start>/taken/<function>/<us>", EMPTY, "jobs.activity")
    JOB_AGAIN = ("jobs/<tenant>/<job>/<start>/again/<n>", EMPTY, "jobs.upload")
    JOB_CONTROL = ("jobs/<tenant>/<job>/<start>/control/<n>", "Control", "jobs.control")
    JOB_REFUSAL = ("jobs/<tenant>/<job>/<start>/refused/<n>", "Refusal", "jobs.inbox")
    JOB_FILE = ("jobs/<tenant>/<job>/<start>/files/<sha256>", NAMED_BY_HASH, "jobs.starts")
    JOB_ROLLOUTS = (
        "jobs/<tenant>/<job>/<start>/<round>/<n>/rollouts/<n>",
        "Rollouts",
        "jobs.rollouts, jobs.environments",
    )
    JOB_TURN = ("jobs/<tenant>/<job>/<start>/<round>/<n>/turns/<n>/<n>", "SampledTurns", "jobs.rollouts")
    JOB_ANSWERED = (
        "jobs/<tenant>/<job>/<start>/<round>/<n>/answered/<n>/<n>",
        "EnvironmentAnswers",
        "jobs.environments",
    )
    JOB_SCORES = ("jobs/<tenant>/<job>/<start>/<round>/<n>/scores/<n>", "Scores", "jobs.scores, jobs.environments")
    JOB_TRAINED = ("jobs/<tenant>/<job>/<start>/<round>/<n>/trained", "Trained", "jobs.runner")
    JOB_EVALUATED = ("jobs/<tenant>/<job>/<start>/<round>/<n>/evaluated", "Evaluated", "jobs.runner")
    # A sweep's trials, each a job of its own: its values, and what it came to.
    JOB_TRIAL = ("jobs/<tenant>/<job>/<start>/trials/<n>/values", "Trial", "jobs.sweep.dispatch")
    JOB_TRIAL_ENDED = ("jobs/<tenant>/<job>/<start>/trials/<n>/ended", "TrialEnded", "jobs.sweep.dispatch")
    JOB_WORKING = (
        "working/<tenant>/<job>/<start>",
        EMPTY,
        "jobs.starts, jobs.revive, jobs.sweep.dispatch, gateway.jobs",
    )
    JOB_EXPECTED = ("expected/<tenant>/<job>/<start>", EMPTY, "jobs.inbox")
    # No longer written; stores of early releases have it.
    UPLOAD = ("uploads/<id>", EMPTY, "")

    def __init__(self, pattern: str, holds: str, writers: str) -> None:
        self.pattern, self.holds, self.writers = pattern, holds, writers
        self._literals = re.split(r"<\w+>", pattern)
        self._regex = re.compile(re.sub(r"<(\w+)>", lambda field: f"({_FORMS.get(field[1], '[^/]+')})", pattern))

    def key(self, *fields: str | int) -> str:
        """The key with these fields, all of them in order."""
        if len(fields) != len(self._literals) - 1:
            raise ValueError(f"{self.pattern} has {len(self._literals) - 1} fields, not {len(fields)}")
        return self.under(*fields)

    def under(self, *fields: str | int) -> str:
        """The common prefix of all keys with these first fields."""
        segments = [number(field) if isinstance(field, int) else field for field in fields]
        return "".join(map("".join, zip(self._literals, [*segments, ""], strict=False)))

    def matches(self, key: str) -> bool:
        return self._regex.fullmatch(key) is not None

    def parse(self, key: str) -> tuple[str, ...]:
        """The fields of the key. Raises ValueError for a key of another kind."""
        if (match := self._regex.fullmatch(key)) is None:
            raise ValueError(f"{key} is none of {self.pattern}")
        return match.groups()


def kind_of(key: str) -> ObjectKind | None:
    """The kind of the key, or None for a key of no kind."""
    return next((kind for kind in ObjectKind if kind.matches(key)), None)


def last_number(key: str) -> int:
    """The number at the end of a key or prefix."""
    return int(key.rpartition("/")[2])


# -- runs --------------------------------------------------------------------------------------------------------------


def _hashed(run: RunId) -> str:
    """The run with a hash before it, which spreads runs over the key space of an object store."""
    return f"{hashlib.sha256(run.encode()).hexdigest()[:8]}-{run}"


RUNS: Final = ObjectKind.OPERATION.under()


def run_prefix(run: RunId) -> str:
    """The prefix of all objects of a run."""
    return f"{RUNS}{_hashed(run)}/"


def run_of(key: str) -> RunId:
    """The run of an object below a `run_prefix`."""
    return RunId(key.split("/")[1].partition("-")[2])


def operation(run: RunId, seq: int) -> str:
    return ObjectKind.OPERATION.key(_hashed(run), seq)


def operations(run: RunId) -> str:
    return ObjectKind.OPERATION.under(_hashed(run))


def commit(run: RunId, n: int) -> str:
    return ObjectKind.COMMIT.key(_hashed(run), n)


def commits(run: RunId) -> str:
    return ObjectKind.COMMIT.under(_hashed(run))


def manifest(run: RunId, n: int) -> str:
    return ObjectKind.MANIFEST.key(_hashed(run), n)


def manifests(run: RunId) -> str:
    return ObjectKind.MANIFEST.under(_hashed(run))


def end(run: RunId, n: int) -> str:
    return ObjectKind.END.key(_hashed(run), n)


def ends(run: RunId) -> str:
    return ObjectKind.END.under(_hashed(run))


def alarm(run: RunId, seq: int, name: str) -> str:
    return ObjectKind.ALARM.key(_hashed(run), seq, name)


def alarms(run: RunId) -> str:
    return ObjectKind.ALARM.under(_hashed(run))


def accounted(run: RunId) -> str:
    return ObjectKind.ACCOUNTED.under(_hashed(run))


# -- bundles: a prefix each --------------------------------------------------------------------------------------------

INDEX: Final = "index"


def snapshot(run: RunId, seq: int, epoch: int) -> str:
    return ObjectKind.SNAPSHOT_PART.under(_hashed(run), seq, epoch)


def snapshots(run: RunId) -> str:
    return ObjectKind.SNAPSHOT_PART.under(_hashed(run))


def export(run: RunId, seq: int, epoch: int) -> str:
    """The prefix of the immutable export of one save operation; epochs never share a prefix."""
    return ObjectKind.EXPORT_PART.under(run, seq, epoch)


def exports(run: RunId) -> str:
    return ObjectKind.EXPORT_PART.under(run)


def exports_of(session: SessionId) -> str:
    return f"{ObjectKind.EXPORT_PART.under()}{session}:"


def run_of_export(prefix: str) -> RunId:
    return RunId(prefix.split("/")[1])


def bundle_of(key: str) -> str:
    """The bundle of a part or index."""
    return key.rpartition("/")[0] + "/"


def parse_bundle(prefix: str) -> tuple[int, int]:
    """(seq, epoch) of the prefix of a snapshot or an export."""
    seq, _, epoch = prefix.rstrip("/").rpartition("/")[2].partition("-")
    return int(seq), int(epoch)


# -- checkpoints, sessions, samplers -----------------------------------------------------------------------------------


def checkpoint(path: TinkerPath, tenant: str) -> str:
    """The prefix of all versions of the checkpoint."""
    return ObjectKind.CHECKPOINT.under(tenant, path.run, path.kind, path.name)


def label_of(version: str, label: str) -> str:
    """The key of a label for the version of a checkpoint."""
    return ObjectKind.LABEL.key(*ObjectKind.CHECKPOINT.parse(version), label)


def session(session_id: SessionId) -> str:
    """The prefix of all records of the session."""
    return f"{ObjectKind.SESSION.under()}{session_id}/"


def samplers_of(session: SessionId) -> str:
    return f"{ObjectKind.SAMPLER.under()}{session}:sample:"


def owner_of(key: str) -> SessionId:
    """The session of a session's record, a sampler or an export."""
    return SessionId(key.split("/")[1].partition(":")[0])


def session_of_mark(key: str) -> SessionId:
    """The session of a `COLLECT_NOW`."""
    return SessionId(key.split("/")[2])


def sampler_of(key: str) -> SamplerId:
    return SamplerId(*ObjectKind.SAMPLER.parse(key))


# -- captured episodes -------------------------------------------------------------------------------------------------

_NO_GROUP: Final = "-"  # no group has this name


def episode(tenant: str, name: EpisodeName) -> tuple[str, str, str]:
    """The first fields of all that is kept of the episode."""
    return tenant, name.group or _NO_GROUP, name.name


def parse_episode(key: str) -> tuple[str, int, EpisodeName]:
    """(tenant, microseconds when it began, name) of an `EPISODE`."""
    tenant, us, group, name = ObjectKind.EPISODE.parse(key)
    return tenant, int(us), EpisodeName("" if group == _NO_GROUP else group, name)


# -- the exchange, another bucket: users' input and output -------------------------------------------------------------

INBOX: Final = "inbox/"


def inbox(tenant: str, job: str) -> str:
    return f"{INBOX}{tenant}/{job}/"


def outputs(tenant: str, job: str) -> str:
    return f"jobs/{tenant}/{job}/"


UPLOADS: Final = "uploads/"


def staged(tenant: str, sha256: str, size: int) -> str:
    """The prefix of a file's parts, named by the hash and size of the whole file."""
    return f"{uploads_of(tenant)}{sha256}-{size}/"


def uploads_of(tenant: str) -> str:
    return f"{UPLOADS}{tenant}/"
