"""One check for a method or a few, by what the call brings about; and what is refused, with the refusal's words."""

import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types
from tinker.lib.api_future_impl import QueueState

from tests.conformance import data
from tests.conformance.compatibility.methods import Noted

KEY = "tml-local"
PROMPT = types.ModelInput.from_ints([5, 6, 7, 8, 9])
ADAM = types.AdamParams(learning_rate=1e-2)


class World:
    """A server that hands out tokens, and clients of it. `twins`: see `Noted`."""

    def __init__(self, url: str, model: str, *, twins: bool) -> None:
        self.url, self.model = url, model
        self.called: set[str] = set()
        self.twins = twins
        self._services: list[tinker.ServiceClient] = []

    def noted(self, client: Any) -> Noted:
        return Noted(client, self.called, twins=self.twins)

    def new_service(self, **more: Any) -> Noted:
        service = tinker.ServiceClient(base_url=self.url, api_key=KEY, **more)
        self._services.append(service)
        return self.noted(service)

    @cached_property
    def service(self) -> Noted:
        return self.new_service()

    @cached_property
    def rest(self) -> Noted:
        return self.noted(tinker.RestClient(base_url=self.url, api_key=KEY))

    @cached_property
    def admin(self) -> Noted:
        return self.noted(tinker.AdminClient(base_url=self.url, api_key=KEY))

    @cached_property
    def training(self) -> Noted:
        """A run with one step behind it."""
        training = self.service.create_lora_training_client(self.model, rank=4, seed=1)
        step(training)
        return training  # type: ignore[no-any-return]  # the SDK's future is untyped

    @cached_property
    def base(self) -> Noted:
        return self.service.create_sampling_client(base_model=self.model)  # type: ignore[no-any-return]  # the SDK's future is untyped

    @property
    def run(self) -> str:
        return str(self.training.client.model_id)

    @property
    def session(self) -> str:
        return self.run.partition(":")[0]

    def close(self) -> None:
        for service in self._services:
            service.close("success").result()


def batch() -> list[types.Datum]:
    return data.batch(np.random.default_rng(31))


def step(training: Noted) -> None:
    training.forward_backward(batch(), "cross_entropy")
    training.optim_step(ADAM)


def loss(training: Noted) -> float:
    return float(training.forward(batch(), "cross_entropy").metrics["loss:sum"])


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as reply:
        content: bytes = reply.read()
    return content


def missing(call: Callable[[], Any]) -> None:
    with pytest.raises(tinker.NotFoundError):
        call()


@dataclass(frozen=True)
class Check:
    """`methods` without their twins. `local`: the client answers by itself."""

    methods: tuple[str, ...]
    sees: str
    call: Callable[[World], None]
    local: bool = False


CHECKS: list[Check] = []


def sees(what: str, *methods: str, local: bool = False) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    """Add a check of `methods`, which looks at `what`."""

    def add(call: Callable[[World], None]) -> Callable[[World], None]:
        CHECKS.append(Check(methods, what, call, local))
        return call

    return add


# ---- ServiceClient


@sees("the new run trains: its loss falls", "ServiceClient.create_lora_training_client")
def create_lora_training_client(world: World) -> None:
    training = world.service.create_lora_training_client(world.model, rank=2)
    before = loss(training)
    step(training)
    assert loss(training) < before
    assert training.client.get_info().lora_rank == 2


@sees(
    "the new run has the loss of the saved one; with the optimizer its next step is the same to the last bit",
    "ServiceClient.create_training_client_from_state",
    "ServiceClient.create_training_client_from_state_with_optimizer",
)
def from_state(world: World) -> None:
    path = world.training.save_state("resume").path
    saved = loss(world.training)
    fresh = world.service.create_training_client_from_state(path)
    resumed = world.service.create_training_client_from_state_with_optimizer(path)
    assert loss(fresh) == loss(resumed) == saved
    for each in (world.training, fresh, resumed):
        step(each)
    assert loss(resumed) == loss(world.training) != loss(fresh)


