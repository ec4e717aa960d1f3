"""Processes that may be killed: those of one machine, or pods of a namespace. Nothing else is touched."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import msgspec

from knapper.errors import InvalidField, UserError

if TYPE_CHECKING:
    from knapper.cluster.api import Api

ROLES = ("broker", "engine", "gateway", "sample", "train_step")  # of one machine; never the supervisor
_SERVICE = "serving.knative.dev/service"  # Knative labels each pod so


@dataclass(frozen=True)
class Target:
    role: str
    name: str  # a pid, or a pod's name


class Targets(Protocol):
    def living(self) -> Sequence[Target]:
        """The targets that can be killed now."""

    def kill(self, target: Target) -> bool:
        """Kill at once, without cleanup. False if it had ended already."""


class _Process(msgspec.Struct):
    pid: int
    port: int = 0  # the supervisor serves none


class ProcessTargets:
    """Those of the `knapper up` whose data directory this is."""

    def __init__(self, data: Path, url: str) -> None:
        """Raises InvalidField unless a `knapper up` over `data` answers at `url`."""
        self._path = data / "run" / "processes.json"
        gateway = self._read().get("gateway")
        if gateway is None or not self.living():
            raise InvalidField("--data", str(data), "the data directory of a `knapper up` that runs on this machine")
        if urlsplit(url).port != gateway.port:
            raise InvalidField("--url", url, f"the gateway over {data}, which listens on port {gateway.port}")

    def living(self) -> Sequence[Target]:
        """Children of the supervisor only: a pid in an old file may belong to another process by now."""
        found = self._read()
        supervisor = found.get("supervisor")
        return [
            Target(role, str(process.pid))
            for role, process in sorted(found.items())
            if role in ROLES and supervisor is not None and _parent(process.pid) == supervisor.pid
        ]

    def kill(self, target: Target) -> bool:
        if target not in self.living():
            return False
        try:
            os.kill(int(target.name), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _read(self) -> dict[str, _Process]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, _Process])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            raise UserError(f"{self._path} cannot be read: {error}") from error


class Pods:
    """Knative's of a namespace: all, or those of one label selector."""

    def __init__(self, api: "Api", namespace: str, labels: str = "") -> None:
        self._api, self._namespace = api, namespace
        self._labels = labels or _SERVICE

    def living(self) -> Sequence[Target]:
        return [
            Target(str(pod["metadata"]["labels"][_SERVICE]), str(pod["metadata"]["name"]))
            for pod in self._api.list("v1", "Pod", self._namespace, self._labels)
            if _SERVICE in pod["metadata"].get("labels", {})
            and pod.get("status", {}).get("phase") == "Running"
            and "deletionTimestamp" not in pod["metadata"]
        ]

    def kill(self, target: Target) -> bool:
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"namespace": self._namespace, "name": target.name},
        }
        return self._api.delete(pod, at_once=True)


def _parent(pid: int) -> int | None:
    """None for a process that is gone, or ended and not yet noticed."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(parent) if state != "Z" else None
