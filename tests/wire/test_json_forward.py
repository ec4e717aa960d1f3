"""The JSON forms of older SDKs, against the SDK's own models of them, and against the protobuf forms."""

import base64
import json
from typing import Any

import msgspec
import numpy as np
import pytest
import tinker
import torch
from tinker import types as sdk
from tinker.proto import request_conv
from tinker.types._pydantic_types.tensor_data import TensorData

from knapper import limits
from knapper.errors import UserError
from knapper.wire import json_forward, proto
from knapper.wire.types import (
    Cells,
    ForwardBackward,
    ForwardBackwardOutput,
    Image,
    PromptDraws,
    SampledSequence,
    SampleOutput,
    TopK,
)

RUN = "ses-" + "0" * 32 + ":train:0"


def datum(tokens: list[int], **inputs: object) -> tinker.Datum:
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)  # type: ignore[arg-type]


def as_json(
    data: list[tinker.Datum], loss: str = "ppo", field: str = "forward_backward_input", **config: float
) -> bytes:
    """As SDK 0.18 dumps it."""

    def tensor(value: sdk.TensorData) -> dict[str, Any]:
        sent = TensorData(
            data=value.data, dtype=value.dtype, shape=value.shape,
            sparse_crow_indices=value.sparse_crow_indices, sparse_col_indices=value.sparse_col_indices,
        )  # fmt: skip
        return sent.model_dump(mode="json", exclude_none=True)

    asked: dict[str, Any] = {
        "data": [
            {
                "loss_fn_inputs": {name: tensor(value) for name, value in each.loss_fn_inputs.items()},
                "model_input": {"chunks": [{"tokens": each.model_input.to_ints(), "type": "encoded_text"}]},
            }
            for each in data
        ],
        "loss_fn": loss,
    }
    if config:
        asked["loss_fn_config"] = config
    return json.dumps({field: asked, "model_id": RUN, "seq_id": 3}).encode()


def in_protobuf(data: list[tinker.Datum], **config: float) -> ForwardBackward:
    asked = sdk.ForwardBackwardInput(data=data, loss_fn="ppo", loss_fn_config=config or None)
    request = sdk.ForwardBackwardRequest(model_id=RUN, seq_id=3, forward_backward_input=asked)
    return proto.decode_forward_backward(request_conv.forward_backward_request_to_proto(request).SerializeToString())


def same(ours: ForwardBackward, theirs: ForwardBackward) -> None:
    assert (ours.run, ours.seq, ours.loss, ours.config) == (theirs.run, theirs.seq, theirs.loss, theirs.config)
    for a, b in zip(ours.data, theirs.data, strict=True):
        assert a.tokens.dtype == b.tokens.dtype
        assert np.array_equal(a.tokens, b.tokens)
        assert a.inputs.keys() == b.inputs.keys()
        for name, values in a.inputs.items():
            assert values.dtype == b.inputs[name].dtype, name
            assert np.array_equal(values, b.inputs[name]), name


def test_json_means_what_protobuf_means() -> None:
    there = torch.zeros(3, 16)
    there[0, 2] = there[2, 15] = 0.25
    data = [
        datum([1, 2, 3], target_tokens=[2, 3, 4], logprobs=[-0.1, -2.0, -3e-8], advantages=[1, 0, -1.5]),
        datum([7], target_tokens=np.array([2**40]), clip_low_threshold=[0.5]),
        datum([1, 2, 3], target_tokens=(there * 40).long(), weights=there),
        datum(
            [1, 2], target_tokens=np.array([[1, 2], [3, 4]]), weights=np.array([[0.5, 1.0], [0.0, -1.0]], np.float32)
        ),
    ]
    assert data[2].loss_fn_inputs["weights"].sparse_crow_indices is not None
    ours = json_forward.decode_forward_backward(as_json(data, clip_low_threshold=0.9))
    same(ours, in_protobuf(data, clip_low_threshold=0.9))
    assert not ours.forward_only
    only = json_forward.decode_forward(as_json(data, field="forward_input"))
    same(only, in_protobuf(data))
    assert only.forward_only


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ({"weights": {"data": [1.0, 2.0], "dtype": "float32", "shape": [3]}}, "weights.shape is [3]"),
        ({"weights": {"data": [1.0], "dtype": "float16"}}, "dtype is"),
        ({"target_tokens": {"data": [1.5], "dtype": "int64"}}, "target_tokens.data[0] is 1.5"),
        ({"target_tokens": {"data": [2**63], "dtype": "int64"}}, "data"),
        ({"weights": {"data": [0.0] * 65, "dtype": "float32", "shape": [1, 65]}}, "K is 65; allowed: at most 64"),
        ({"weights": {"data": [1.0], "dtype": "float32", "sparse_col_indices": [0]}}, "sparse_crow_indices"),
        ({"weights": {"data": [1.0], "dtype": "float32", "shape": [-1]}}, "shape"),
        ({"weights": {"data": [1.0], "dtype": "float32", "colour": "red"}}, "colour"),
        ({str(n): {"data": [1.0], "dtype": "float32"} for n in range(33)}, "loss_fn_inputs"),
    ],
)  # fmt: skip
def test_an_array_that_is_not_what_it_says_is_refused_by_name(inputs: dict[str, Any], complaint: str) -> None:
    sent = {"model_input": {"chunks": [{"type": "encoded_text", "tokens": [1]}]}, "loss_fn_inputs": inputs}
    asked = {"data": [sent], "loss_fn": "ppo"}
    body = json.dumps({"forward_backward_input": asked, "model_id": RUN, "seq_id": 1}).encode()
    with pytest.raises(UserError) as raised:
        json_forward.decode_forward_backward(body)
    assert complaint in str(raised.value)