@sees(
    "the base model and a checkpoint give different log-probabilities",
    "ServiceClient.create_sampling_client",
)
def create_sampling_client(world: World) -> None:
    path = world.training.save_weights_for_sampler("sampled").path
    adapted = world.service.create_sampling_client(model_path=path)
    assert adapted.compute_logprobs(PROMPT) != world.base.compute_logprobs(PROMPT)
    assert adapted.client.get_base_model() == world.model


@sees("the copy is in the client's project, and outlives its source", "ServiceClient.copy_weights")
def service_copy_weights(world: World) -> None:
    saved = loss(world.training)
    path = world.training.save_state("to-copy").path
    service = world.new_service(project_id="copies")
    copied = service.copy_weights(path)
    world.rest.delete_checkpoint_from_tinker_path(path)
    assert loss(world.service.create_training_client_from_state(copied)) == saved
    runs = [run.training_run_id for run in world.rest.list_training_runs(project_id="copies").training_runs]
    assert copied.removeprefix("tinker://").partition("/")[0] in runs


@sees(
    "the client computes the loss: the same value and the same step as the built-in one",
    "ServiceClient.create_custom_loss",
    "TrainingClient.forward_backward_custom",
)
def custom_loss(world: World) -> None:
    def nll(logprobs: Any, weights: Any) -> tuple[Any, dict[str, Any]]:
        value = -(logprobs * weights).sum()
        return value, {"custom/nll:sum": value}

    handle = world.service.create_custom_loss(nll, input_ranks={"logprobs": 1, "weights": 1})
    mine, built_in = (world.service.create_lora_training_client(world.model, rank=2, seed=3) for _ in range(2))
    custom = mine.forward_backward_custom(batch(), handle)
    assert custom.metrics["loss:sum"] == pytest.approx(loss(built_in), rel=1e-5)
    mine.optim_step(ADAM)
    step(built_in)
    assert loss(mine) == loss(built_in)


@sees("the client that it makes lists the models", "ServiceClient.create_rest_client")
def create_rest_client(world: World) -> None:
    rest = world.service.create_rest_client()
    assert [each.model_name for each in rest.get_server_capabilities().supported_models] == [world.model]


@sees("the served model, with its context", "ServiceClient.get_server_capabilities")
def service_capabilities(world: World) -> None:
    [found] = world.service.get_server_capabilities().supported_models
    assert (found.model_name, found.max_context_length, found.trainable) == (world.model, 512, True)


@sees("the session is told as finished, and makes no more runs", "ServiceClient.close")
def close(world: World) -> None:
    service = world.new_service(display_name="to be closed")
    client = service.create_lora_training_client(world.model, rank=2)
    session = str(client.client.model_id).partition(":")[0]
    service.close("success")
    request = types.SessionSearchRequest(session_id=session)
    [found] = world.rest.search_sessions(request).sessions
    assert isinstance(found.status, types.ClientSessionFinished)
    with pytest.raises(RuntimeError, match="closed"):
        service.create_lora_training_client(world.model)


@sees(
    "an address of Tinker's own console, where this server's runs are not",
    "ServiceClient.get_console_url",
    "TrainingClient.get_console_url",
    local=True,
)
def console_urls(world: World) -> None:
    assert world.session in world.training.get_console_url()
    assert world.service.get_console_url().startswith("https://")


@sees(
    "the client's own reporter of events, or None where TINKER_TELEMETRY=0",
    *(
        f"{client}.get_telemetry"
        for client in ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient")
    ),
    local=True,
)
def telemetry(world: World) -> None:
    for client in (world.service, world.training, world.base, world.rest, world.admin):
        assert client.get_telemetry() is None  # tests run with TINKER_TELEMETRY=0


# ---- TrainingClient


@sees("log-probabilities and loss, and no gradient: a step after it changes nothing", "TrainingClient.forward")
def forward(world: World) -> None:
    training = world.service.create_lora_training_client(world.model, rank=2)
    before = training.forward(batch(), "cross_entropy")
    assert [len(each["logprobs"].tolist()) for each in before.loss_fn_outputs] == [17, 30, 9]
    training.optim_step(ADAM)
    assert loss(training) == before.metrics["loss:sum"]


