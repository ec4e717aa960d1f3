"""The local overlay, its containers as processes: each image's own command line, files and environment, nothing else.

What a cluster gives is given here: names of services become ports of this machine, Knative's variables are set,
ConfigMaps are mounted as files, an emulator holds the buckets, and the Broker keeps Knative's contract
(knapper/local/broker), with duplicates, losses and reordering where a seed is given.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from knapper.cluster.kustomize import Object
from tests.images.dockerfile import Image, lay_out
from tests.manifests.rendering import find, services

_START_S = 90.0
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
        command = self._command(image, name)
        return Container(name, command, environment, root, self.root / f"{name}.log")

    def _command(self, image: Image, name: str) -> list[str]:
        given = {"8080": str(self.ports[name]), "0.0.0.0": "127.0.0.1"}
        return [given.get(word, word) for word in image.entrypoint]

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
    containers["broker"] = _broker(containers, ports, root, faults)
    with ExitStack() as stack:
        for container in containers.values():
            container.start()
            stack.callback(container.stop)
        for name, container in containers.items():
            _await(container, ports[name])
        yield containers, ports


def _broker(containers: Mapping[str, Container], ports: Mapping[str, int], root: Path, faults: str) -> Container:
    """The subscribers are those of the Triggers that the overlay has: the test compares the two tables."""
    train_step = next(name for name in ports if name.startswith("train-step"))
    sample = next(name for name in ports if name.startswith("sample"))
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(root), "PYTHONPATH": containers["gateway"].environment["PYTHONPATH"],
        "KNAPPER_DATA": str(root / "broker"), "KNAPPER_EXCHANGE": "gs://knapper",
        "KNAPPER_FAULT_INJECTION_SEED": faults,
        "KNAPPER_TRAIN_STEP_URL": f"http://127.0.0.1:{ports[train_step]}",
        "KNAPPER_SAMPLE_URL": f"http://127.0.0.1:{ports[sample]}",
        "KNAPPER_REWARD_URL": f"http://127.0.0.1:{ports['reward']}",
        "KNAPPER_GATEWAY_URL": f"http://127.0.0.1:{ports['gateway']}",
    }  # fmt: skip
    for name in (
        "KNAPPER_STORE",
        "STORAGE_EMULATOR_HOST",
    ):  # it knows whose events it takes by the key of the functions
        environment[name] = containers["gateway"].environment[name]
    command = [
        sys.executable, "-P", "-m", "uvicorn", "knapper.local.broker.main:app", "--host", "127.0.0.1",
        "--port", str(ports["broker"]), "--lifespan", "on", "--log-level", "warning",
    ]  # fmt: skip
    return Container("broker", command, environment, root, root / "broker.log")


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
