"""The local overlay, its containers as processes: each image's own command line, files and environment, nothing else.

What a cluster gives is given here: names of services become ports of this machine, Knative's variables are set,
ConfigMaps are mounted as files, an emulator holds the buckets, and the Broker keeps Knative's contract
(knapper/local/broker), with duplicates, losses and reordering where a seed is given.
"""

import copy
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec

from knapper.catalogue.servable import record_of
from knapper.cluster.kustomize import Object, identity
from knapper.cluster.model import Wanted
from knapper.cluster.model import objects as add
from tests.images.dockerfile import Image, lay_out
from tests.manifests.rendering import find, services

_START_S = 90.0
MODEL = "example/tiny"
BROKER = "broker-ingress.knative-eventing.svc.cluster.local/knapper/knapper"
GATEWAY = "gateway.knapper.svc.cluster.local"


@dataclass
class Container:
    """One service's process. `environment` is all that it was told."""

    name: str
    command: list[str]
    environment: dict[str, str]
    directory: Path
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, cwd=self.directory, stdout=log, stderr=log
            )  # fmt: skip

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def overlay(model: Path, manifests: Sequence[Object]) -> list[Object]:
    """An overlay as it is, with `knapper deploy add` in the place of the model that the images would carry."""
    local = copy.deepcopy(list(manifests))
    record = msgspec.structs.replace(
        record_of(model, MODEL, dtype="float32", train_step_url="", sample_url=""),
        directory="/srv/models/example--tiny", tokenizer_id=MODEL,
    )  # fmt: skip
    *added, entry = add(local, Wanted(record, accelerator=""))
    kept = [thing for thing in local if thing["metadata"]["name"] not in ("train-step", "sample")]
    for thing in kept:
        if thing["kind"] == "ConfigMap" and thing["metadata"]["name"] == "knapper-models":
            thing["data"] = entry["data"]
    assert len({identity(thing) for thing in [*kept, *added]}) == len(kept) + len(added)
    return [*kept, *added]


def command_line(container: Object, image: Image) -> list[str]:
    """What Kubernetes starts: the manifest's command in the place of the image's entry point, and its arguments."""
    return [*container.get("command", image.entrypoint), *container.get("args", [])]


def subscriber(objects: list[Object], role: str) -> str:
    """Where the events of train-step, sample or reward go, by the names of the cluster."""
    (where,) = [
        each["spec"]["subscriber"] for each in objects
        if each["kind"] == "Trigger" and re.fullmatch(f"{role}(-[0-9a-f]{{8}})?", each["metadata"]["name"])
    ]  # fmt: skip
    return f"http://{where['ref']['name']}.knapper.svc.cluster.local{where.get('uri', '')}"