@sees(
    "gradients add up until a step applies them, and the loss falls",
    "TrainingClient.forward_backward",
    "TrainingClient.optim_step",
)
def forward_backward(world: World) -> None:
    training = world.service.create_lora_training_client(world.model, rank=2)
    losses = []
    for _ in range(3):
        losses.append(training.forward_backward(batch(), "cross_entropy").metrics["loss:sum"])
        assert loss(training) == losses[-1]
        training.optim_step(ADAM)
    assert losses == sorted(losses, reverse=True)


@sees(
    "the run goes back to the saved loss; with the optimizer its next step is the same to the last bit",
    "TrainingClient.save_state",
    "TrainingClient.load_state",
    "TrainingClient.load_state_with_optimizer",
)
def load_state(world: World) -> None:
    training = world.training
    path = training.save_state("back", ttl_seconds=3600, user_metadata={"step": "1"}).path
    saved = loss(training)
    after = []
    for load in (training.load_state_with_optimizer, training.load_state_with_optimizer, training.load_state):
        load(path)
        assert loss(training) == saved
        step(training)
        after.append(loss(training))
    assert after[0] == after[1] != after[2]


@sees(
    "what is sampled from is what was saved, whatever is trained later",
    "TrainingClient.save_weights_for_sampler",
    "TrainingClient.create_sampling_client",
    "TrainingClient.save_weights_and_get_sampling_client",
)
def save_for_sampler(world: World) -> None:
    snapshot = world.training.save_weights_and_get_sampling_client()
    path = world.training.save_weights_for_sampler("frozen").path
    before = snapshot.compute_logprobs(PROMPT)
    step(world.training)
    assert world.training.create_sampling_client(path).compute_logprobs(PROMPT) == before
    assert snapshot.compute_logprobs(PROMPT) == before
    assert world.training.save_weights_and_get_sampling_client().compute_logprobs(PROMPT) != before


@sees(
    "a PEFT directory, fetched by its links; deleted, they lead nowhere",
    "TrainingClient.save_weights_external",
    "RestClient.get_external_weights_urls",
)
def external_weights(world: World) -> None:
    path = world.training.save_weights_external("peft").path
    urls = world.rest.get_external_weights_urls(path).urls
    assert json.loads(fetch(urls["adapter_config.json"]))["r"] == 4
    assert len(fetch(urls["adapter_model.safetensors"])) > 10_000
    world.rest.delete_checkpoint_from_tinker_path(path)
    missing(lambda: world.rest.get_external_weights_urls(path))


@sees("the run's id, model and rank", "TrainingClient.get_info")
def get_info(world: World) -> None:
    info = world.training.get_info()
    assert (info.model_id, info.model_data.model_name, info.lora_rank) == (world.run, world.model, 4)


@sees(
    "the model's tokenizer, from its directory or the hub",
    "TrainingClient.get_tokenizer",
    "SamplingClient.get_tokenizer",
    local=True,
)
def tokenizers(world: World) -> None:
    for client in (world.training, world.base):
        tokenizer = client.get_tokenizer()
        assert tokenizer.decode(tokenizer.encode("the and")) == "the and"


# ---- SamplingClient


@sees("texts of their length, reproduced by their seed, with their log-probabilities", "SamplingClient.sample")
def sample(world: World) -> None:
    params = types.SamplingParams(max_tokens=6, seed=4, stop=[])
    first, again = (world.base.sample(PROMPT, 2, params) for _ in range(2))
    tokens = [each.tokens for each in first.sequences]
    assert tokens == [each.tokens for each in again.sequences]
    assert [len(each) for each in tokens] == [6, 6]
    assert all(logprob < 0 for each in first.sequences for logprob in each.logprobs or [0.0])


@sees("a number a token of the prompt but the first, the same as the trainer's", "SamplingClient.compute_logprobs")
def compute_logprobs(world: World) -> None:
    sampler = world.training.save_weights_and_get_sampling_client()
    [datum] = [data.weighted(PROMPT.to_ints())]
    trained = world.training.forward([datum], "cross_entropy").loss_fn_outputs[0]["logprobs"].tolist()
    found = sampler.compute_logprobs(PROMPT)
    assert found[0] is None
    assert found[1:] == pytest.approx(trained, abs=1e-4)


