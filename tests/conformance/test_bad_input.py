"""What is wrong is refused, in words that name the field, the value and what is allowed; and everybody goes on."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
from tinker import types
from tinker.proto import tinker_public_pb2 as pb

from tests.conformance import data
from tests.conformance.conftest import NewClient, Trained
from tests.conformance.data import CE
from tests.conformance.server import Server

pytestmark = pytest.mark.timeout(60)
rng = np.random.default_rng
TEXT = data.tokens(rng(0), 9)
PROMPT = types.ModelInput.from_ints(TEXT)


@pytest.fixture(scope="module")
def neighbour(server: Server, model: Path) -> Iterator[Callable[[], None]]:
    """Somebody else, who trains and samples on, and gets the same answers as ever."""
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        client = service.create_lora_training_client(str(model), rank=2, seed=1).result()
        sampler = client.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=4, seed=1, stop=[])
        first: list[object] = []

        def goes_on() -> None:
            output = client.forward_backward([data.weighted(TEXT)], CE).result()
            answer = sampler.sample(PROMPT, 1, params).result()
            seen = (data.bits(output), answer.sequences[0].tokens)
            first.append(seen)
            assert seen == first[0]

        goes_on()
        yield goes_on


@pytest.fixture(autouse=True)
def everybody_else_goes_on(neighbour: Callable[[], None]) -> Iterator[None]:
    yield
    neighbour()


def datum(text: list[int] = TEXT, **inputs: Any) -> types.Datum:
    given = {"target_tokens": text[1:], "weights": [1.0] * (len(text) - 1), **inputs}
    return types.Datum(
        model_input=types.ModelInput.from_ints(text[:-1]),
        loss_fn_inputs={name: value for name, value in given.items() if value is not None},
    )


def rl(**inputs: Any) -> types.Datum:
    n = len(TEXT) - 1
    return datum(**{"weights": None, "logprobs": [-5.0] * n, "advantages": [1.0] * n, **inputs})


def far(n: int) -> list[float]:
    return [1.0] * n


IMAGE = types.Datum(
    model_input=types.ModelInput(chunks=[types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=2)]),
    loss_fn_inputs={"target_tokens": [1, 2], "weights": [1.0, 1.0]},
)
ONE = len(TEXT) - 1

# what is wrong: (datums, loss, config, what the client reads)
BATCHES: dict[str, tuple[list[types.Datum], str, dict[str, Any] | None, str]] = {
    "weights too short": ([datum(), datum(weights=far(3))], CE, None, r"datum 1.*weights has 3 values.*has 8"),
    "targets too long": ([datum(target_tokens=[*TEXT, 1], weights=far(10))], CE, None, r"target_tokens has 10.*8 tok"),
    "a token past the vocabulary": ([datum([1, 2, 4000, 3])], CE, None, r"model_input\[2\] is 4000; allowed: 0 to 267"),
    "a negative token": ([datum([1, 2, -7, 3])], CE, None, r"model_input\[2\] is -7; allowed: 0 to 267"),
    "a target past the vocabulary": ([datum(target_tokens=[*TEXT[2:], 300])], CE, None, r"target_tokens\[7\] is 300"),
    "a text past the context": ([datum([1] * 514)], CE, None, r"length in tokens is 513; allowed: 1 to 512"),
    "an empty text": ([datum([1])], CE, None, r"length in tokens is 0; allowed: 1 to 512"),
    "a weight that is no number": ([datum(weights=[1.0, math.nan, *far(6)])], CE, None, r"weights\[1\] is nan.*finite"),
    "an infinite weight": ([datum(weights=[*far(7), math.inf])], CE, None, r"weights\[7\] is inf.*finite"),
    "an advantage that is no number": ([rl(advantages=[math.nan] * ONE)], "ppo", None, r"advantages\[0\] is nan"),
    "no advantages": ([rl(advantages=None)], "cispo", None, r"no advantages.*cispo needs"),
    "an input that the loss does not read": ([datum(advantages=far(ONE))], CE, None, r"'advantages'; allowed for"),
    "an unknown loss": ([datum()], "hinge", None, r"loss_fn is 'hinge'; allowed: cross_entropy, importance_sampling"),
    "a loss without a published formula": ([rl()], "stable_reinforce", None, r"stable_reinforce.*not published"),
    "an unknown config key": ([rl()], "ppo", {"clip": 0.2}, r"'clip'.* is 0.2.*takes clip_low_threshold"),
    "a config key of another loss": ([rl()], "dro", {"clip_low_threshold": 0.2}, r"clip_low_threshold.*beta"),
    "a config value that is no number": ([rl()], "dro", {"beta": math.nan}, r"beta.* is nan.*finite"),
    "a negative config value": ([rl()], "dro", {"beta": -1.0}, r"beta.* is -1.0.*0 or more"),
    "a config value that is a text": ([rl()], "dro", {"beta": "big"}, r"beta.* is 'big'"),
    "thresholds the wrong way round": (
        [rl()], "ppo", {"clip_low_threshold": 1.3, "clip_high_threshold": 1.1}, r"1.3, 1.1.*low not above high",
    ),
    "an image": ([IMAGE], CE, None, r"chunks\[0\] is 'image'; allowed: encoded_text"),
    "too many columns": (
        [datum(target_tokens=np.ones((ONE, 65), int), weights=np.ones((ONE, 65), np.float32))],
        CE, None, r"K is 65; allowed: at most 64",
    ),
    "columns for a loss of one": (
        [rl(target_tokens=np.ones((ONE, 2), int), **{k: np.ones((ONE, 2)) for k in ("logprobs", "advantages")})],
        "ppo", None, r"target_tokens' shape is \(8, 2\); allowed: \(N\) for ppo",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", BATCHES)
def test_a_batch_that_is_wrong_is_refused_and_leaves_the_run_as_it_was(wrong: str, new_client: NewClient) -> None:
    batch, loss, config, said = BATCHES[wrong]
    client, spared = new_client(rank=2), new_client(rank=2)
    good = [data.weighted(TEXT)]
    for each in (client, spared):
        each.forward_backward(good, CE)
    call: Any = client.forward_backward
    with pytest.raises(tinker.RequestFailedError, match=said) as refused:
        call(batch, loss, config).result()
    assert refused.value.category.value == "user"
    steps = [each.optim_step(types.AdamParams(learning_rate=1e-2)) for each in (client, spared)]
    for step in steps:
        step.result()
    one, other = (data.bits(each.forward(good, CE).result()) for each in (client, spared))
    assert one == other


def test_no_datums_at_all_are_refused(client: tinker.TrainingClient) -> None:
    with pytest.raises((tinker.TinkerError, ValueError)):
        client.forward_backward([], CE).result()
    client.forward_backward([datum()], CE).result()


@pytest.mark.parametrize("content", ["zeros", "noise"])
def test_a_body_of_seventy_megabytes_is_refused(content: str, client: tinker.TrainingClient) -> None:
    """Whether it is that large on the wire or only once it is decompressed."""
    size = 18 * 2**20
    weights = np.zeros(size, np.float32) if content == "zeros" else rng(1).random(size, np.float32)
    huge = types.Datum(
        model_input=types.ModelInput.from_ints(TEXT[:-1]),
        loss_fn_inputs={"target_tokens": TEXT[1:], "weights": weights},
    )
    with pytest.raises(tinker.TinkerError, match=r"over 67108864 bytes.*allowed"):
        client.forward_backward([huge], CE).result()
    client.forward_backward([datum()], CE).result()


STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "a learning rate that is no number": ({"learning_rate": math.nan}, r"learning_rate"),
    "an infinite learning rate": ({"learning_rate": math.inf}, r"learning_rate"),
    "a negative learning rate": ({"learning_rate": -1e-4}, r"learning_rate is -0.0001; allowed: .*>= 0"),
    "a beta of one": ({"beta1": 1.0}, r"beta1 is 1.0"),
    "a negative eps": ({"eps": -1.0}, r"eps is -1"),
    "a negative clip": ({"grad_clip_norm": -1.0}, r"grad_clip_norm is -1"),
}


@pytest.mark.parametrize("wrong", STEPS)
def test_a_step_that_is_wrong_is_refused_and_the_run_goes_on(wrong: str, client: tinker.TrainingClient) -> None:
    values, said = STEPS[wrong]
    client.forward_backward([datum()], CE).result()
    before = data.bits(client.forward([datum()], CE).result())
    with pytest.raises((tinker.TinkerError, ValueError), match=said):
        client.optim_step(types.AdamParams(**values)).result(30)
    assert data.bits(client.forward([datum()], CE).result(30)) == before


def test_another_optimizer_is_refused_and_the_run_goes_on(client: tinker.TrainingClient) -> None:
    client.forward_backward([datum()], CE)
    with pytest.raises(tinker.RequestFailedError, match=r"optimizer_params.*dimuon.*adamw"):
        client.optim_step(types.DimuonParams(learning_rate=1e-3)).result()
    client.optim_step(types.AdamParams()).result()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", ".hidden", "x" * 129, "nul\0", "ünïcode"])
def test_a_checkpoint_name_that_is_none_is_refused_and_the_run_goes_on(
    name: str, client: tinker.TrainingClient
) -> None:
    for save in (client.save_state, client.save_weights_for_sampler):
        with pytest.raises(tinker.TinkerError, match=r"path is.*allowed"):
            save(name).result()
    assert client.save_state("good").result().path.endswith("/weights/good")


@pytest.mark.parametrize("ttl", [5, -1, 10**12])
def test_a_time_to_live_out_of_range_is_refused(ttl: int, client: tinker.TrainingClient) -> None:
    with pytest.raises(tinker.TinkerError, match=rf"ttl_seconds is {ttl}.*allowed"):
        client.save_state("short", ttl_seconds=ttl).result()
    client.save_state("good", ttl_seconds=3600).result()


def test_an_access_token_is_refused_and_the_run_goes_on(client: tinker.TrainingClient) -> None:
    path = client.save_state("mine").result().path
    with (
        pytest.warns(FutureWarning),
        pytest.raises(tinker.RequestFailedError, match=r"weights_access_token.*allowed: none"),
    ):
        client.load_state(path, weights_access_token="secret").result()
    client.forward([datum()], CE).result(20)


RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown model": ({"base_model": "meta-llama/Llama-9"}, r"meta-llama/Llama-9.*{model}"),
    "rank zero": ({"rank": 0}, r"rank is 0; allowed: 1 to 256"),
    "a negative rank": ({"rank": -4}, r"rank is -4; allowed: 1 to 256"),
    "a rank too large": ({"rank": 257}, r"rank is 257; allowed: 1 to 256"),
    "a seed too large": ({"seed": 2**70}, r"seed"),
    "another optimizer": ({"optimizer": types.DimuonOptimizerConfig()}, r"optimizer_config.*dimuon.*adamw"),
}


@pytest.mark.parametrize("wrong", RUNS)
def test_a_run_that_cannot_be_is_refused(wrong: str, service: tinker.ServiceClient, model: Path) -> None:
    values, said = RUNS[wrong]
    with pytest.raises(tinker.TinkerError, match=said.replace("{model}", str(model))):
        service.create_lora_training_client(**{"base_model": str(model), **values}).result()
    service.create_lora_training_client(str(model), rank=256).result()


SAMPLES: dict[str, tuple[list[int], dict[str, Any], dict[str, Any], str]] = {
    "an empty prompt": ([], {}, {}, r"prompt.*at least one token"),
    "a token past the vocabulary": ([1, 268], {}, {}, r"prompt\[1\] is 268; allowed: .*0 to 267"),
    "a prompt past the context": ([1] * 513, {}, {}, r"length is 512 tokens, .* it has 513; allowed: up to 511"),
    "a negative temperature": (TEXT, {"temperature": -1.0}, {}, r"temperature is -1"),
    "top_p of zero": (TEXT, {"top_p": 0.0}, {}, r"top_p is 0"),
    "top_k of zero": (TEXT, {"top_k": 0}, {}, r"top_k is 0; allowed: -1"),
    "no tokens to sample": (TEXT, {"max_tokens": 0}, {}, r"max_tokens is 0"),
    "an empty stop": (TEXT, {"stop": [""]}, {}, r"stop.*allowed"),
    "a stop past the vocabulary": (TEXT, {"stop": [5000]}, {}, r"stop is 5000; allowed: token ids 0 to 267"),
    "too many stops": (TEXT, {"stop": [str(n) for n in range(65)]}, {}, r"stop: count is 65; allowed: at most 64"),
    "too many samples": (TEXT, {}, {"num_samples": 1025}, r"num_samples is 1025"),
    "no samples": (TEXT, {}, {"num_samples": 0}, r"num_samples is 0"),
    "too many alternatives": (TEXT, {}, {"topk_sample_logprobs": 65}, r"topk_sample_logprobs is 65"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", SAMPLES)
def test_a_sample_that_cannot_be_is_refused(wrong: str, service: tinker.ServiceClient, model: Path) -> None:
    tokens, values, more, said = SAMPLES[wrong]
    sampler = service.create_sampling_client(base_model=str(model)).result()
    params = types.SamplingParams(**{"max_tokens": 4, **values})
    with pytest.raises(tinker.TinkerError, match=said):
        sampler.sample(
            types.ModelInput.from_ints(tokens), **{"num_samples": 1, "sampling_params": params, **more}
        ).result()
    assert sampler.sample(PROMPT, 1, types.SamplingParams(max_tokens=2, stop=[])).result().sequences


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"base_model": "no/model"}, "no/model"),
        ({"model_path": "tinker://ses-00000000000000000000000000000000:train:0/weights/x"}, "does not exist"),
        ({"model_path": "file:///etc/passwd"}, "tinker://"),
    ],
)
def test_a_sampler_of_nothing_is_refused(asked: dict[str, Any], said: str, service: tinker.ServiceClient) -> None:
    with pytest.raises((tinker.TinkerError, ValueError), match=said):
        service.create_sampling_client(**asked).result()


def test_a_sampler_of_one_model_cannot_name_another(service: tinker.ServiceClient, trained: Trained) -> None:
    with pytest.raises(tinker.TinkerError, match=r"base_model is 'other/model'"):
        service.create_sampling_client(model_path=trained.path, base_model="other/model").result()


# ---- what the SDK itself would not send


def post(server: Server, path: str, **what: Any) -> httpx.Response:
    headers = {"X-API-Key": "tml-local", **what.pop("headers", {})}
    return httpx.post(f"{server.url}/api/v1/{path}", headers=headers, timeout=30, **what)


PROTO = {"Content-Type": "application/x-protobuf"}


@pytest.mark.parametrize("body", [b"", b"\xff\xff\xff\xff", b"not protobuf at all", b"\x0a\xff\xff\xff\xff\x0f"])
def test_broken_protobuf_is_refused(body: bytes, server: Server) -> None:
    refused = post(server, "forward_backward", content=body, headers=PROTO)
    assert 400 <= refused.status_code < 500, refused.text
    assert refused.json()["detail"]


def test_broken_compression_is_refused(server: Server) -> None:
    for encoding, content in (("zstd", b"not zstd"), ("br", b"x"), ("zstd", b"\x28\xb5\x2f\xfd\x00")):
        headers = {**PROTO, "Content-Encoding": encoding}
        refused = post(server, "forward_backward", content=content, headers=headers)
        assert 400 <= refused.status_code < 500, refused.text
        assert refused.json()["detail"]


def test_a_request_for_an_unknown_run_is_refused(server: Server) -> None:
    unknown = "ses-" + "0" * 32 + ":train:0"
    body = pb.ForwardBackwardRequest(model_id=unknown, seq_id=1, loss_fn=CE).SerializeToString()
    for refused in (
        post(server, "forward_backward", content=body, headers=PROTO),
        post(server, "get_info", json={"model_id": unknown}),
        post(server, "retrieve_future", json={"request_id": f"{unknown}:1"}),
        post(server, "save_weights", json={"model_id": "../../etc", "seq_id": 1, "path": "x"}),
    ):
        assert refused.status_code == 404
        assert "does not exist" in refused.json()["detail"]


def test_protobuf_that_is_broken_after_its_address_is_answered_through_the_future(
    server: Server, client: tinker.TrainingClient
) -> None:
    """So that the number that the client gave it leaves no hole."""
    request = pb.ForwardBackwardRequest(model_id=client.model_id, seq_id=1, loss_fn=CE)
    promised = post(server, "forward_backward", content=request.SerializeToString() + b"\x1a\xff\xff", headers=PROTO)
    assert promised.status_code == 200, promised.text
    answer = post(server, "retrieve_future", json={"request_id": promised.json()["request_id"]})
    assert answer.json()["category"] == "user"
    assert "protobuf" in answer.json()["error"]
    step = {"model_id": client.model_id, "seq_id": 2, "adam_params": {}, "type": "optim_step"}
    promised = post(server, "optim_step", json=step)
    assert "error" not in post(server, "retrieve_future", json={"request_id": promised.json()["request_id"]}).json()


def test_the_same_number_for_another_request_is_refused(server: Server, client: tinker.TrainingClient) -> None:
    def request(text: list[int]) -> bytes:
        message = pb.ForwardBackwardRequest(model_id=client.model_id, seq_id=1, loss_fn=CE, forward_only=True)
        sent = message.data.add()
        sent.model_input.add().encoded_text.tokens = np.array(text[:-1], "<i4").tobytes()
        for name, values in (("target_tokens", np.array(text[1:], "<i8")), ("weights", np.ones(8, "<f4"))):
            tensor = sent.loss_fn_inputs[name]
            tensor.dense, tensor.dtype = (
                values.tobytes(),
                pb.DTYPE_INT64 if name == "target_tokens" else pb.DTYPE_FLOAT32,
            )
            tensor.shape.append(8)
        return message.SerializeToString()

    first, again = (post(server, "forward_backward", content=request(TEXT), headers=PROTO) for _ in range(2))
    assert first.status_code == again.status_code == 200
    assert first.json() == again.json()
    other = post(server, "forward_backward", content=request(TEXT[::-1]), headers=PROTO)
    assert other.status_code in (400, 422), other.text
    assert "seq_id" in other.json()["detail"]
    answers = [post(server, "retrieve_future", json={"request_id": first.json()["request_id"]}) for _ in range(2)]
    assert answers[0].content == answers[1].content


def test_json_with_a_field_that_nobody_knows_is_refused(server: Server, client: tinker.TrainingClient) -> None:
    refused = post(server, "get_info", json={"model_id": client.model_id, "colour": "red"})
    assert refused.status_code == 422
    assert "colour" in refused.json()["detail"]


def test_a_page_that_is_not_there_says_which_protocol_is(server: Server) -> None:
    refused = post(server, "no_such_thing", json={})
    assert refused.status_code == 404
    assert "no_such_thing" in refused.json()["detail"]


def test_a_request_without_a_key_is_refused(server: Server) -> None:
    refused = httpx.post(f"{server.url}/api/v1/client/config", json={})
    assert refused.status_code == 401
    assert "X-API-Key" in refused.json()["detail"]
