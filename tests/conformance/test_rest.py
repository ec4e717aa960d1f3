"""The SDK's RestClient and AdminClient against a real server: every public method, by what it brings about."""

import asyncio
import gc
import inspect
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyrage
import pytest
import tinker
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from tinker import types

from knapper.ids import LOCAL_TENANT, TinkerPath
from knapper.state.checkpoints import Checkpoints
from knapper.state.journal import bundles
from knapper.store.directory import DirectoryStore
from tests.conformance import data
from tests.conformance.conftest import NewClient
from tests.conformance.server import Server

PROMPT = types.ModelInput.from_ints([5, 6, 7])
GREEDY = types.SamplingParams(max_tokens=4, temperature=0.0)

# Public, and without an endpoint of its own here.
NOT_CALLED = {
    "RestClient.get_telemetry": "looks at the client itself; no request is made",
    "AdminClient.get_telemetry": "looks at the client itself; no request is made",
    "RestClient.whoami": "reads the claims of a JWT, which this server does not hand out unless it is told to",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is experimental:tinker.lib.experimental.ExperimentalWarning"),
]


@pytest.fixture
def rest(server: Server) -> Iterator[tinker.RestClient]:
    yield tinker.RestClient(base_url=server.url, api_key="tml-local")
    gc.collect()  # the SDK leaves the connection of its first request to the garbage collector


@pytest.fixture
def admin(rest: tinker.RestClient, server: Server) -> tinker.AdminClient:
    return tinker.AdminClient(base_url=server.url, api_key="tml-local")


