"""An overlay in what a pod has: `unshare -n -m python -m tests.cluster.pods OVERLAY MODELS EMULATOR ROOT`, as root.

Each container gets an address of its own and listens on port 8080 of it, the cluster's names of the services (at port
80, where a plain relay stands for Knative's ingress), a root file system that is read-only but for its emptyDirs, uid
65532 without an entry in /etc/passwd, no capabilities, and ConfigMaps as the kubelet lays them out. Beside
containers.py nothing is rewritten here: neither addresses nor paths nor environment.

Then the program of docs/cluster-trial.md runs, a job is uploaded, and its adapter is waited for.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from knapper.cluster.kustomize import Object, render
from tests.cluster.containers import command_line, subscriber
from tests.cluster.page import file
from tests.images.dockerfile import lay_out
from tests.manifests.rendering import ROOT as CHECKOUT
from tests.manifests.rendering import find, services

NOBODY = ["/usr/bin/setpriv", "--reuid", "65532", "--regid", "65532", "--clear-groups", "--inh-caps=-all",
          "--bounding-set=-all", "--no-new-privs"]  # fmt: skip
BROKER = "broker-ingress.knative-eventing.svc.cluster.local"
VENV, PYTHON = Path(sys.prefix), Path(sys.base_prefix)
RELAY = """
import asyncio, sys
async def pipe(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()
async def serve(at, port, to, to_port):
    async def relay(reader, writer):
        for _ in range(600):
            try:
                inner_reader, inner_writer = await asyncio.open_connection(to, int(to_port))
                break
            except OSError:
                await asyncio.sleep(0.1)
        else:
            return writer.close()
        await asyncio.gather(pipe(reader, inner_writer), pipe(inner_reader, writer))
    await asyncio.start_server(relay, at, int(port))
async def main():
    await asyncio.gather(*(serve(*each.split(",")) for each in sys.argv[1:]))
    await asyncio.Event().wait()
asyncio.run(main())
"""
BROKER_APP = """
import os
from starlette.applications import Starlette
from starlette.routing import Route
from knapper.local.broker.main import create_app, post
from knapper.settings import Settings
inner = create_app(Settings.load(os.environ))
app = Starlette(routes=[Route("/knapper/knapper", post, methods=["POST"])], lifespan=inner.router.lifespan_context)
"""


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclass
class Pod:
    """`writable`: its emptyDirs."""

    name: str
    address: str
    root: Path
    command: Sequence[str]
    environment: dict[str, str]
    writable: Sequence[str]
    process: subprocess.Popen[bytes] | None = field(default=None)
    inside: int = 0  # the process to enter its namespaces by

    def start(self, number: int) -> None:
        ready, go = os.pipe(), os.pipe()
        with self.root.with_suffix(".log").open("ab") as log:
            unshare = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
            self.process = subprocess.Popen(
                [*unshare, "bash", "-ec", self._script(ready[1], go[0])], stdout=log, stderr=log,
                pass_fds=(ready[1], go[0]),
            )  # fmt: skip
        os.close(ready[1])
        assert os.read(ready[0], 8), self.said()
        self.inside = int(run("pgrep", "-P", str(self.process.pid)).split()[0])
        cable = f"pod{number}"
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(self.inside))
        run("ip", "link", "set", cable, "master", "cluster", "up")
        os.write(go[1], b"go\n")

    def stop(self) -> None:
        """With all that runs in it. `--kill-child` is not enough: who becomes nobody no longer dies with its parent."""
        if self.inside:
            os.kill(self.inside, signal.SIGKILL)  # the first process of its namespace: the others end with it
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _script(self, ready: int, go: int) -> str:
        root = self.root
        lines = [f"mount --bind {root} {root}"]
        for path in ("/usr", "/bin", "/lib", "/lib64", PYTHON, VENV):
            lines += [f"mount --rbind {path} {root}{path}", f"mount -o remount,bind,ro {root}{path}"]
        lines += [f"mount -t proc proc {root}/proc", f"mount -t tmpfs -o mode=755 tmpfs {root}/dev"]
        for device in ("null", "zero", "random", "urandom"):
            lines += [f"touch {root}/dev/{device}", f"mount --bind /dev/{device} {root}/dev/{device}"]
        for place in self.writable:  # some are below others, or below /dev
            lines += [f"mkdir -p {root}{place}", f"mount -t tmpfs -o mode=1777 tmpfs {root}{place}"]
        lines += [f"mount -o remount,bind,ro {root}", "ip link set lo up"]
        lines += [f"echo ready >&{ready}", f"read -u {go}"]
        lines += [f"ip addr add {self.address}/16 dev eth0; ip link set eth0 up"]
        words = " ".join(f"'{word}'" for word in self.within(*self.command))
        return "\n".join([*lines, f"exec {words}"])

    def within(self, *command: str) -> list[str]:
        """The command, in this root and as nobody."""
        place = "/app" if (self.root / "app").is_dir() else "/"
        environment = [f"{key}={value}" for key, value in self.environment.items()]
        return ["chroot", str(self.root), *NOBODY, "/usr/bin/env", "-C", place, "-i", *environment, *command]

    def said(self) -> str:
        return self.root.with_suffix(".log").read_text(errors="replace")[-3000:]


def directories(root: Path, *more: str) -> None:
    for place in ("usr", "bin", "lib", "lib64", "proc", "dev", "etc", "tmp", str(PYTHON), str(VENV), *more):
        (root / place.lstrip("/")).mkdir(parents=True, exist_ok=True)


def service_pod(objects: list[Object], service: Object, address: str, models: Path, root: Path) -> Pod:
    name, spec = service["metadata"]["name"], service["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    image = lay_out(container["image"].rpartition("/")[2].partition(":")[0], root)
    directories(root, *mounts, "srv/models")
    if name != "reward":  # the images carry the model, but the gateway's no weights
        without = ["*.safetensors"] if name == "gateway" else []
        ignore = shutil.ignore_patterns(".lock", *without)
        shutil.copytree(models, root / "srv/models", dirs_exist_ok=True, ignore=ignore)
    for place, volume in mounts.items():
        if "configMap" in volume:
            at = root / place.lstrip("/")
            (at / "..1").mkdir()
            (at / "..data").symlink_to("..1")
            for key, text in find(objects, "ConfigMap", volume["configMap"]["name"])["data"].items():
                (at / "..1" / key).write_text(text)
                (at / key).symlink_to(f"..data/{key}")
    environment = dict(image.environment) | {"PATH": f"{VENV}/bin:/usr/bin:/bin"}  # /opt/venv/bin in an image
    for each in container.get("envFrom", []):
        environment |= find(objects, "ConfigMap", each["configMapRef"]["name"])["data"]
    environment |= {each["name"]: each.get("value", address) for each in container.get("env", [])}
    environment |= {"PORT": "8080", "K_SERVICE": name, "K_CONFIGURATION": name, "K_REVISION": f"{name}-00001"}
    environment |= {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": f"{name}-00001-deployment-0"}
    writable = [place for place, volume in mounts.items() if "emptyDir" in volume]
    return Pod(name, address, root, command_line(container, image), environment, sorted(writable))


def emulator_pod(objects: list[Object], address: str, emulator: Path, root: Path) -> Pod:
    spec = find(objects, "Deployment", "store-emulator")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    places = [mount["mountPath"] for mount in container["volumeMounts"]]
    directories(root, *places)
    shutil.copy(emulator, root / "fake-gcs-server")
    (root / "fake-gcs-server").chmod(0o755)
    command = ["/fake-gcs-server", "-data", "/data", *container["args"]]  # as its image's entry point has it
    return Pod("store-emulator", address, root, command, {"PATH": "/bin"}, places)


def curl(*arguments: str) -> str:
    command = ["curl", "-s", "-m", "30", "--noproxy", "*", *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout


def main(overlay: Path, models: Path, emulator: Path, root: Path) -> None:
    objects = render(overlay)
    by_name = {service["metadata"]["name"]: service for service in services(objects)}
    names = [*by_name, "store-emulator"]
    addresses = {name: f"10.9.2.{number + 1}" for number, name in enumerate(names)}
    doors = {name: f"10.9.1.{number + 1}" for number, name in enumerate([*names, "broker"])}
    for command in ("link set lo up", "link add cluster type bridge", "link set cluster up"):
        run("ip", *command.split())
    for address in ("10.9.0.1/16", *(f"{door}/32" for door in doors.values())):
        run("ip", "addr", "add", address, "dev", "cluster")
    hosts = "".join(f"{doors[name]} {name}.knapper.svc.cluster.local\n" for name in names)
    (root / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}{doors['broker']} {BROKER}\n")
    run("mount", "--bind", str(root / "hosts"), "/etc/hosts")
    pods = [
        service_pod(objects, by_name[name], addresses[name], models, root / name) if name in by_name
        else emulator_pod(objects, addresses[name], emulator, root / name) for name in names
    ]  # fmt: skip
    relays = [f"{doors[name]},80,{addresses[name]},8080" for name in by_name]
    relays.append(f"{doors['store-emulator']},4443,{addresses['store-emulator']},4443")
    (root / "broker_app.py").write_text(BROKER_APP)
    heard = {
        f"KNAPPER_{name.upper().replace('-', '_')}_URL": subscriber(objects, name)
        for name in ("train-step", "sample", "reward")
    } | {"KNAPPER_GATEWAY_URL": "http://gateway.knapper.svc.cluster.local"}
    broker_environment = {
        "PATH": os.environ["PATH"], "PYTHONPATH": f"{CHECKOUT}:{root}", "KNAPPER_DATA": str(root / "broker"),
        "KNAPPER_EXCHANGE": "gs://knapper", **heard,
    }  # fmt: skip
    for name in ("KNAPPER_STORE", "STORAGE_EMULATOR_HOST"):  # where the key is by which it tells whose an event is
        broker_environment[name] = find(objects, "ConfigMap", "knapper")["data"][name]
    uvicorn = [sys.executable, "-m", "uvicorn", "broker_app:app", "--host", doors["broker"], "--port", "80"]
    others = [
        subprocess.Popen([sys.executable, "-c", RELAY, *relays]),
        subprocess.Popen(uvicorn, env=broker_environment, cwd=root),
    ]
    try:
        for number, pod in enumerate(pods):
            shutil.copy(root / "hosts", pod.root / "etc/hosts")
            (pod.root / "etc/nsswitch.conf").write_text("hosts: files\n")
            pod.start(number)
        for pod in pods:  # queue-proxy's port, where the gateway rings the pod that holds a run
            relay = [sys.executable, "-c", RELAY, f"{pod.address},8012,127.0.0.1,8080"]
            others.append(subprocess.Popen(["nsenter", "-t", str(pod.inside), "-n", *relay]))
        _use(pods, root)
    finally:
        for pod in pods:
            pod.stop()
        for process in others:
            process.kill()


def _use(pods: list[Pod], root: Path) -> None:
    at = {pod.name: pod for pod in pods}
    gateway, store = at["gateway"], f"http://{at['store-emulator'].address}:4443/storage/v1/b/knapper/o"
    url = f"http://{gateway.address}:8080"
    _until(lambda: "ok" in curl(f"{url}/api/v1/healthz"), pods)
    status = ["-o", "/dev/null", "-w", "%{http_code}", "-X", "POST"]
    ping = [
        "-H",
        "ce-specversion: 1.0",
        "-H",
        "ce-type: dev.knative.sources.ping",
        "-H",
        "ce-id: 1",
        "-H",
        "ce-source: /x",
    ]
    assert curl(*status, *ping, f"{url}/events") == "404", "events are taken under the cluster's own name only"
    assert curl(*status, *ping, "http://gateway.knapper.svc.cluster.local/events") == "204"
    enter = ["nsenter", "-t", str(gateway.inside), "-n", "-m"]
    key = run(*enter, *gateway.within("python", "-m", "knapper", "key", "create", "alice")).strip()
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(root), "TINKER_TELEMETRY": "0",
        "TINKER_BASE_URL": url, "TINKER_API_KEY": key,
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", file("out/loop.py")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + "".join(f"\n{pod.name}:\n{pod.said()}" for pod in pods)
    print(done.stdout)
    for name, text in JOB.items():
        uploaded = f"{store.replace('/storage', '/upload/storage')}?uploadType=media&name=inbox/alice/first/{name}"
        assert curl(*status, "--data-binary", text, uploaded) == "200"
    said = f"{store}/jobs%2Falice%2Ffirst%2Fstatus.json?alt=media"
    _until(lambda: any(word in curl(said) for word in ('"completed"', '"failed"')), pods)
    assert json.loads(curl(said))["state"] == "completed", curl(said)
    assert "adapter_model.safetensors" in curl(f"{store}?prefix=jobs/alice/first/adapter/")
    for pod in pods:
        assert "Traceback" not in pod.said(), f"{pod.name}:\n{pod.said()}"


def _until(holds: Callable[[], bool], pods: list[Pod]) -> None:
    end = time.monotonic() + 180
    while not holds():
        assert time.monotonic() < end, "".join(f"\n{pod.name}:\n{pod.said()}" for pod in pods)
        time.sleep(0.5)


# A reward of the user's own: the sandbox must work in a pod without capabilities.
JOB = {
    "reward.py": "def reward(prompt, completion, answer) -> float:\n    return len(set(completion)) / 100\n",
    "prompts.jsonl": "".join(json.dumps({"prompt": f"Say {word}."}) + "\n" for word in ("yes", "no", "perhaps")),
    "job.yaml": (
        "kind: rl\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\ndata: prompts.jsonl\nsteps: 2\n"
        "batch: {prompts: 2, samples: 4}\nsampling: {max_tokens: 8}\nreward: {code: reward.py}\n"
    ),
}

if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