@dataclass(frozen=True)
class House:
    """Everything of one overlay. `ports` by service."""

    objects: list[Object]
    root: Path
    model: Path
    emulator: str
    broker_environment: Mapping[str, str]
    ports: dict[str, int]

    def container(self, service: Object) -> Container:
        """As Knative would start it: the image's entry point, its environment, the overlay's over it, Knative's own."""
        name = service["metadata"]["name"]
        (spec,) = service["spec"]["template"]["spec"]["containers"]
        target = spec["image"].rpartition("/")[2].partition(":")[0]
        root = self.root / name
        image = lay_out(target, root)
        self._mount(service, spec, root)
        environment = {**image.environment, **self._environment(service, spec)}
        environment |= {"PORT": "8080", "K_SERVICE": name, "K_CONFIGURATION": name, "K_REVISION": f"{name}-00001"}
        inside = {"/app": root / "app", "/srv/models": root / "srv/models", "/etc/knapper": root / "etc/knapper"}
        environment = {key: self._outside(value, inside) for key, value in environment.items()}
        environment |= {
            "HOME": str(root / "tmp"), "XDG_CACHE_HOME": str(root / "tmp/cache"),
            "KNAPPER_DATA": str(root / "tmp/knapper"),
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1", "KNAPPER_THREADS": "1",
        }  # fmt: skip
        (root / "tmp").mkdir()
        given = {"8080": str(self.ports[name]), "0.0.0.0": "127.0.0.1"}
        command = [given.get(word, self._outside(word, inside)) for word in command_line(spec, image)]
        return Container(name, command, environment, root, self.root / f"{name}.log")

    def _environment(self, service: Object, spec: Object) -> dict[str, str]:
        found: dict[str, str] = {}
        for each in spec.get("envFrom", []):
            found |= find(self.objects, "ConfigMap", each["configMapRef"]["name"])["data"]
        for each in spec.get("env", []):
            found[each["name"]] = each.get("value", "127.0.0.1")  # the pod's address
        return found

    def _mount(self, service: Object, spec: Object, root: Path) -> None:
        volumes = {volume["name"]: volume for volume in service["spec"]["template"]["spec"]["volumes"]}
        for mount in spec["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "configMap" in volume:
                at = root / mount["mountPath"].lstrip("/")
                at.mkdir(parents=True)
                for name, text in find(self.objects, "ConfigMap", volume["configMap"]["name"])["data"].items():
                    (at / name).write_text(self._outside(text, {"/srv/models": root / "srv/models"}))
        at = root / "srv/models" / "example--tiny"  # what the build stage `weights` leaves there, of another model
        shutil.copytree(self.model, at)

    def _outside(self, value: str, inside: Mapping[str, Path]) -> str:
        """The value, with the cluster's names and the container's paths as this machine has them."""
        for name, port in self.ports.items():
            value = value.replace(f"{name}.knapper.svc.cluster.local:4443", f"127.0.0.1:{port}")
            value = value.replace(f"{name}.knapper.svc.cluster.local", f"127.0.0.1:{port}")
        value = value.replace(BROKER, f"127.0.0.1:{self.ports['broker']}")
        value = value.replace("http://store-emulator.knapper.svc.cluster.local:4443", self.emulator)
        for path, place in inside.items():
            value = value.replace(path, str(place))
        return value

    def broker(self, gateway: Mapping[str, str], faults: str) -> Container:
        """It sends where the overlay's Triggers do; a test compares what they send. `gateway`: its environment."""
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(self.root), "PYTHONPATH": gateway["PYTHONPATH"],
            "KNAPPER_DATA": str(self.root / "broker"), "KNAPPER_EXCHANGE": "gs://knapper",
            "KNAPPER_FAULT_INJECTION_SEED": faults,
            "KNAPPER_GATEWAY_URL": f"http://127.0.0.1:{self.ports['gateway']}",
        }  # fmt: skip
        for role in ("train-step", "sample", "reward"):
            url = self._outside(subscriber(self.objects, role), {})
            environment[f"KNAPPER_{role.upper().replace('-', '_')}_URL"] = url
        for name in ("KNAPPER_STORE", "STORAGE_EMULATOR_HOST"):  # by the store's key it knows whose events it takes
            environment[name] = gateway[name]
        command = [
            sys.executable, "-P", "-m", "uvicorn", "knapper.local.broker.main:app", "--host", "127.0.0.1",
            "--port", str(self.ports["broker"]), "--lifespan", "on", "--log-level", "warning",
        ]  # fmt: skip
        return Container("broker", command, environment, self.root, self.root / "broker.log")


@contextmanager
def running(
    objects: list[Object], model: Path, emulator: str, root: Path, faults: str = "", traces: str = ""
) -> Iterator[tuple[dict[str, Container], dict[str, int]]]:
    """All services and the Broker, answering; the ports by service."""
    names = [service["metadata"]["name"] for service in services(objects)]
    ports = {name: _free_port() for name in [*names, "broker"]}
    house = House(objects, root, model, emulator, {}, ports)
    containers = {name: house.container(service) for name, service in zip(names, services(objects), strict=True)}
    for container in containers.values():  # as the name by which the cluster's services reach it
        if container.environment.get("KNAPPER_EVENTS_HOST"):
            container.environment["KNAPPER_EVENTS_HOST"] = "127.0.0.1"
    for container in containers.values():
        container.environment["KNAPPER_TRACES"] = traces
    containers["gateway"].environment["KNAPPER_JOB_STALLED_S"] = "3"  # not a minute: bells get lost
    containers["broker"] = house.broker(containers["gateway"].environment, faults)
    with ExitStack() as stack:
        for container in containers.values():
            container.start()
            stack.callback(container.stop)
        for name, container in containers.items():
            _await(container, ports[name])
        yield containers, ports


def _await(container: Container, port: int) -> None:
    end = time.monotonic() + _START_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert container.process is not None
        assert container.process.poll() is None, f"{container.name} ended:\n{container.said()[-4000:]}"
        assert time.monotonic() < end, f"{container.name} does not listen:\n{container.said()[-4000:]}"
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def upload(emulator: str, bucket: str, name: str, data: bytes) -> str:
    """Put an object there, as anybody would; its generation."""
    answer = httpx.post(
        f"{emulator}/upload/storage/v1/b/{bucket}/o", params={"uploadType": "media", "name": name}, content=data,
        trust_env=False,
    )  # fmt: skip
    answer.raise_for_status()
    return str(answer.json()["generation"])


def download(emulator: str, bucket: str, name: str) -> bytes | None:
    path = f"{emulator}/storage/v1/b/{bucket}/o/{name.replace('/', '%2F')}"
    answer = httpx.get(path, params={"alt": "media"}, trust_env=False)
    return answer.content if answer.is_success else None