def train(client: tinker.TrainingClient, steps: int = 1) -> None:
    rng = np.random.default_rng(7)
    for _ in range(steps):
        client.forward_backward(data.batch(rng), "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()


def drawn(sampler: tinker.SamplingClient) -> tuple[list[int], list[float]]:
    """What it samples, and with which log-probabilities."""
    sequence = sampler.sample(PROMPT, num_samples=1, sampling_params=GREEDY).result().sequences[0]
    assert sequence.logprobs is not None
    return list(sequence.tokens), list(sequence.logprobs)


def run_of(client: tinker.TrainingClient) -> str:
    run: str = client.get_info().model_id
    return run


def refused(call: Callable[[], Any]) -> None:
    with pytest.raises(tinker.NotFoundError):
        call()


def public_methods(kind: type) -> set[str]:
    return {
        f"{kind.__name__}.{name}"
        for name, member in inspect.getmembers(kind, callable)
        if not name.startswith("_") and inspect.isroutine(member)
    }


def test_every_public_method_is_called_here_or_there_is_a_reason() -> None:
    source = inspect.getsource(inspect.getmodule(test_every_public_method_is_called_here_or_there_is_a_reason))  # type: ignore[arg-type]
    missing = set()
    for kind, variable in ((tinker.RestClient, "rest"), (tinker.AdminClient, "admin")):
        for method in public_methods(kind):
            name = method.partition(".")[2]
            if method not in NOT_CALLED and f"{variable}.{name}(" not in source and f'"{method}"' not in source:
                missing.add(method)
    assert not missing
    assert NOT_CALLED.keys() <= public_methods(tinker.RestClient) | public_methods(tinker.AdminClient)
    assert len(public_methods(tinker.RestClient)) == 45


def test_capabilities_name_the_model(rest: tinker.RestClient, model: Any) -> None:
    [found] = rest.get_server_capabilities().result().supported_models
    assert (found.model_name, found.trainable, found.sampleable) == (str(model), True, True)


def test_runs_are_listed_and_found(rest: tinker.RestClient, new_client: NewClient, model: Any) -> None:
    clients = [new_client(rank=2), new_client(rank=3)]
    runs = [run_of(client) for client in clients]
    page = rest.list_training_runs(limit=2).result()
    assert [run.training_run_id for run in page.training_runs] == runs[::-1]
    assert page.cursor.total_count >= 2
    assert rest.list_training_runs(limit=1, offset=1).result().training_runs[0].training_run_id == runs[0]
    path = clients[1].save_state("first").result().path
    found = rest.get_training_run(runs[1], access_scope="accessible").result()
    assert (found.base_model, found.lora_rank, found.is_lora, found.corrupted) == (str(model), 3, True, False)
    assert found.last_checkpoint is not None
    assert found.last_checkpoint.tinker_path == path
    assert abs(found.last_request_time - datetime.now(UTC)) < timedelta(minutes=2)
    assert rest.get_training_run_by_tinker_path(path).result() == found
    refused(lambda: rest.get_training_run("ses-" + "0" * 32 + ":train:0").result())


def test_checkpoints_are_listed_with_what_was_said_of_them(
    rest: tinker.RestClient, client: tinker.TrainingClient
) -> None:
    state = client.save_state("a", ttl_seconds=7200, user_metadata={"step": "1"}).result().path
    sampler = client.save_weights_for_sampler("b").result().path
    found = {each.tinker_path: each for each in rest.list_checkpoints(run_of(client)).result().checkpoints}
    assert {path: each.checkpoint_type for path, each in found.items()} == {state: "training", sampler: "sampler"}
    assert found[state].user_metadata == {"step": "1"}
    assert found[state].expires_at == found[state].time + timedelta(seconds=7200)
    assert (found[state].size_bytes or 0) > (found[sampler].size_bytes or 0) > 0
    page = rest.list_user_checkpoints(limit=2).result()
    assert [each.tinker_path for each in page.checkpoints] == [sampler, state]
    assert page.cursor is not None
    second = rest.list_user_checkpoints(limit=1, offset=1).result().checkpoints
    assert [each.tinker_path for each in second] == [state]


def test_a_deleted_checkpoint_is_gone_for_new_clients_and_not_for_a_sampler_that_holds_it(
    rest: tinker.RestClient, service: tinker.ServiceClient, client: tinker.TrainingClient
) -> None:
    train(client)
    state = client.save_state("a").result().path
    path = client.save_weights_for_sampler("b").result().path
    holder = service.create_sampling_client(model_path=path).result()
    unread = service.create_sampling_client(model_path=path).result()
    before = drawn(holder)
    rest.delete_checkpoint_from_tinker_path(path).result()
    rest.delete_checkpoint(run_of(client), "weights/a").result()
    assert rest.list_checkpoints(run_of(client)).result().checkpoints == []
    refused(lambda: drawn(service.create_sampling_client(model_path=path).result()))
    refused(lambda: service.create_training_client_from_state(state).result())
    assert drawn(holder) == before
    assert drawn(unread) == before, "its weights were not loaded before the checkpoint was deleted"
    assert client.save_state("a").result().path == state, "the name is free again"


def test_a_sampler_whose_weights_are_gone_says_so(
    server: Server, service: tinker.ServiceClient, client: tinker.TrainingClient
) -> None:
    path = client.save_weights_for_sampler("b").result().path
    sampler = service.create_sampling_client(model_path=path).result()

    async def sweep() -> None:
        store = DirectoryStore(server.data / "store")
        found = await Checkpoints(store, time.time).resolve(TinkerPath.parse(path), LOCAL_TENANT)
        await bundles.delete(store, found.bundle)

    asyncio.run(sweep())
    with pytest.raises(tinker.RequestFailedError, match="create another sampling client"):
        drawn(sampler)


def test_publishing_is_idempotent_and_shows(rest: tinker.RestClient, client: tinker.TrainingClient) -> None:
    path = client.save_state("a").result().path

    def public() -> bool:
        return rest.list_checkpoints(run_of(client)).result().checkpoints[0].public

    for _ in range(2):
        rest.publish_checkpoint_from_tinker_path(path).result()
        assert public()
    for _ in range(2):
        rest.unpublish_checkpoint_from_tinker_path(path).result()
        assert not public()


def test_a_time_to_live_is_set_and_taken_away(rest: tinker.RestClient, client: tinker.TrainingClient) -> None:
    path = client.save_state("a").result().path

    def expires_in() -> float | None:
        at = rest.list_checkpoints(run_of(client)).result().checkpoints[0].expires_at
        return None if at is None else (at - datetime.now(UTC)).total_seconds()

    assert expires_in() is None
    rest.set_checkpoint_ttl_from_tinker_path(path, 86400).result()
    assert 86000 < (expires_in() or 0) <= 86400
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    assert expires_in() is None
    with pytest.raises(tinker.UnprocessableEntityError, match="3600"):
        rest.set_checkpoint_ttl_from_tinker_path(path, 60).result()


def test_weights_info_tells_the_shape(rest: tinker.RestClient, new_client: NewClient, model: Any) -> None:
    path = new_client(rank=2, train_mlp=False).save_state("a").result().path
    found = rest.get_weights_info_by_tinker_path(path).result()
    assert (found.base_model, found.is_lora, found.lora_rank) == (str(model), True, 2)
    assert (found.train_attn, found.train_mlp, found.train_unembed) == (True, False, True)


def test_external_weights_are_fetched_by_links(rest: tinker.RestClient, client: tinker.TrainingClient) -> None:
    train(client)
    path = client.save_weights_external("peft").result().path
    [found] = rest.list_checkpoints(run_of(client)).result().checkpoints
    assert (found.checkpoint_type, found.tinker_path) == ("external", path)
    answer = rest.get_external_weights_urls(path).result()
    assert set(answer.urls) == {"adapter_config.json", "adapter_model.safetensors"}
    assert timedelta(minutes=50) < answer.expires - datetime.now(UTC) <= timedelta(hours=1)
    files = {name: fetch(url) for name, url in answer.urls.items()}
    assert json.loads(files["adapter_config.json"])["r"] == 4
    assert sum(map(len, files.values())) == found.size_bytes
    rest.delete_checkpoint_from_tinker_path(path).result()
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        fetch(answer.urls["adapter_config.json"])
    caught.value.close()


def test_encrypted_external_weights_are_read_by_their_recipients_alone(
    rest: tinker.RestClient, service: tinker.ServiceClient, client: tinker.TrainingClient
) -> None:
    """The files end in .age, and hold what the export without recipients holds; each download is another cipher."""
    native, other = pyrage.x25519.Identity.generate(), pyrage.x25519.Identity.generate()
    key = Ed25519PrivateKey.generate()
    ssh = pyrage.ssh.Identity.from_buffer(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    recipients = [str(native.to_public()), public]
    path = client.save_weights_external("secret", age_encryption_recipients=recipients).result().path
    plain = rest.get_external_weights_urls(client.save_weights_external("plain").result().path).result().urls
    urls = rest.get_external_weights_urls(path).result().urls
    assert set(urls) == {"adapter_config.json.age", "adapter_model.safetensors.age"}
    for name, url in urls.items():
        content, again = fetch(url), fetch(url)
        assert content.startswith(b"age-encryption.org/v1\n")
        assert again != content
        wanted = fetch(plain[name.removesuffix(".age")])
        for identity in (native, ssh):
            assert pyrage.decrypt(content, [identity]) == wanted
            assert pyrage.decrypt(again, [identity]) == wanted
        with pytest.raises(pyrage.DecryptError):
            pyrage.decrypt(content, [other])
    for load in (
        lambda: service.create_training_client_from_state(path),
        lambda: client.load_state(path),
        lambda: service.create_sampling_client(model_path=path),
    ):
        with pytest.raises(tinker.TinkerError, match=r"is encrypted for its recipients .* can only be downloaded"):
            load().result()
    copy = rest.copy_weights(path, "archive").result()
    assert set(rest.get_external_weights_urls(copy).result().urls) == set(urls), "a copy is as its source"


@pytest.mark.parametrize(
    ("recipients", "said"),
    [
        (["age1x"], r"recipients\[0\] is 'age1x...'; allowed: native public keys \(age1...\) and SSH public keys"),
        (
            [str(pyrage.x25519.Identity.generate().to_public()), "ssh-ed25519 AAAA"],
            r"recipients\[1\] is 'ssh-ed25519 ...'",
        ),
        ([str(pyrage.x25519.Identity.generate())], r"recipients\[0\] is 'AGE-SECRET-K...'"),
        ([str(pyrage.x25519.Identity.generate().to_public())] * 11, "is '11 recipients'; allowed: up to 10"),
    ],
)
def test_what_is_no_recipient_is_refused_and_no_secret_told(
    client: tinker.TrainingClient, recipients: list[str], said: str
) -> None:
    """Whoever mistakes the secret key for the public one does not read it in a log."""
    with pytest.raises(tinker.RequestFailedError, match=said) as refused:
        client.save_weights_external("peft", age_encryption_recipients=recipients).result()
    assert recipients[0][16:] not in str(refused.value) or len(recipients[0]) <= 16
    ten = [str(pyrage.x25519.Identity.generate().to_public()) for _ in range(10)]
    assert client.save_weights_external("peft", age_encryption_recipients=ten).result().path


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as reply:
        content: bytes = reply.read()
    return content


def test_copied_weights_train_and_sample_as_their_source(
    rest: tinker.RestClient, service: tinker.ServiceClient, client: tinker.TrainingClient
) -> None:
    train(client)
    state = client.save_state("a").result().path
    sampled = client.save_weights_for_sampler("b").result().path
    before = drawn(service.create_sampling_client(model_path=sampled).result())
    copies = [rest.copy_weights(path, "archive", ttl_seconds=7200).result() for path in (state, sampled)]
    for path in (state, sampled):
        rest.delete_checkpoint_from_tinker_path(path).result()
    assert drawn(service.create_sampling_client(model_path=copies[1]).result()) == before
    resumed = service.create_training_client_from_state(copies[0]).result()
    train(resumed)
    assert drawn(resumed.save_weights_and_get_sampling_client().result()) != before
    run = copies[0].removeprefix("tinker://").partition("/")[0]
    [listed] = [
        each for each in rest.list_training_runs(project_id="archive").result().training_runs
        if each.training_run_id == run
    ]  # fmt: skip
    assert listed.last_checkpoint is not None
    assert listed.last_checkpoint.tinker_path == copies[0]


def test_a_service_client_copies_into_its_project(server: Server, client: tinker.TrainingClient) -> None:
    path = client.save_state("a").result().path
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local", project_id="service-archive") as service:
        copied = service.copy_weights(path).result()
        rest = service.create_rest_client()
        found = rest.list_training_runs(project_id="service-archive").result().training_runs
    assert [run.training_run_id for run in found] == [copied.removeprefix("tinker://").partition("/")[0]]


def test_sessions_are_listed_found_and_moved(
    rest: tinker.RestClient, service: tinker.ServiceClient, new_client: NewClient, model: Any
) -> None:
    runs = [run_of(new_client()), run_of(new_client())]
    session = runs[0].partition(":")[0]
    assert session in rest.list_sessions(limit=5).result().sessions
    assert rest.list_sessions(limit=1, offset=10**6).result().sessions == []
    sampler = service.create_sampling_client(base_model=str(model)).result()
    drawn(sampler)
    found = rest.get_session(session, access_scope="accessible").result()
    assert found.training_run_ids == runs
    [sampler_id] = found.sampler_ids
    assert rest.get_sampler(sampler_id).result().base_model == str(model)
    rest.assign_session_project(session, "moved").result()
    listed = rest.list_training_runs(project_id="moved").result().training_runs
    assert [run.training_run_id for run in listed] == runs[::-1]
    refused(lambda: rest.get_session("ses-" + "0" * 32).result())


def test_sessions_are_searched(server: Server, rest: tinker.RestClient, model: Any) -> None:
    made = []
    for n in range(3):
        with tinker.ServiceClient(
            base_url=server.url, api_key="tml-local", display_name=f"search {n}", user_metadata={"suite": "search"}
        ) as service:
            made.append(run_of(service.create_lora_training_client(str(model), rank=2).result()).partition(":")[0])
    request = types.SessionSearchRequest(display_name="search", user_metadata={"suite": "search"}, limit=2)
    first = rest.search_sessions(request).result()
    assert [found.session_id for found in first.sessions] == made[:0:-1]
    assert isinstance(first.sessions[0].status, types.ClientSessionFinished)
    assert first.next_cursor is not None
    second = rest.search_sessions(request.model_copy(update={"cursor": first.next_cursor})).result()
    assert [found.session_id for found in second.sessions] == made[:1]
    assert second.next_cursor is None


def test_a_sessions_trace_is_a_link_to_its_operations(rest: tinker.RestClient, client: tinker.TrainingClient) -> None:
    train(client)
    url = rest.export_session_trace(run_of(client).partition(":")[0]).result()
    trace = json.loads(fetch(url))
    begun = [event["name"] for event in trace["traceEvents"] if event["ph"] == "b"]
    ended = [event for event in trace["traceEvents"] if event["ph"] == "e"]
    assert begun == ["forward_backward", "optim_step"]
    assert [event["args"]["failed"] for event in ended] == [False, False]


def test_the_audit_log_has_what_was_done(
    admin: tinker.AdminClient, rest: tinker.RestClient, client: tinker.TrainingClient
) -> None:
    path = client.save_state("a").result().path
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    entries = admin.get_audit_log("checkpoints").result().entries
    mine = [entry.event for entry in entries if entry.event_details["tinker_path"] == path]
    assert mine == ["checkpoint_publish", "checkpoint_delete"]
    yesterday = (datetime.now(UTC) - timedelta(days=2)).date()
    assert admin.get_audit_log(day=yesterday).result().entries == []


def test_usage_counts_what_was_trained_and_stored(admin: tinker.AdminClient, client: tinker.TrainingClient) -> None:
    rng = np.random.default_rng(7)
    batch = data.batch(rng)
    client.forward_backward(batch, "cross_entropy").result()
    client.save_state("a").result()
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    usage = admin.get_billing_usage(hour - timedelta(hours=1), hour + timedelta(hours=1)).result()
    session = run_of(client).partition(":")[0]
    mine = {event.event_info.type: event.event_info for event in usage.data if event.session_id == session}
    assert isinstance(mine["training"], types.TrainingBillingEvent)
    assert mine["training"].token_count == sum(datum.model_input.length for datum in batch)
    assert isinstance(mine["checkpoint"], types.CheckpointBillingEvent)
    assert mine["checkpoint"].count == 1
    stored = admin.get_current_checkpoint_storage_usage().result().data
    assert sum(row.checkpoint_count for row in stored) >= 1
    assert sum(row.size_bytes for row in stored) > 1000


@pytest.fixture
def twins(rest: tinker.RestClient, client: tinker.TrainingClient) -> dict[str, tuple[Any, ...]]:
    """Arguments for each deprecated twin, in an order in which all of them work."""
    run = run_of(client)
    session = run.partition(":")[0]
    path = client.save_state("a").result().path
    external = client.save_weights_external("e").result().path
    client.save_state("b").result()
    asked = rest.get_session(session).result()
    assert asked.training_run_ids
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    sampler = client.save_weights_and_get_sampling_client().result()
    drawn(sampler)
    [sampler_id] = rest.get_session(session).result().sampler_ids
    return {
        "RestClient.get_training_run_async": (run,),
        "RestClient.get_training_run_by_tinker_path_async": (path,),
        "RestClient.list_training_runs_async": (),
        "RestClient.list_checkpoints_async": (run,),
        "RestClient.list_user_checkpoints_async": (),
        "RestClient.publish_checkpoint_from_tinker_path_async": (path,),
        "RestClient.unpublish_checkpoint_from_tinker_path_async": (path,),
        "RestClient.set_checkpoint_ttl_from_tinker_path_async": (path, 3600),
        "RestClient.get_external_weights_urls_async": (external,),
        "RestClient.copy_weights_async": (path, "archive"),
        "RestClient.get_session_async": (session,),
        "RestClient.list_sessions_async": (),
        "RestClient.assign_session_project_async": (session, "twins"),
        "RestClient.export_session_trace_async": (session,),
        "RestClient.get_sampler_async": (sampler_id,),
        "RestClient.get_audit_log_async": (),
        "RestClient.get_billing_usage_async": (hour, hour + timedelta(hours=1)),
        "RestClient.get_current_checkpoint_storage_usage_async": (),
        "RestClient.delete_checkpoint_async": (run, "weights/b"),
        "RestClient.delete_checkpoint_from_tinker_path_async": (path,),
        "AdminClient.get_audit_log_async": (),
        "AdminClient.get_billing_usage_async": (hour, hour + timedelta(hours=1)),
        "AdminClient.get_current_checkpoint_storage_usage_async": (),
        "RestClient.get_audit_log": (),
        "RestClient.get_billing_usage": (hour, hour + timedelta(hours=1)),
        "RestClient.get_current_checkpoint_storage_usage": (),
    }


def test_the_deprecated_twins_do_the_same(
    rest: tinker.RestClient, admin: tinker.AdminClient, client: tinker.TrainingClient, twins: dict[str, tuple[Any, ...]]
) -> None:
    async def call_all() -> dict[str, Any]:
        answers = {}
        for method, arguments in twins.items():
            kind, _, name = method.partition(".")
            answers[method] = await getattr(rest if kind == "RestClient" else admin, name)(*arguments)
        return answers

    answers = asyncio.run(call_all())
    run = run_of(client)
    assert answers["RestClient.get_training_run_async"].training_run_id == run
    assert answers["RestClient.get_training_run_by_tinker_path_async"].training_run_id == run
    assert len(answers["RestClient.list_checkpoints_async"].checkpoints) == 3
    assert set(answers["RestClient.get_external_weights_urls_async"].urls) >= {"adapter_config.json"}
    assert answers["RestClient.copy_weights_async"].endswith("/weights/a")
    assert fetch(answers["RestClient.export_session_trace_async"])
    assert answers["RestClient.get_session_async"].training_run_ids == [run]
    for kind in ("RestClient", "AdminClient"):
        assert answers[f"{kind}.get_billing_usage_async"].data
        assert answers[f"{kind}.get_current_checkpoint_storage_usage_async"].data
        assert answers[f"{kind}.get_audit_log_async"].entries
    left = rest.list_checkpoints(run).result().checkpoints
    assert [each.checkpoint_id for each in left] == ["external_weights/e"]