@sees("a client of a session that exists", "SamplingClient.create")
def create(world: World) -> None:
    session = world.base.client._sampling_session_id
    holder = world.service.client.holder
    found = world.noted(tinker.SamplingClient).create(holder, sampling_session_id=session)
    assert found.compute_logprobs(PROMPT) == world.base.compute_logprobs(PROMPT)


@sees(
    "clients made from a handle sample the same, each with requests of its own",
    "SamplingClient.get_sampler_handle",
    "SamplingClient.from_sampler_handle",
)
def handles(world: World) -> None:
    handle = world.base.get_sampler_handle()
    clones = [world.noted(tinker.SamplingClient).from_sampler_handle(handle, api_key=KEY) for _ in range(2)]
    for clone in clones:
        assert clone.compute_logprobs(PROMPT) == world.base.compute_logprobs(PROMPT)
    assert len({clone.client._cloned_sampler_id for clone in clones}) == 2


@sees("the model's name", "SamplingClient.get_base_model", local=True)
def get_base_model(world: World) -> None:
    assert world.base.get_base_model() == world.model


@sees("nothing: the client calls it to print why a sample waits", "SamplingClient.on_queue_state_change", local=True)
def on_queue_state_change(world: World) -> None:
    assert world.base.on_queue_state_change(QueueState.ACTIVE, None) is None


# ---- RestClient


@sees("the served model, with its context", "RestClient.get_server_capabilities")
def rest_capabilities(world: World) -> None:
    [found] = world.rest.get_server_capabilities().supported_models
    assert (found.model_name, found.max_context_length, found.sampleable) == (world.model, 512, True)


@sees("the tenant, where tokens are on (`KNAPPER_JWT=true`); the SDK itself refuses elsewhere", "RestClient.whoami")
def whoami(world: World) -> None:
    assert world.rest.whoami().user_urn == "tml:user:local"


@sees(
    "the new run, with its newest checkpoint",
    "RestClient.list_training_runs",
    "RestClient.get_training_run",
    "RestClient.get_training_run_by_tinker_path",
)
def runs(world: World) -> None:
    path = world.training.save_state("listed").path
    listed = world.rest.list_training_runs(limit=100).training_runs
    [mine] = [run for run in listed if run.training_run_id == world.run]
    assert mine == world.rest.get_training_run(world.run) == world.rest.get_training_run_by_tinker_path(path)
    assert mine.last_checkpoint.tinker_path == path
    missing(lambda: world.rest.get_training_run("ses-" + "0" * 32 + ":train:0"))


@sees(
    "what was saved, newest first, with time to live and metadata",
    "RestClient.list_checkpoints",
    "RestClient.list_user_checkpoints",
)
def checkpoints(world: World) -> None:
    first = world.training.save_state("one", ttl_seconds=7200, user_metadata={"step": "1"}).path
    second = world.training.save_weights_for_sampler("two").path
    found = {each.tinker_path: each for each in world.rest.list_checkpoints(world.run).checkpoints}
    assert found.keys() == {first, second}
    assert found[first].user_metadata == {"step": "1"}
    assert found[first].expires_at == found[first].time + timedelta(seconds=7200)
    newest = world.rest.list_user_checkpoints(limit=2).checkpoints
    assert [each.tinker_path for each in newest] == [second, first]


@sees(
    "nobody can load it any more, and its name is free",
    "RestClient.delete_checkpoint",
    "RestClient.delete_checkpoint_from_tinker_path",
)
def delete(world: World) -> None:
    paths = [world.training.save_state(name).path for name in ("x", "y")]
    world.rest.delete_checkpoint(world.run, "weights/x")
    world.rest.delete_checkpoint_from_tinker_path(paths[1])
    for path in paths:
        missing(lambda path=path: world.service.create_training_client_from_state(path))  # type: ignore[misc]  # a default in a lambda
    assert world.training.save_state("x").path == paths[0]