def test_datums_of_a_request_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "datums_per_request_max", 2)
    json_forward.decode_forward_backward(as_json([datum([1])] * 2))
    with pytest.raises(UserError, match="has 3 datums; allowed: 2"):
        json_forward.decode_forward_backward(as_json([datum([1])] * 3))


def test_a_pointer_to_an_image_is_refused_with_its_place() -> None:
    pointer = {"type": "image_asset_pointer", "location": "http://x/y.png", "format": "png"}
    sent = {"model_input": {"chunks": [pointer]}, "loss_fn_inputs": {}}
    body = json.dumps({"forward_input": {"data": [sent], "loss_fn": "ppo"}, "model_id": RUN, "seq_id": 1}).encode()
    with pytest.raises(UserError, match=r"data\[0\].model_input.chunks\[0\] is 'image_asset_pointer'.*fetches nothing"):
        json_forward.decode_forward(body)


def test_an_image_in_json_is_stored_as_protobuf_has_it() -> None:
    text = {"type": "encoded_text", "tokens": [5, 6]}
    image = {"type": "image", "data": base64.b64encode(b"png").decode(), "format": "png", "expected_tokens": 2}
    sent = {"model_input": {"chunks": [text, image]}, "loss_fn_inputs": {}}
    body = json.dumps({"forward_input": {"data": [sent], "loss_fn": "ppo"}, "model_id": RUN, "seq_id": 1}).encode()
    decoded = json_forward.decode_forward(body)
    (datum,) = proto.decode_forward_backward(proto.encode_forward_backward(decoded)).data
    assert datum.tokens.tolist() == [5, 6, 0, 0]
    assert datum.images == decoded.data[0].images == (Image(2, 2, 1, "png", b"png"),)


def test_outputs_in_json_are_read_as_those_in_protobuf() -> None:
    output = ForwardBackwardOutput(
        outputs=[
            {"logprobs": np.array([-0.1, -3e-8], np.float32)},
            {"logprobs": np.array([[-1.0, -2.0]], np.float32)},
        ],
        metrics={"loss:sum": 0.1, "tokens:sum": 3.0},
    )
    read = msgspec.json.decode(json_forward.encode_forward_backward_output(output))
    assert read["metrics"] == output.metrics
    assert read["loss_fn_output_type"] == "ArrayRecord"
    for sent, datum in zip(read["loss_fn_outputs"], output.outputs, strict=True):
        array = TensorData.model_validate(sent["logprobs"]).to_numpy()
        assert np.array_equal(array, datum["logprobs"])
        assert array.dtype == np.float32


def test_samples_in_json_say_everything_and_null_where_there_is_nothing() -> None:
    topk = TopK(np.array([[0, 0], [5, 0]], np.int32), np.array([[-99999, -99999], [-0.5, -99999]], np.float32))
    output = SampleOutput(
        sequences=[SampledSequence(np.array([4, 5], np.int32), np.array([-0.25, -2.0], np.float32), True, topk)],
        prompt_logprobs=np.array([np.nan, -1.0], np.float32),
        topk_prompt_logprobs=topk,
        target_prompt_logprobs=Cells(np.array([-3.0], np.float32), (1, 4), np.array([0, 1]), np.array([2])),
        prompt_draws=PromptDraws(np.array([[7]]), np.array([[-4.0]], np.float32)),
    )
    assert msgspec.json.decode(json_forward.encode_sample_response(output)) == {
        "type": "sample",
        "sequences": [
            {"stop_reason": "stop", "tokens": [4, 5], "logprobs": [-0.25, -2.0], "topk_logprobs": [None, [[5, -0.5]]]}
        ],
        "prompt_logprobs": [None, -1.0],
        "topk_prompt_logprobs": [None, [[5, -0.5]]],
        "target_prompt_logprobs": {
            "data": [-3.0], "dtype": "float32", "shape": [1, 4],
            "sparse_crow_indices": [0, 1], "sparse_col_indices": [2],
        },
        "prompt_alt_tokens": {
            "tokens": {"data": [7], "dtype": "int64", "shape": [1, 1]},
            "logprobs": {"data": [-4.0], "dtype": "float32", "shape": [1, 1]},
        },
        "prompt_cache_hit_tokens": 0,
    }  # fmt: skip
