"""The JSON requests: what the SDK sends is understood, what it should not send is refused by name."""

import json
import re
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker import types as sdk
from tinker.lib.public_interfaces.sampling_client import _tensor_data_to_model

from knapper import ids, limits
from knapper.errors import InvalidField, TooLarge, UserError
from knapper.wire import fields, requests, sample_requests, types

SESSION = "ses-" + "0" * 32
RUN = SESSION + ":train:0"
TEXT = sdk.ModelInput(chunks=[sdk.EncodedTextChunk(tokens=[1, 2]), sdk.EncodedTextChunk(tokens=[3])])

ADAM = {"learning_rate": 3e-4, "beta1": 0.8, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1, "grad_clip_norm": 1.0}
SENT: list[tuple[Any, type[fields.RequestBody]]] = [
    (sdk.CreateSessionRequest(tags=["a"], user_metadata={"k": 1}, sdk_version="0.38.0"), requests.CreateSession),
    (sdk.SessionHeartbeatRequest(session_id=SESSION), requests.Heartbeat),
    (
        sdk.CreateModelRequest(
            session_id=SESSION, model_seq_id=0, base_model="m", lora_config=sdk.LoraConfig(rank=8, seed=3)
        ),
        requests.CreateModel,
    ),
    (sdk.GetInfoRequest(model_id=RUN), requests.GetInfo),
    (sdk.OptimStepRequest(model_id=RUN, seq_id=2, optim_params=sdk.AdamParams(**ADAM)), requests.OptimStep),
    (sdk.SaveWeightsRequest(model_id=RUN, seq_id=3, path="a", ttl_seconds=3600), requests.SaveWeights),
    (
        sdk.SaveWeightsForSamplerRequest(model_id=RUN, seq_id=4, sampling_session_seq_id=1, kind="inflight"),
        requests.SaveWeightsForSampler,
    ),
    (sdk.LoadWeightsRequest(model_id=RUN, seq_id=5, path="tinker://x", optimizer=True), requests.LoadWeights),
    (
        sdk.LoadWeightsRequest(session_id=SESSION, model_seq_id=1, path="tinker://x", optimizer=False),
        requests.LoadWeights,
    ),
    (
        sdk.CreateSamplingSessionRequest(session_id=SESSION, sampling_session_seq_id=0, base_model="m"),
        sample_requests.CreateSamplingSession,
    ),
    (
        sdk.SampleRequest(
            sampling_session_id=SESSION + ":sample:0",
            seq_id=10**15,
            prompt=TEXT,
            sampling_params=sdk.SamplingParams(max_tokens=5, stop=["a"], seed=7),
            num_samples=2,
            prompt_logprobs=True,
            topk_prompt_logprobs=3,
        ),
        sample_requests.AsampleBody,
    ),
    (sdk.FutureRetrieveRequest(request_id="s-1", allow_metadata_only=True), requests.RetrieveFuture),
]


def dump(request: Any) -> bytes:
    return msgspec.json.encode(request.model_dump(mode="json", exclude_none=True))


@pytest.mark.parametrize(("sent", "kind"), SENT, ids=lambda value: type(value).__name__)
def test_what_the_sdk_sends_is_understood(sent: Any, kind: type[fields.RequestBody]) -> None:
    read = requests.decode(dump(sent), kind)
    for name, value in msgspec.json.decode(dump(sent)).items():
        ours = msgspec.to_builtins(getattr(read, name))
        if isinstance(value, dict) and isinstance(ours, dict):
            assert value.items() <= ours.items() or name in ("prompt", "sampling_params"), name
        else:
            assert ours == value, name


def test_adam_parameters_keep_the_defaults_of_the_sdk() -> None:
    sent = sdk.OptimStepRequest(model_id=RUN, seq_id=1, optim_params=sdk.AdamParams())
    assert requests.decode(dump(sent), requests.OptimStep).adamw() == types.AdamW()
    bare = b'{"model_id":"m","seq_id":1,"adam_params":{}}'
    assert requests.decode(bare, requests.OptimStep).adamw() == types.AdamW()
    sent = sdk.OptimStepRequest(model_id=RUN, seq_id=1, optim_params=sdk.AdamParams(**ADAM))
    assert requests.decode(dump(sent), requests.OptimStep).adamw() == types.AdamW(**ADAM)