@sees(
    "it is listed as public, and as private again; twice changes nothing",
    "RestClient.publish_checkpoint_from_tinker_path",
    "RestClient.unpublish_checkpoint_from_tinker_path",
)
def publish(world: World) -> None:
    path = world.training.save_state("shared").path
    rest = world.rest
    for change, public in (
        (rest.publish_checkpoint_from_tinker_path, True),
        (rest.unpublish_checkpoint_from_tinker_path, False),
    ):
        for _ in range(2):
            change(path)
            assert [each.public for each in rest.list_checkpoints(world.run).checkpoints] == [public]


@sees("the day that it expires, or none", "RestClient.set_checkpoint_ttl_from_tinker_path")
def ttl(world: World) -> None:
    path = world.training.save_state("mortal").path
    world.rest.set_checkpoint_ttl_from_tinker_path(path, 86400)
    [found] = world.rest.list_checkpoints(world.run).checkpoints
    assert timedelta(hours=23) < found.expires_at - datetime.now(UTC) <= timedelta(hours=24)
    world.rest.set_checkpoint_ttl_from_tinker_path(path, None)
    assert world.rest.list_checkpoints(world.run).checkpoints[0].expires_at is None


@sees("model, rank, and what was trained", "RestClient.get_weights_info_by_tinker_path")
def weights_info(world: World) -> None:
    found = world.rest.get_weights_info_by_tinker_path(world.training.save_state("told").path)
    assert (found.base_model, found.lora_rank, found.train_mlp) == (world.model, 4, True)


@sees("the copy outlives its source, and trains on", "RestClient.copy_weights")
def copy_weights(world: World) -> None:
    saved = loss(world.training)
    path = world.training.save_state("source").path
    copied = world.rest.copy_weights(path, "archive", ttl_seconds=7200)
    world.rest.delete_checkpoint_from_tinker_path(path)
    resumed = world.service.create_training_client_from_state(copied)
    assert loss(resumed) == saved
    step(resumed)
    assert loss(resumed) != saved


@sees(
    "the session, its runs and samplers; and its runs in the project that it was moved to",
    "RestClient.list_sessions",
    "RestClient.get_session",
    "RestClient.assign_session_project",
    "RestClient.get_sampler",
)
def sessions(world: World) -> None:
    assert world.session in world.rest.list_sessions(limit=100).sessions
    world.base.compute_logprobs(PROMPT)
    found = world.rest.get_session(world.training.client.model_id.partition(":")[0])
    assert found.training_run_ids == [world.run]
    [sampler] = found.sampler_ids
    assert world.rest.get_sampler(sampler).base_model == world.model
    world.rest.assign_session_project(world.session, f"project-of-{world.session}")
    moved = world.rest.list_training_runs(project_id=f"project-of-{world.session}").training_runs
    assert [run.training_run_id for run in moved] == [world.run]


@sees("by name and metadata, newest first, page after page", "RestClient.search_sessions")
def search_sessions(world: World) -> None:
    name = f"searched {world.session}"
    for _ in range(2):
        world.new_service(display_name=name).create_lora_training_client(world.model, rank=2)
    request = types.SessionSearchRequest(display_name=name, limit=1)
    first = world.rest.search_sessions(request)
    second = world.rest.search_sessions(request.model_copy(update={"cursor": first.next_cursor}))
    assert second.sessions[0].created_at <= first.sessions[0].created_at
    assert {each.display_name for each in [*first.sessions, *second.sessions]} == {name}
    assert first.sessions[0].session_id != second.sessions[0].session_id


@sees("a file for Perfetto, with the run's operations", "RestClient.export_session_trace")
def trace(world: World) -> None:
    run = world.training
    events = json.loads(fetch(world.rest.export_session_trace(run.client.model_id.partition(":")[0])))["traceEvents"]
    assert [event["name"] for event in events if event["ph"] == "b"] == ["forward_backward", "optim_step"]


# ---- AdminClient, and the same on RestClient


@sees("what was done to a checkpoint", "AdminClient.get_audit_log", "RestClient.get_audit_log")
def audit(world: World) -> None:
    path = world.training.save_state("watched").path
    world.rest.publish_checkpoint_from_tinker_path(path)
    for client in (world.admin, world.rest):
        entries = client.get_audit_log("checkpoints").entries
        mine = [entry.event for entry in entries if entry.event_details["tinker_path"] == path]
        assert mine == ["checkpoint_publish"]


