"""What is applied to a cluster works when each container's command line runs with the environment that it gets."""

import contextlib
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import tinker
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from knapper.local.broker.triggers import TRIGGERS
from tests.cluster.containers import MODEL, Container, download, overlay, running, upload
from tests.cluster.page import file
from tests.conformance.conftest import NewClient, NewService
from tests.conformance.server import wait_until

# The core of the SDK's conformance, as it is elsewhere, over what a cluster runs: with the fixtures of this module.
from tests.conformance.test_bad_input import test_no_datums_at_all_are_refused
from tests.conformance.test_cli import cli, test_a_checkpoints_life_on_the_command_line
from tests.conformance.test_losses import test_losses_are_sums_over_datums_and_tokens
from tests.conformance.test_rest import (
    test_checkpoints_are_listed_with_what_was_said_of_them,
    test_copied_weights_train_and_sample_as_their_source,
    test_publishing_is_idempotent_and_shows,
    test_runs_are_listed_and_found,
    test_usage_counts_what_was_trained_and_stored,
)
from tests.conformance.test_sampling import (
    base,
    test_a_seed_reproduces_its_texts_and_samples_differ,
    test_a_snapshot_is_taken_where_it_was_asked_for,
    test_a_snapshot_never_sees_later_training,
    test_an_inflight_sampler_sees_the_weights_that_were_published,
    test_top_k_and_top_p_draw_from_what_they_leave,
)
from tests.conformance.test_states import (
    test_a_run_of_another_session_goes_on_from_the_state,
    test_a_state_of_another_shape_does_not_fit,
    test_going_on_with_the_optimizer_is_as_if_nothing_had_happened,
)
from tests.conformance.test_training import (
    test_a_custom_loss_of_the_client_gives_its_gradient,
    test_every_log_probability_has_its_own_target,
    test_forward_leaves_the_gradients_alone,
)
from tests.engine.tiny import tiny_model
from tests.jobs.test_works import JOBS
from tests.jobs.works import CHAT
from tests.manifests.rendering import rendered
from tests.observability.test_metrics import asked
from tests.observability.test_traces import collecting
from tests.store.emulator import running as emulator_running

__all__ = [
    "base",
    "cli",
    "test_a_checkpoints_life_on_the_command_line",
    "test_a_custom_loss_of_the_client_gives_its_gradient",
    "test_a_run_of_another_session_goes_on_from_the_state",
    "test_a_seed_reproduces_its_texts_and_samples_differ",
    "test_a_snapshot_is_taken_where_it_was_asked_for",
    "test_a_snapshot_never_sees_later_training",
    "test_a_state_of_another_shape_does_not_fit",
    "test_an_inflight_sampler_sees_the_weights_that_were_published",
    "test_checkpoints_are_listed_with_what_was_said_of_them",
    "test_copied_weights_train_and_sample_as_their_source",
    "test_every_log_probability_has_its_own_target",
    "test_forward_leaves_the_gradients_alone",
    "test_going_on_with_the_optimizer_is_as_if_nothing_had_happened",
    "test_losses_are_sums_over_datums_and_tokens",
    "test_no_datums_at_all_are_refused",
    "test_publishing_is_idempotent_and_shows",
    "test_runs_are_listed_and_found",
    "test_top_k_and_top_p_draw_from_what_they_leave",
    "test_usage_counts_what_was_trained_and_stored",
]
pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is experimental:tinker.lib.experimental.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]


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
    objects = overlay(model, rendered("overlays/local"))
    with emulator_running(root / "emulator.log") as emulator:
        answer = httpx.post(f"{emulator.url}/storage/v1/b", json={"name": "knapper"}, trust_env=False)
        answer.raise_for_status()
        with (
            collecting() as (collector, heard),
            running(objects, model, emulator.url, root, faults="7", traces=collector) as (containers, ports),
        ):
            gateway = containers["gateway"]
            # As the operator makes one: kubectl exec into the gateway, and this.
            command = ["python", "-m", "knapper", "key", "create", "demo"]
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


@pytest.fixture
def model() -> str:
    return MODEL


@pytest.fixture
def environment(trial: Trial, tmp_path: Path) -> dict[str, str]:
    """Of the SDK's command line."""
    return {
        "TINKER_BASE_URL": trial.url, "TINKER_API_KEY": trial.key, "TINKER_TELEMETRY": "0", "HOME": str(tmp_path)
    }  # fmt: skip


@pytest.fixture
def new_service(trial: Trial) -> NewService:
    return lambda: tinker.ServiceClient(base_url=trial.url, api_key=trial.key)


@pytest.fixture
def service(new_service: NewService) -> Iterator[tinker.ServiceClient]:
    with new_service() as client:
        yield client


@pytest.fixture
def new_client(service: tinker.ServiceClient) -> NewClient:
    def make(rank: int = 4, seed: int = 1, **train: bool) -> tinker.TrainingClient:
        return service.create_lora_training_client(MODEL, rank=rank, seed=seed, **train).result()  # type: ignore[arg-type]  # flags

    return make


