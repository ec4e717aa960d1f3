"""What is applied to a cluster works when each container's command line runs with the environment that it gets."""

import copy
import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest
import tinker
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from knapper.cluster.kustomize import Object, identity
from knapper.cluster.model import Wanted, objects
from knapper.local.broker.triggers import TRIGGERS
from knapper.models.catalogue import record_of
from tests.cluster.containers import Container, download, running, upload
from tests.conformance import test_training
from tests.conformance.conftest import NewClient
from tests.conformance.server import wait_until
from tests.engine.tiny import tiny_model
from tests.jobs.test_works import JOBS
from tests.jobs.works import CHAT
from tests.manifests.rendering import rendered
from tests.store.emulator import running as emulator_running
from tests.test_metrics import asked
from tests.test_tracing import collecting

MODEL = "example/tiny"


def overlay(model: Path) -> list[Object]:
    """The local overlay as it is, with `knapper deploy add` in the place of the model that the images would carry."""
    local = copy.deepcopy(rendered("overlays/local"))
    record = msgspec.structs.replace(
        record_of(model, MODEL, dtype="float32", train_step_url="", sample_url=""),
        directory="/srv/models/example--tiny", tokenizer_id=MODEL,
    )  # fmt: skip
    *added, entry = objects(local, Wanted(record, accelerator=""))
    kept = [thing for thing in local if thing["metadata"]["name"] not in ("train-step", "sample")]
    for thing in kept:
        if thing["kind"] == "ConfigMap" and thing["metadata"]["name"] == "knapper-models":
            thing["data"] = entry["data"]
    assert len({identity(thing) for thing in [*kept, *added]}) == len(kept) + len(added)
    return [*kept, *added]


@dataclass(frozen=True)
class Trial:
    containers: dict[str, Container]
    url: str
    broker: str
    emulator: str
    key: str
    heard: list[ExportTraceServiceRequest]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    root = tmp_path_factory.mktemp("cluster")
    model = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    (model / "chat_template.jinja").write_text(CHAT)
    with emulator_running(root / "emulator.log") as emulator:
        answer = httpx.post(f"{emulator.url}/storage/v1/b", json={"name": "knapper"}, trust_env=False)
        answer.raise_for_status()
        with (
            collecting() as (collector, heard),
            running(overlay(model), model, emulator.url, root, mischief="7", traces=collector) as (containers, ports),
        ):
            gateway = containers["gateway"]
            # As the operator makes one: kubectl exec into the gateway, and this.
            command = ["python", "-m", "knapper.cli", "key", "create", "demo"]
            made = subprocess.run(
                command, env=gateway.environment, cwd=gateway.directory, capture_output=True, text=True
            )
            assert made.returncode == 0, made.stderr
            url, broker = f"http://127.0.0.1:{ports['gateway']}", f"http://127.0.0.1:{ports['broker']}"
            yield Trial(containers, url, broker, emulator.url, made.stdout.strip(), heard)
    for container in containers.values():
        assert "Traceback" not in container.said(), f"{container.name}:\n{container.said()[-4000:]}"


def test_the_manifests_triggers_are_the_local_brokers() -> None:
    """Who hears what, in YAML and in code: the same, but for the model, of which one machine has one."""
    ours = {(each.subscriber, each.prefix, frozenset(map(_frozen, each.any_of))) for each in TRIGGERS}
    theirs = set()
    for thing in rendered("overlays/local"):
        if thing["kind"] == "Trigger":
            (outer,) = thing["spec"]["filters"]
            parts = outer.get("any") or outer.get("all") or [outer]
            exact = [
                {key: value for key, value in part["exact"].items() if key != "model"}
                for part in parts
                if "exact" in part
            ]
            prefix = next((part["prefix"]["subject"] for part in parts if "prefix" in part), "")
            name = thing["spec"]["subscriber"]["ref"]["name"].replace("-", "_")
            theirs.add((name, prefix, frozenset(map(_frozen, exact))))
    assert theirs == ours


def _frozen(exact: object) -> tuple[tuple[str, str], ...]:
    assert hasattr(exact, "items")
    return tuple(sorted(exact.items()))