def test_another_optimizer_is_refused_by_name() -> None:
    sent = sdk.OptimStepRequest(model_id=RUN, seq_id=1, optim_params=sdk.DimuonParams(learning_rate=0.1))
    with pytest.raises(InvalidField, match=r"optimizer_params.type is 'dimuon'; allowed: adamw"):
        requests.decode(dump(sent), requests.OptimStep).adamw()
    create = {"session_id": SESSION, "model_seq_id": 0, "base_model": "m", "lora_config": {"rank": 1}}
    config = {"optimizer_config": {"type": "dimuon", "version": 1}}
    with pytest.raises(InvalidField, match=r"optimizer_config.type is 'dimuon'; allowed: adamw"):
        requests.decode(msgspec.json.encode(create | config), requests.CreateModel).lora()


@pytest.mark.parametrize(("rank", "good"), [(-3, False), (0, False), (1, True), (256, True), (257, False)])
def test_the_rank_has_its_limits(rank: int, good: bool) -> None:
    assert limits.rank_max == 256
    create = {"session_id": SESSION, "model_seq_id": 0, "base_model": "m", "lora_config": {"rank": rank}}
    request = requests.decode(msgspec.json.encode(create), requests.CreateModel)
    if good:
        assert request.lora().rank == rank
    else:
        with pytest.raises(InvalidField, match=rf"lora_config.rank is {rank}; allowed: 1 to 256"):
            request.lora()


def test_an_adapter_that_trains_nothing_is_refused() -> None:
    layers = {"rank": 4, "train_attn": False, "train_mlp": False, "train_unembed": False}
    create = {"session_id": SESSION, "model_seq_id": 0, "base_model": "m", "lora_config": layers}
    with pytest.raises(InvalidField, match="at least one of"):
        requests.decode(msgspec.json.encode(create), requests.CreateModel).lora()


def test_a_load_either_creates_a_run_or_names_one() -> None:
    into = requests.decode(b'{"model_id":"m","seq_id":1,"path":"p","optimizer":true}', requests.LoadWeights)
    assert into.creates() is None
    new = {"session_id": SESSION, "model_seq_id": 3, "path": "p", "optimizer": True}
    assert requests.decode(msgspec.json.encode(new), requests.LoadWeights).creates() == f"{SESSION}:train:3"
    for wrong in ({"model_id": "m", "seq_id": 1}, {"model_id": "m"}):
        both = requests.decode(msgspec.json.encode(new | wrong), requests.LoadWeights)
        with pytest.raises(InvalidField, match="model_id with seq_id, or session_id with model_seq_id"):
            both.creates()
    token = requests.decode(msgspec.json.encode(new | {"weights_access_token": "secret"}), requests.LoadWeights)
    with pytest.raises(InvalidField) as refused:
        token.creates()
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seq_id": "x"}, "seq_id is 'x'; allowed: int"),
        ({"seq_id": 0}, "seq_id is 0; allowed: int >= 1"),
        ({"extra": 5}, "extra is 5; allowed: no field of this name, only model_id, seq_id"),
        ({"adam_params": {"lr": 1}}, "adam_params.lr is 1; allowed: no field of this name, only learning_rate, beta1"),
        ({"adam_params": {"beta1": 1.0}}, "adam_params.beta1 is 1.0; allowed: float < 1.0"),
        ({"adam_params": {"learning_rate": -1}}, "adam_params.learning_rate is -1; allowed: float >= 0"),
        ({"type": "other"}, "type is 'other'"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(changes: dict[str, Any], complaint: str) -> None:
    body = msgspec.json.encode({"model_id": RUN, "seq_id": 1, "adam_params": {}} | changes)
    with pytest.raises(InvalidField, match=re.escape(complaint)):
        requests.decode(body, requests.OptimStep)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidField, match="model_id is None; allowed: a value: this field is required"):
        requests.decode(b"{}", requests.OptimStep)


def test_numbers_that_are_not_finite_are_named() -> None:
    with pytest.raises(InvalidField, match=r"adam_params.learning_rate is nan; allowed: a finite number"):
        requests.decode(b'{"model_id":"m","seq_id":1,"adam_params":{"learning_rate":NaN}}', requests.OptimStep)