@pytest.fixture
def client(new_client: NewClient) -> tinker.TrainingClient:
    return new_client()


@dataclass(frozen=True)
class Address:
    """All that the conformance's fixtures of the REST group ask of a server."""

    url: str


@pytest.fixture
def server(trial: Trial) -> Address:
    return Address(trial.url)


@pytest.fixture
def rest(trial: Trial) -> Iterator[tinker.RestClient]:
    yield tinker.RestClient(base_url=trial.url, api_key=trial.key)
    gc.collect()  # the SDK leaves the connection of its first request to the garbage collector


@pytest.fixture
def admin(rest: tinker.RestClient, trial: Trial) -> tinker.AdminClient:
    return tinker.AdminClient(base_url=trial.url, api_key=trial.key)


@pytest.fixture(autouse=True)
def key(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of clients that are not told one."""
    monkeypatch.setenv("TINKER_API_KEY", trial.key)


def test_the_program_of_the_documented_trial_runs(trial: Trial, environment: dict[str, str], tmp_path: Path) -> None:
    program = file("out/loop.py").replace("HuggingFaceTB/SmolLM2-135M-Instruct", MODEL)
    (tmp_path / "loop.py").write_text(program)
    done = subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
    wait_until(lambda: {"ring", "train_step"} in traces(trial.heard), "a bell and what it led to are one trace")
    usage = [sys.executable, "-m", "knapper", "usage"]
    told = subprocess.run(usage, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^ses-\w+:train:0  {MODEL}: 45 tokens trained, \d\.\d+ device seconds$", told, re.MULTILINE)


def test_without_a_key_nothing_opens(trial: Trial) -> None:
    answer = httpx.post(
        f"{trial.url}/api/v1/create_session", json={}, headers={"X-API-Key": "tml-guess"}, trust_env=False
    )
    assert answer.status_code == 401


LINKS = ({"gateway", "sample"}, {"sample", "reward"}, {"reward", "train_step"}, {"train_step", "sample"})


def test_an_upload_ends_with_an_adapter_whatever_the_broker_does(trial: Trial) -> None:
    """A job by reinforcement through all four, over a Broker that doubles, drops and delays; the tick does the rest.

    An event that was dropped links no spans, and a job is started by one alone: then the next job shows the links.
    """
    for job in ("first", "second", "third"):
        upload_job(trial, job)
        state = ended(trial, job)
        assert state["state"] == "completed", state
        metrics = download(trial.emulator, "knapper", f"jobs/demo/{job}/metrics.jsonl")
        assert metrics is not None
        assert len(metrics.splitlines()) == 4
        assert download(trial.emulator, "knapper", f"jobs/demo/{job}/adapter/adapter_model.safetensors") is not None
        with contextlib.suppress(AssertionError):
            wait_until(lambda: linked(trial), "spans are one trace", timeout_s=10.0)
            break
    assert linked(trial), traces(trial.heard)


def linked(trial: Trial) -> bool:
    return all(any(link <= trace for trace in traces(trial.heard)) for link in LINKS)


def upload_job(trial: Trial, job: str) -> None:
    for name, text in JOBS["rl"].items():
        yaml = f"base_model: {MODEL}\n{text}" if name == "job.yaml" else text
        generation = upload(trial.emulator, "knapper", f"inbox/demo/{job}/{name}", yaml.encode())
        event = {
            "ce-specversion": "1.0", "ce-type": "google.cloud.storage.object.v1.finalized",
            "ce-id": f"upload-{job}-{name}", "ce-source": "//storage.googleapis.com/projects/_/buckets/knapper",
            "content-type": "application/json", "ce-subject": f"objects/inbox/demo/{job}/{name}",
        }  # fmt: skip
        data = {"bucket": "knapper", "name": f"inbox/demo/{job}/{name}", "generation": generation}
        for _ in range(5):  # the Broker drops some: Pub/Sub would come again, too
            httpx.post(trial.broker, json=data, headers=event, trust_env=False).raise_for_status()


def ended(trial: Trial, job: str) -> dict[str, object]:
    """Its status, once it has ended; ticked meanwhile, as by a PingSource."""
    ping = {
        "ce-specversion": "1.0", "ce-type": "dev.knative.sources.ping", "ce-id": "1", "ce-source": "tick",
        "content-type": "application/json",
    }  # fmt: skip
    end = time.monotonic() + 200
    while time.monotonic() < end:
        httpx.post(f"{trial.url}/events", json={}, headers=ping, trust_env=False).raise_for_status()
        status = download(trial.emulator, "knapper", f"jobs/demo/{job}/status.json")
        state: dict[str, object] = json.loads(status) if status else {}
        if state.get("state") in ("completed", "failed"):
            return state
        time.sleep(1)
    raise AssertionError({name: each.said()[-1500:] for name, each in trial.containers.items()})


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
    # This cluster has no container of vLLM's; tests/observability/test_metrics.py finds its metrics in the source.
    ours = {name.removesuffix("_bucket") for name in wanted if not name.startswith("knapper_vllm_")}
    assert ours
    assert ours <= told
