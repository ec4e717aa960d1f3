"""Ids and names in requests. Each is checked before use."""

import re
from dataclasses import dataclass
from typing import Literal, NewType, cast

from knapper import limits
from knapper.errors import InvalidField, NotFound

Tenant = NewType("Tenant", str)
SessionId = NewType("SessionId", str)
RunId = NewType("RunId", str)  # {session_id}:train:{n}: the SDK computes it too
SamplerId = NewType("SamplerId", str)  # {session_id}:sample:{n}
RequestId = NewType("RequestId", str)  # {run_id}:{seq} for training, s-<random> for samples
CheckpointKind = Literal["weights", "sampler_weights", "external_weights"]

LOCAL_TENANT = Tenant("local")

_SESSION = re.compile(r"ses-[0-9a-f]{32}")
_RUN = re.compile(r"(ses-[0-9a-f]{32}):train:(0|[1-9][0-9]{0,17})")
_SAMPLER = re.compile(r"(ses-[0-9a-f]{32}):sample:(0|[1-9][0-9]{0,17})")
_TRAINING_REQUEST = re.compile(r"(ses-[0-9a-f]{32}:train:(?:0|[1-9][0-9]{0,17})):(0|[1-9][0-9]{0,17})")
_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KINDS = ("weights", "sampler_weights", "external_weights")


def tenant(value: str) -> Tenant:
    """The name, checked. Raises InvalidField."""
    if not _TENANT.fullmatch(value):
        allowed = "1 to 63 small letters, digits and '-', the first a letter or digit"
        raise InvalidField("tenant", value, allowed)
    return Tenant(value)


def session_id(value: str) -> SessionId:
    """The id, checked. Raises NotFound: no id has another form."""
    if not _SESSION.fullmatch(value):
        raise NotFound(f"session {value!r} does not exist; create one with create_session (the SDK does it by itself)")
    return SessionId(value)


def is_session(value: str) -> bool:
    """Whether it has the form of a session's id."""
    return _SESSION.fullmatch(value) is not None


def run_id(value: str) -> RunId:
    """The id, checked. Raises NotFound: no id has another form."""
    if not _RUN.fullmatch(value):
        raise NotFound(f"training run {value!r} does not exist; create one with create_lora_training_client")
    return RunId(value)


def sampler_id(value: str) -> SamplerId:
    """The id, checked. Raises NotFound: no id has another form."""
    if not _SAMPLER.fullmatch(value):
        raise NotFound(f"sampler {value!r} does not exist; create one with create_sampling_client")
    return SamplerId(value)


def make_run_id(session: SessionId, model_seq_id: int) -> RunId:
    return RunId(f"{session}:train:{model_seq_id}")


def make_sampler_id(session: SessionId, sampling_session_seq_id: int) -> SamplerId:
    return SamplerId(f"{session}:sample:{sampling_session_seq_id}")


def session_of(owned: RunId | SamplerId) -> SessionId:
    return SessionId(owned.partition(":")[0])


def make_training_request_id(run: RunId, seq: int) -> RequestId:
    return RequestId(f"{run}:{seq}")


def parse_training_request_id(value: str) -> tuple[RunId, int] | None:
    """(run, seq) of a training future, or None when it is not one."""
    match = _TRAINING_REQUEST.fullmatch(value)
    return (RunId(match[1]), int(match[2])) if match else None


def checkpoint_name(value: str, field: str = "path") -> str:
    """The name, checked. Raises InvalidField."""
    if len(value) > limits.name_chars_max or not _NAME.fullmatch(value):
        raise InvalidField(
            field, value, f"1 to {limits.name_chars_max} letters, digits, '.', '_' or '-', the first a letter or digit",
            "Give the checkpoint a plain name, without '/'",
        )  # fmt: skip
    return value


@dataclass(frozen=True)
class TinkerPath:
    """tinker://<run>/<weights|sampler_weights|external_weights>/<name>"""

    run: RunId
    kind: CheckpointKind
    name: str

    @staticmethod
    def parse(value: str, field: str = "path") -> "TinkerPath":
        """Raises InvalidField for another form, NotFound for a run that cannot exist."""
        parts = value.removeprefix("tinker://").split("/")
        if not value.startswith("tinker://") or len(parts) != 3 or parts[1] not in _KINDS:
            raise InvalidField(field, value, f"tinker://<run>/<{'|'.join(_KINDS)}>/<name>")
        return TinkerPath(run_id(parts[0]), cast(CheckpointKind, parts[1]), checkpoint_name(parts[2], field))

    def __str__(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"


def number(n: int) -> str:
    """A sequence number in object names: 20 digits, so that names sort like numbers."""
    if not 0 <= n < 10**20:
        raise ValueError(n)
    return f"{n:020d}"


@dataclass(frozen=True)
class EpisodeName:
    """[<group>/]<name>: an agent's session that is captured. `group`: empty for none."""

    group: str
    name: str

    @staticmethod
    def parse(value: str, field: str = "episode") -> "EpisodeName":
        """Raises InvalidField."""
        group, slash, name = value.rpartition("/")
        for part in (group, name) if slash else (name,):
            if len(part) > limits.name_chars_max or not _NAME.fullmatch(part):
                allowed = (
                    f"EPISODE or GROUP/EPISODE, each 1 to {limits.name_chars_max} letters, digits, '.', '_' or '-'"
                )
                raise InvalidField(field, value, f"{allowed}, the first a letter or digit")
        return EpisodeName(group, name)

    def __str__(self) -> str:
        return f"{self.group}/{self.name}" if self.group else self.name