def test_metadata_has_its_limit() -> None:
    def body(size: int) -> bytes:
        return msgspec.json.encode({"model_id": "m", "seq_id": 1, "path": "p", "user_metadata": {"k": "x" * size}})

    room = limits.user_metadata_bytes_max - len('{"k":""}')
    assert requests.decode(body(room), requests.SaveWeights).user_metadata is not None
    with pytest.raises(TooLarge, match="user_metadata is 16385 bytes"):
        requests.decode(body(room + 1), requests.SaveWeights)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (requests.CreateSession, {}),
        (requests.CreateModel, {"session_id": "ses-1", "model_seq_id": 0, "base_model": "m"}),
        (requests.LoadWeights, {"path": "p", "optimizer": True}),
    ],
)
def test_metadata_is_no_deeper_than_everything_that_reads_it_later_can_go(
    kind: type[msgspec.Struct], more: dict[str, Any]
) -> None:
    def body(levels: int) -> bytes:
        metadata = b'{"a":' * levels + b"1" + b"}" * levels
        return msgspec.json.encode(more | {"user_metadata": msgspec.Raw(metadata)})

    assert isinstance(requests.decode(body(limits.json_nesting_max), kind), kind)
    for levels in (limits.json_nesting_max + 1, 950):
        with pytest.raises(InvalidField, match=f"user_metadata: nesting is {levels}; allowed: up to 100 levels"):
            requests.decode(body(levels), kind)


def sample(**changes: Any) -> sample_requests.SampleCall:
    sent = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}, "sampling_params": {}} | changes
    return requests.decode(msgspec.json.encode(sent), sample_requests.AsampleBody).call("model", "adapters/x/", 99)


def targets(**changes: Any) -> dict[str, Any]:
    return {"data": [1, 2], "dtype": "int64", "shape": [1, 2]} | changes


def test_a_sample_becomes_a_call_and_the_call_a_sample() -> None:
    asked = requests.decode(dump(SENT[-2][0]), sample_requests.AsampleBody)
    assert sample_requests.address(dump(SENT[-2][0])) == (SESSION + ":sample:0", 10**15)
    call = requests.decode(requests.encode(asked.call("model", "", 99)), sample_requests.SampleCall).sample()
    assert call.prompt.tolist() == [1, 2, 3]
    assert call.seed == 7
    assert call.params == types.SamplingParams(max_tokens=5, seed=7, stop_strings=("a",))
    assert (call.num_samples, call.prompt_logprobs, call.topk_prompt_logprobs) == (2, True, 3)
    assert sample().seed == 99