@sees("the tokens that a session trained on", "AdminClient.get_billing_usage", "RestClient.get_billing_usage")
def usage(world: World) -> None:
    session = world.session  # with one step behind it
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    for client in (world.admin, world.rest):
        events = client.get_billing_usage(hour - timedelta(hours=1), hour + timedelta(hours=1)).data
        [mine] = [
            each.event_info for each in events if each.session_id == session and each.event_info.type == "training"
        ]
        assert mine.token_count == sum(datum.model_input.length for datum in batch())


@sees(
    "the bytes of the checkpoints that there are",
    "AdminClient.get_current_checkpoint_storage_usage",
    "RestClient.get_current_checkpoint_storage_usage",
)
def storage(world: World) -> None:
    def stored(client: Noted) -> int:
        return sum(row.size_bytes for row in client.get_current_checkpoint_storage_usage().data)

    before = stored(world.admin)
    path = world.training.save_state("weighed").path
    [size] = [each.size_bytes for each in world.rest.list_checkpoints(world.run).checkpoints]
    assert stored(world.admin) - before == size
    world.rest.delete_checkpoint_from_tinker_path(path)
    assert stored(world.rest) == before


# ---- what is refused


@dataclass(frozen=True)
class Refusal:
    """`asks` raises an error whose message has `says` in it."""

    what: str
    says: str
    asks: Callable[[World], Any]


def _sample(world: World, **more: Any) -> Any:
    return world.base.sample(PROMPT, 1, types.SamplingParams(max_tokens=1), **more)


def _image() -> types.ModelInput:
    return types.ModelInput(chunks=[types.ImageChunk(data=b"", format="png", expected_tokens=1)])


REFUSALS = [
    Refusal(
        'loss `"stable_reinforce"`',
        "pass importance_sampling, ppo or cispo instead",
        lambda world: world.training.forward_backward(batch(), "stable_reinforce"),
    ),
    Refusal(
        "sampling clients with `record_stability_info=True`",
        "Create the sampling client without it, and pass the loss importance_sampling, ppo or cispo",
        lambda world: world.service.create_sampling_client(
            base_model=world.model, record_stability_info=True
        ).compute_logprobs(PROMPT),
    ),
    Refusal(
        "optimizer other than AdamW (`DimuonConfig`, `DimuonParams`)",
        "Use tinker.AdamParams; no other optimizer is served",
        lambda world: world.training.optim_step(types.DimuonParams(learning_rate=1e-3)),
    ),
    Refusal(
        'loss `"custom"`, computed on the server',
        "use forward_backward_custom, which computes your loss on the client",
        lambda world: world.training.forward_backward(batch(), "custom"),
    ),
    Refusal(
        "`weights_access_token`",
        "The checkpoint's owner can publish it (`tinker checkpoint publish`), and then anyone's key loads it",
        lambda world: world.service.create_training_client_from_state(
            world.training.save_state("guarded").path, weights_access_token="token"
        ),
    ),
    Refusal(
        "copies with `weights_access_token`",
        "The checkpoint's owner can publish it (`tinker checkpoint publish`), and then anyone's key loads it",
        lambda world: world.rest.copy_weights(
            world.training.save_state("guarded-too").path, "project", weights_access_token="token"
        ),
    ),
    Refusal(
        "images in a prompt, of a model of text",
        "This model is text only: send token ids",
        lambda world: world.base.sample(_image(), 1, types.SamplingParams(max_tokens=1)),
    ),
    Refusal(
        "images in training data, of a model of text",
        "This model is text only: send token ids",
        lambda world: world.training.forward_backward(
            [types.Datum(model_input=_image(), loss_fn_inputs={"target_tokens": [1], "weights": [1.0]})],
            "cross_entropy",
        ),
    ),
    Refusal(
        "a base model that the server does not have",
        "Use one of them, or start knapper with --model",
        lambda world: world.service.create_lora_training_client("nobody/nothing", rank=4),
    ),
    Refusal(
        "a rank over 256",
        "allowed: 1 to 256",
        lambda world: world.service.create_lora_training_client(world.model, rank=257),
    ),
]