@pytest.mark.timeout(240)
def test_the_sdk_trains_and_samples(trial: Trial) -> None:
    with tinker.ServiceClient(base_url=trial.url, api_key=trial.key) as service:

        def new_client(rank: int = 4, seed: int = 1, **train: bool) -> tinker.TrainingClient:
            return service.create_lora_training_client(MODEL, rank=rank, seed=seed, **train).result()  # type: ignore[arg-type]  # flags

        make: NewClient = new_client
        test_training.test_every_log_probability_has_its_own_target(make())
        test_training.test_forward_leaves_the_gradients_alone(make)
        test_training.test_training_lowers_the_loss(make())
        client = make()
        sampler = client.save_weights_and_get_sampling_client().result()
        prompt = tinker.ModelInput.from_ints([1, 2, 3])
        sampled = sampler.sample(prompt, 2, tinker.SamplingParams(max_tokens=5, seed=3)).result()
        assert [len(each.tokens) <= 5 for each in sampled.sequences] == [True, True]
    wait_until(lambda: {"ring", "train_step"} in traces(trial.heard), "a bell and what it led to are one trace")


def test_without_a_key_nothing_opens(trial: Trial) -> None:
    answer = httpx.post(
        f"{trial.url}/api/v1/create_session", json={}, headers={"X-API-Key": "tml-guess"}, trust_env=False
    )
    assert answer.status_code == 401


@pytest.mark.timeout(240)
def test_an_upload_ends_with_an_adapter_whatever_the_broker_does(trial: Trial) -> None:
    """A job by reinforcement through all four, over a Broker that doubles, drops and delays; the tick does the rest."""
    for name, text in JOBS["rl"].items():
        yaml = f"base_model: {MODEL}\n{text}" if name == "job.yaml" else text
        generation = upload(trial.emulator, "knapper", f"inbox/demo/first/{name}", yaml.encode())
        event = {
            "ce-specversion": "1.0", "ce-type": "google.cloud.storage.object.v1.finalized", "ce-id": f"upload-{name}",
            "ce-source": "//storage.googleapis.com/projects/_/buckets/knapper", "content-type": "application/json",
            "ce-subject": f"objects/inbox/demo/first/{name}",
        }  # fmt: skip
        data = {"bucket": "knapper", "name": f"inbox/demo/first/{name}", "generation": generation}
        for _ in range(5):  # the Broker drops some: Pub/Sub would come again, too
            httpx.post(trial.broker, json=data, headers=event, trust_env=False).raise_for_status()
    ping = {
        "ce-specversion": "1.0", "ce-type": "dev.knative.sources.ping", "ce-id": "1", "ce-source": "tick",
        "content-type": "application/json",
    }  # fmt: skip
    end = time.monotonic() + 200
    state: object = None
    while time.monotonic() < end:
        httpx.post(f"{trial.url}/events", json={}, headers=ping, trust_env=False).raise_for_status()
        status = download(trial.emulator, "knapper", "jobs/demo/first/status.json")
        state = json.loads(status) if status else None
        if isinstance(state, dict) and state.get("state") in ("completed", "failed"):
            break
        time.sleep(1)
    assert isinstance(state, dict), {name: each.said()[-1500:] for name, each in trial.containers.items()}
    assert state["state"] == "completed", state
    metrics = download(trial.emulator, "knapper", "jobs/demo/first/metrics.jsonl")
    assert metrics is not None
    assert len(metrics.splitlines()) == 4
    assert download(trial.emulator, "knapper", "jobs/demo/first/adapter/adapter_model.safetensors") is not None
    links = ({"gateway", "sample"}, {"sample", "reward"}, {"reward", "train_step"}, {"train_step", "sample"})
    wait_until(lambda: all(any(link <= one for one in traces(trial.heard)) for link in links), "spans are one trace")


def traces(heard: list[ExportTraceServiceRequest]) -> list[set[str]]:
    """Names of the spans of each trace."""
    found: dict[bytes, set[str]] = {}
    for request in list(heard):
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    found.setdefault(span.trace_id, set()).add(span.name)
    return list(found.values())


def test_every_container_tells_prometheus_what_dashboards_and_alerts_ask_for(trial: Trial) -> None:
    told: set[str] = set()
    for container in trial.containers.values():
        if container.name != "broker":
            port = container.command[container.command.index("--port") + 1]
            answer = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
            assert answer.status_code == 200, container.name
            told |= set(re.findall(r"^# TYPE (knapper_\w+)", answer.text, flags=re.MULTILINE))
    wanted = {name for query in asked().values() for name in re.findall(r"\bknapper_\w+", query)}
    assert {name.removesuffix("_bucket") for name in wanted} <= told