def test_what_is_asked_of_a_prompt_reaches_the_sampler() -> None:
    ids = torch.tensor([[5, -1, -1, -1, -1, -1], [-1] * 6])
    for sent in (sdk.TensorData.from_torch(ids), sdk.TensorData.from_torch_sparse(ids, pad_value=-1)):
        asked = sample(
            target_prompt_logprobs=_tensor_data_to_model(sent).model_dump(exclude_none=True),
            prompt_logprobs=True, prompt_alt_tokens_k=3, prompt_logprobs_last_n=1,
        )  # fmt: skip
        call = requests.decode(requests.encode(asked), sample_requests.SampleCall).sample()
        assert (call.prompt_alt_tokens_k, call.prompt_logprobs_last_n) == (3, 1)
        cells = call.target_prompt_logprobs
        assert cells is not None
        assert cells.shape == (2, 6)
        assert (cells.starts is None) == (sent.sparse_crow_indices is None)
        assert cells.values[0] == 5
        assert cells.rows().tolist() == ([0] if sent.sparse_crow_indices else [0] * 6 + [1] * 6)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (None, types.SamplingParams()),
        ([], types.SamplingParams(ignore_eos=True)),
        ("ab", types.SamplingParams(stop_strings=("ab",))),
        (["a", "b"], types.SamplingParams(stop_strings=("a", "b"))),
        ([5, 6], types.SamplingParams(stop_tokens=(5, 6))),
    ],
)
def test_every_form_of_stop_is_understood(stop: Any, expected: types.SamplingParams) -> None:
    assert sample(sampling_params={"stop": stop}).params == expected


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sampling_params": {"stop": ["a", 1]}}, "sampling_params.stop is ['a', 1]"),
        ({"sampling_params": {"stop": ""}}, "sampling_params.stop is ''"),
        ({"sampling_params": {"stop": [-1]}}, "sampling_params.stop is [-1]"),
        ({"sampling_params": {"stop": list(range(65))}}, "count is 65; allowed: at most 64"),
        ({"sampling_params": {"top_k": 0}}, "sampling_params.top_k is 0"),
        ({"sampling_params": {"top_p": 0}}, "sampling_params.top_p is 0"),
        ({"sampling_params": {"temperature": -0.1}}, "sampling_params.temperature is -0.1"),
        ({"sampling_params": {"max_tokens": 0}}, "sampling_params.max_tokens is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"num_samples": 1025}, "num_samples is 1025"),
        ({"topk_prompt_logprobs": 65}, "topk_prompt_logprobs is 65"),
        ({"prompt": {"chunks": []}}, "prompt is 'empty'"),
        ({"prompt": {"chunks": [{"type": "image", "format": "png"}]}}, "prompt.chunks[0] is 'image'; allowed"),
        (
            {"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}},
            "prompt.chunks[0].expected_tokens is None",
        ),
        (
            {"prompt": {"chunks": [{"type": "image_asset_pointer", "location": "/etc/x.png", "format": "png"}]}},
            "Send the image's bytes: this server fetches nothing that a request names",
        ),
        ({"prompt": {"chunks": [{"type": "dmel", "dmel": ""}]}}, "No model of audio is served"),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [-1]}]}}, "prompt.chunks[0].tokens[0] is -1"),
        ({"target_prompt_logprobs": {"data": [], "dtype": "int64"}}, "target_prompt_logprobs.shape is None"),
        ({"target_prompt_logprobs": targets(dtype="float32")}, "target_prompt_logprobs.dtype is 'float32'"),
        ({"target_prompt_logprobs": targets(data=[1, 2.5])}, "target_prompt_logprobs.data[1] is 2.5"),
        ({"target_prompt_logprobs": targets(shape=[1, 3])}, "target_prompt_logprobs.shape is [1, 3]"),
        ({"target_prompt_logprobs": targets(sparse_crow_indices=[0, 2])}, "sparse_col_indices is 'one of them'"),
        (
            {"target_prompt_logprobs": targets(sparse_crow_indices=[0, 2], sparse_col_indices=[0, 2])},
            "target_prompt_logprobs.col_indices is [0, 2]; allowed: 0 to 1",
        ),
        ({"prompt_alt_tokens_k": 65}, "prompt_alt_tokens_k is 65"),
        ({"prompt_logprobs_last_n": 0, "prompt_logprobs": True}, "prompt_logprobs_last_n is 0"),
        ({"prompt_logprobs_last_n": 1}, "prompt_logprobs_last_n is 1; allowed: none without prompt_logprobs"),
        ({"record_stability_info": True}, "pass the loss importance_sampling, ppo or cispo"),
    ],
)
def test_a_sample_that_cannot_be_served_is_refused_by_name(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidField, match=re.escape(complaint)):
        sample(**changes)


def test_session_ids_are_checked_before_they_name_anything() -> None:
    create = {"session_id": "../x", "model_seq_id": 0, "base_model": "m", "lora_config": {"rank": 1}}
    with pytest.raises(UserError, match="does not exist"):
        requests.decode(msgspec.json.encode(create), requests.CreateModel).run()
    create["session_id"] = SESSION
    assert requests.decode(msgspec.json.encode(create), requests.CreateModel).run() == ids.RunId(RUN)


KINDS = sorted({kind for _, kind in SENT}, key=lambda kind: kind.__name__)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(KINDS), st.data())
def test_arbitrary_json_raises_only_user_errors(kind: type[fields.RequestBody], data: st.DataObject) -> None:
    names = [field.encode_name for field in msgspec.structs.fields(kind)]
    fields = data.draw(st.dictionaries(st.sampled_from([*names, "other"]), VALUES, max_size=6))
    for body in (requests_json(fields), data.draw(st.binary(max_size=40))):
        try:
            requests.decode(body, kind)
        except UserError:
            pass


def requests_json(value: Any) -> bytes:
    return json.dumps(value).encode()  # NaN and Infinity too
