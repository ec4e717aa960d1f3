"""The protobuf forms, against the SDK's own writers and readers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc_tools.protoc  # type: ignore[import-untyped]
import numpy as np
import pytest
import tinker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tinker import types as sdk
from tinker.proto import request_conv, response_conv
from tinker.proto import tinker_public_pb2 as sdk_pb

import knapper.wire.descriptor
from knapper import limits
from knapper.errors import InvalidField, TooLarge, UserError
from knapper.wire import descriptor, proto, scan
from knapper.wire.types import (
    Cells,
    Datum,
    ForwardBackward,
    ForwardBackwardOutput,
    Image,
    PromptDraws,
    SampledSequence,
    SampleOutput,
    TopK,
)


def array(dtype: type, values: object) -> NDArray[Any]:
    return np.array(values, dtype=dtype)


RUN = "ses-" + "0" * 32 + ":train:0"


def sdk_request(data: list[tinker.Datum], seq: int = 1, loss: str = "cross_entropy", **config: float | str) -> bytes:
    request = sdk.ForwardBackwardRequest(
        model_id=RUN,
        seq_id=seq,
        forward_backward_input=sdk.ForwardBackwardInput(data=data, loss_fn=loss, loss_fn_config=config or None),  # type: ignore[arg-type]
    )
    return request_conv.forward_backward_request_to_proto(request).SerializeToString()


def sdk_datum(tokens: list[int], **inputs: object) -> tinker.Datum:
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens), loss_fn_inputs=inputs)  # type: ignore[arg-type]


def message(body: bytes) -> sdk_pb.ForwardBackwardRequest:
    return sdk_pb.ForwardBackwardRequest.FromString(body)


def test_descriptor_is_what_the_proto_text_compiles_to(tmp_path: Path) -> None:
    wire = Path(knapper.wire.descriptor.__file__).parent
    out = tmp_path / "compiled"
    command = [sys.executable, grpc_tools.protoc.__file__, f"-I{wire}", f"--descriptor_set_out={out}"]
    subprocess.run([*command, "tinker_public.proto"], check=True)
    assert out.read_bytes() == (wire / "tinker_public.binpb").read_bytes()


def test_descriptor_has_the_field_numbers_and_types_of_the_sdk() -> None:
    for name in ("ForwardBackwardRequest", "ForwardBackwardOutput", "SampleResponse"):
        compare(getattr(knapper.wire.descriptor, name).DESCRIPTOR, getattr(sdk_pb, name).DESCRIPTOR, set())


def compare(ours: object, theirs: object, seen: set[str]) -> None:
    def fields(descriptor: object) -> dict[int, tuple[str, int, bool, str | None, bool]]:
        return {
            f.number: (f.name, f.type, f.is_repeated, f.containing_oneof and f.containing_oneof.name, f.has_presence)
            for f in descriptor.fields  # type: ignore[attr-defined]
        }

    assert fields(ours) == fields(theirs)
    for field in ours.fields:  # type: ignore[attr-defined]
        if field.message_type and field.message_type.full_name not in seen:
            seen.add(field.message_type.full_name)
            compare(field.message_type, theirs.fields_by_number[field.number].message_type, seen)  # type: ignore[attr-defined]
        if field.enum_type:
            values = theirs.fields_by_number[field.number].enum_type.values_by_name  # type: ignore[attr-defined]
            assert {v.name: v.number for v in field.enum_type.values} == {k: v.number for k, v in values.items()}


def test_a_request_of_the_sdk_decodes_to_the_same_arrays() -> None:
    chunks = [sdk.EncodedTextChunk(tokens=[1, 2]), sdk.EncodedTextChunk(tokens=[]), sdk.EncodedTextChunk(tokens=[3])]
    datum = tinker.Datum(
        model_input=tinker.ModelInput(chunks=chunks),  # type: ignore[arg-type]
        loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [0.0, -1.5, 1e-7]},  # type: ignore[dict-item]
    )
    body = sdk_request([datum, sdk_datum([7], target_tokens=[8])], 3, "ppo", clip_low_threshold=0.7, mode="x")
    request = proto.decode_forward_backward(body)
    assert (request.run, request.seq, request.loss, request.forward_only) == (RUN, 3, "ppo", False)
    assert request.config == {"clip_low_threshold": 0.7, "mode": "x"}
    first, second = request.data
    assert first.tokens.dtype == np.int32
    assert first.tokens.tolist() == [1, 2, 3]
    targets, weights = first.inputs["target_tokens"], first.inputs["weights"]
    assert targets.dtype == np.int64
    assert targets.tolist() == [2, 3, 4]
    assert weights.dtype == np.float32
    assert np.array_equal(weights, array(np.float32, [0.0, -1.5, 1e-7]))
    assert second.inputs["target_tokens"].tolist() == [8]
    assert proto.check_forward_backward(body) == (RUN, 3, 4)


def test_sparse_targets_of_the_sdk_become_dense() -> None:
    targets = torch.zeros((40, 8), dtype=torch.int64)
    targets[0, 0], targets[5, 7], targets[39, 3] = 11, 12, 13
    weights = torch.zeros((40, 8))
    weights[5, 7] = -0.25
    body = sdk_request([sdk_datum(list(range(40)), target_tokens=targets, weights=weights)])
    assert message(body).data[0].loss_fn_inputs["target_tokens"].HasField("sparse_csr")
    inputs = proto.decode_forward_backward(body).data[0].inputs
    assert np.array_equal(inputs["target_tokens"], targets.numpy())
    assert np.array_equal(inputs["weights"], weights.numpy())
    assert inputs["weights"].dtype == np.float32


def test_int32_is_widened_and_bfloat16_keeps_its_bits() -> None:
    sent = message(sdk_request([sdk_datum([1, 2], target_tokens=[1, 2])]))
    values = torch.tensor([1.5, -3.1415926], dtype=torch.bfloat16)
    whole, half = sent.data[0].loss_fn_inputs["target_tokens"], sent.data[0].loss_fn_inputs["weights"]
    whole.dtype, whole.dense = sdk_pb.DTYPE_INT32, array(np.int32, [-5, 2**31 - 1]).tobytes()
    half.dtype, half.dense = sdk_pb.DTYPE_BFLOAT16, values.view(torch.uint16).numpy().tobytes()
    inputs = proto.decode_forward_backward(sent.SerializeToString()).data[0].inputs
    assert inputs["target_tokens"].tolist() == [-5, 2**31 - 1]
    assert inputs["weights"].tolist() == values.float().tolist()


def test_legacy_loss_config_counts_only_without_the_new_one() -> None:
    sent = message(sdk_request([], 1, "ppo", clip_low_threshold=0.5))
    sent.loss_fn_config["clip_low_threshold"] = 0.25
    assert proto.decode_forward_backward(sent.SerializeToString()).config == {"clip_low_threshold": 0.5}
    sent.loss_fn_config_v2.clear()
    assert proto.decode_forward_backward(sent.SerializeToString()).config == {"clip_low_threshold": 0.25}


def test_our_own_request_round_trips_and_the_sdk_reads_it() -> None:
    datum = Datum(
        tokens=np.arange(3, dtype=np.int32),
        inputs={"target_tokens": np.arange(6, dtype=np.int64).reshape(3, 2), "weights": np.ones((3, 2), np.float32)},
    )
    request = ForwardBackward(RUN, 9, [datum, datum], "cispo", {"clip_high_threshold": 4.0, "k": "v"}, True)
    body = proto.encode_forward_backward(request)
    back = proto.decode_forward_backward(body)
    assert (back.run, back.seq, back.loss, back.config, back.forward_only) == (RUN, 9, "cispo", request.config, True)
    for ours in back.data:
        assert np.array_equal(ours.tokens, datum.tokens)
        assert {k: (v.dtype, v.tolist()) for k, v in ours.inputs.items()} == {
            k: (v.dtype, v.tolist()) for k, v in datum.inputs.items()
        }
    assert message(body).data[1].loss_fn_inputs["weights"].shape == [3, 2]


@pytest.mark.parametrize(
    ("change", "message_part"),
    [
        (lambda t: t.shape.__setitem__(0, 3), "data[0].loss_fn_inputs.target_tokens.shape is [3]"),
        (lambda t: t.shape.extend([1, 1]), "sizes of at least 0"),
        (lambda t: t.shape.__setitem__(0, -2), "sizes of at least 0"),
        (lambda t: setattr(t, "dense", b"123"), "is 3; allowed: a multiple of 8"),
        (lambda t: setattr(t, "dtype", 9), "dtype is 9"),
        (lambda t: t.ClearField("dense"), "dense or sparse_csr"),
    ],
)
def test_a_tensor_that_is_not_what_it_says_is_refused_by_name(change: object, message_part: str) -> None:
    sent = message(sdk_request([sdk_datum([1, 2], target_tokens=[1, 2])]))
    change(sent.data[0].loss_fn_inputs["target_tokens"])  # type: ignore[operator]
    with pytest.raises(InvalidField) as refused:
        proto.decode_forward_backward(sent.SerializeToString())
    assert message_part in str(refused.value)


@pytest.mark.parametrize(
    ("field", "values", "message_part"),
    [
        ("crow_indices", [0, 1], "is 2; allowed: 4"),
        ("crow_indices", [0, 2, 1, 2], "ascending"),
        ("crow_indices", [0, 1, 1, 3], "ascending"),
        ("crow_indices", [1, 1, 1, 2], "ascending"),
        ("col_indices", [0], "one a value"),
        ("col_indices", [0, 4], "0 to 3"),
        ("col_indices", [-1, 0], "0 to 3"),
        ("col_indices", [2, 2], "at most once"),
    ],
)
def test_a_sparse_tensor_that_contradicts_itself_is_refused(field: str, values: list[int], message_part: str) -> None:
    with pytest.raises(InvalidField) as refused:
        proto.decode_forward_backward(sparse([3, 4], **{field: values}))
    assert message_part in str(refused.value)


def test_a_sparse_tensor_may_not_become_larger_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "sparse_cells_max", 12)
    assert proto.decode_forward_backward(sparse([3, 4])).data[0].inputs["t"].size == 12
    with pytest.raises(TooLarge, match="15 cells"):
        proto.decode_forward_backward(sparse([3, 5]))


def sparse(shape: list[int], **changed: list[int]) -> bytes:
    sent = sdk_pb.ForwardBackwardRequest(model_id=RUN, seq_id=1)
    tensor = sent.data.add().loss_fn_inputs["t"]
    tensor.dtype = sdk_pb.DTYPE_FLOAT32
    tensor.shape.extend(shape)
    tensor.sparse_csr.values = array(np.float32, [5.0, 6.0]).tobytes()
    for name, values in {"crow_indices": [0, 2, 2, 2], "col_indices": [1, 2], **changed}.items():
        setattr(tensor.sparse_csr, name, array(np.int64, values).tobytes())
    return sent.SerializeToString()


def test_columns_of_targets_have_a_limit() -> None:
    columns = limits.target_columns_max
    body = sdk_request([sdk_datum([1], target_tokens=np.ones((1, columns), np.int64))])
    assert proto.decode_forward_backward(body).data[0].inputs["target_tokens"].shape == (1, columns)
    with pytest.raises(TooLarge, match=f"at most {columns} columns"):
        proto.decode_forward_backward(sdk_request([sdk_datum([1], target_tokens=np.ones((1, columns + 1), np.int64))]))


def test_datums_of_a_request_have_a_limit() -> None:
    sent = sdk_pb.ForwardBackwardRequest(model_id=RUN, seq_id=1)
    for _ in range(limits.datums_per_request_max):
        sent.data.add()
    assert len(proto.decode_forward_backward(sent.SerializeToString()).data) == limits.datums_per_request_max
    sent.data.add()
    with pytest.raises(TooLarge, match=str(limits.datums_per_request_max)):
        proto.decode_forward_backward(sent.SerializeToString())


def test_a_flood_of_tiny_objects_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(TooLarge, match="datums"):
        scan.bound(b"\x1a\x00" * 100_000)
    inner = b"\x0a\x00" * (limits.datum_parts_max + 1)
    length = len(inner)
    varint = bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14 & 0x7F])
    with pytest.raises(TooLarge, match="merge consecutive text chunks"):
        scan.bound(b"\x1a" + varint + inner)


def test_images_have_their_places_and_come_through_as_they_are() -> None:
    texts = [sdk.EncodedTextChunk(tokens=[5, 6]), sdk.EncodedTextChunk(tokens=[7])]
    image = sdk.ImageChunk(data=b"png", format="png", expected_tokens=4)
    datum = tinker.Datum(model_input=tinker.ModelInput(chunks=[texts[0], image, texts[1], image]), loss_fn_inputs={})
    body = sdk_request([datum])
    assert proto.check_forward_backward(body)[2] == 2 + 4 + 1 + 4
    (decoded,) = proto.decode_forward_backward(body).data
    assert decoded.tokens.tolist() == [5, 6, 0, 0, 0, 0, 7, 0, 0, 0, 0]
    assert decoded.images == (Image(2, 4, 1, "png", b"png"), Image(7, 4, 3, "png", b"png"))
    again = proto.encode_forward_backward(proto.decode_forward_backward(body))
    assert proto.decode_forward_backward(again).data[0].images == decoded.images


@pytest.mark.parametrize("expected", [None, 0, limits.image_tokens_max + 1])
def test_an_image_says_its_tokens(expected: int | None) -> None:
    image = sdk.ImageChunk(data=b"png", format="png", expected_tokens=expected)
    datum = tinker.Datum(model_input=tinker.ModelInput(chunks=[image]), loss_fn_inputs={})
    with pytest.raises(InvalidField, match=r"data\[0\].model_input.chunks\[0\].expected_tokens is .*1 to 16384"):
        proto.decode_forward_backward(sdk_request([datum]))


def test_a_request_has_so_many_images_and_no_other_size() -> None:
    image = sdk.ImageChunk(data=b"png", format="png", expected_tokens=1)
    chunks: list[sdk.ModelInputChunk] = [image] * (limits.images_max + 1)
    with pytest.raises(TooLarge, match=f"{len(chunks)} images; allowed: {limits.images_max}"):
        proto.decode_forward_backward(
            sdk_request([tinker.Datum(model_input=tinker.ModelInput(chunks=chunks), loss_fn_inputs={})])
        )
    message = descriptor.ForwardBackwardRequest(model_id="m", seq_id=1)
    sized = message.data.add().model_input.add().image
    sized.override_dimensions.width = 9
    with pytest.raises(InvalidField, match=r"chunks\[0\].override_dimensions"):
        proto.decode_forward_backward(message.SerializeToString())


def test_unknown_fields_are_refused_wherever_they_stand() -> None:
    known = sdk_request([sdk_datum([1], target_tokens=[1])])
    top = known + b"\xf8\x01\x05"  # field 31, a varint
    with pytest.raises(UserError, match="does not know"):
        proto.decode_forward_backward(top)
    deep = sdk_pb.ForwardBackwardRequest(model_id=RUN, seq_id=1)
    deep.data.add().loss_fn_inputs["t"].MergeFromString(b"\xf8\x01\x05")
    with pytest.raises(UserError, match="does not know"):
        proto.check_forward_backward(deep.SerializeToString())


def test_peek_finds_run_and_seq_in_the_first_bytes() -> None:
    body = sdk_request([sdk_datum(list(range(5000)), target_tokens=list(range(5000)))], seq=2_000_000)
    assert scan.peek(body[:128]) == (RUN, 2_000_000)
    assert scan.peek(body[:30]) is None
    assert scan.peek(b"") is None
    assert scan.peek(b"\x0a\x02\xff\xff\x10\x01") is None  # not text
    assert scan.peek(b"\x0a\x01a\x10\x00") is None  # no seq


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_raise_only_user_errors(body: bytes) -> None:
    scan.peek(body)
    try:
        proto.decode_forward_backward(body)
    except UserError:
        pass


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_damaged_requests_raise_only_user_errors(data: st.DataObject) -> None:
    dense = sdk_request([sdk_datum([1, 2], target_tokens=[2, 3], weights=[1.0, 0.5])], 1, "ppo", a=1.0, b="x")
    body = bytearray(data.draw(st.sampled_from([dense, sparse([3, 4])])))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(body[: data.draw(st.integers(0, len(body)))])
    for damaged in (bytes(body), cut):
        scan.peek(damaged)
        try:
            proto.decode_forward_backward(damaged)
        except UserError:
            pass


def test_outputs_reach_the_sdk_ragged_and_in_order() -> None:
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = [(3,), (1,), (0,), (4, 2), (2, 2), (2, 3), (5,)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    output = ForwardBackwardOutput([{"logprobs": a} for a in arrays], {"loss:sum": -1.25, "tokens:sum": 9.0})
    body = proto.encode_forward_backward_output(output)
    seen = response_conv.deserialize_forward_backward_output(body)
    assert seen.metrics == output.metrics
    assert [tuple(o["logprobs"].shape or ()) for o in seen.loss_fn_outputs] == shapes
    for ours, theirs in zip(arrays, seen.loss_fn_outputs, strict=True):
        assert np.array_equal(theirs["logprobs"].to_numpy().reshape(ours.shape), ours)
    assert len(sdk_pb.ForwardBackwardOutput.FromString(body).loss_fn_outputs) == 4
    back = proto.decode_forward_backward_output(body)
    assert back.metrics == output.metrics
    assert all(np.array_equal(b["logprobs"], a) for b, a in zip(back.outputs, arrays, strict=True))
    assert body == proto.encode_forward_backward_output(output)


def test_outputs_may_hold_integers_and_be_empty() -> None:
    output = ForwardBackwardOutput([{"a": array(np.int64, [1, 2]), "b": array(np.int32, [3])}], {})
    seen = response_conv.deserialize_forward_backward_output(proto.encode_forward_backward_output(output))
    assert seen.loss_fn_outputs[0]["a"].tolist() == [1, 2]
    assert seen.loss_fn_outputs[0]["b"].tolist() == [3]
    empty = proto.encode_forward_backward_output(ForwardBackwardOutput([], {"loss:sum": 0.0}))
    assert response_conv.deserialize_forward_backward_output(empty).loss_fn_outputs == []


def test_outputs_that_would_crash_the_sdk_are_our_defect() -> None:
    with pytest.raises(ValueError, match="name:reduction"):
        proto.encode_forward_backward_output(ForwardBackwardOutput([], {"loss": 1.0}))
    with pytest.raises(ValueError, match="same arrays"):
        proto.encode_forward_backward_output(ForwardBackwardOutput([{"a": array(np.float32, [1])}, {}], {}))
    with pytest.raises(ValueError, match="float64"):
        proto.encode_forward_backward_output(ForwardBackwardOutput([{"a": array(np.float64, [1])}], {}))


def test_samples_reach_the_sdk() -> None:
    topk = TopK(
        array(np.int32, [[0, 0], [5, 6], [7, 8]]),
        array(np.float32, [[-99999.0, -99999.0], [-0.5, -1.5], [-0.25, -3.0]]),
    )
    output = SampleOutput(
        sequences=[
            SampledSequence(array(np.int32, [4, 5, 6]), array(np.float32, [-0.1, -0.2, -0.3]), True, topk),
            SampledSequence(array(np.int32, [9]), array(np.float32, [-4.0]), False),
        ],
        prompt_logprobs=array(np.float32, [np.nan, -1.0, -2.0]),
        topk_prompt_logprobs=topk,
        prompt_cache_hit_tokens=2,
    )
    body = proto.encode_sample_response(output)
    seen = response_conv.deserialize_sample_response(body)
    assert [s.stop_reason for s in seen.sequences] == ["stop", "length"]
    assert [list(s.tokens) for s in seen.sequences] == [[4, 5, 6], [9]]
    assert np.array_equal(array(np.float32, seen.sequences[0].logprobs), output.sequences[0].logprobs)
    assert seen.prompt_logprobs is not None
    assert seen.prompt_logprobs[0] is None
    assert seen.prompt_logprobs[1:] == [-1.0, -2.0]
    assert seen.topk_prompt_logprobs is not None
    assert seen.topk_prompt_logprobs[1] == [(5, -0.5), (6, -1.5)]
    assert seen.prompt_cache_hit_tokens == 2
    back = proto.decode_sample_response(body)
    assert back.topk_prompt_logprobs is not None
    assert np.array_equal(back.topk_prompt_logprobs.tokens, topk.tokens)
    assert np.array_equal(back.sequences[1].tokens, [9])
    assert [s.stopped for s in back.sequences] == [True, False]
    assert back.sequences[1].topk is None
    assert back.prompt_logprobs is not None
    assert np.isnan(back.prompt_logprobs[0])


@pytest.mark.parametrize("sparse", [False, True])
def test_scores_of_a_prompt_reach_the_sdk_in_the_layout_of_the_request(sparse: bool) -> None:
    values = array(np.float32, [-1.5, -2.5] if sparse else [0.0, -1.5, 0.0, -2.5, 0.0, 0.0])
    layout = (array(np.int64, [0, 1, 2, 2]), array(np.int64, [1, 1])) if sparse else (None, None)
    draws = PromptDraws(array(np.int64, [[3, 4], [5, 5], [0, 1]]), array(np.float32, [[-1, -2], [-3, -3], [-4, -5]]))
    body = proto.encode_sample_response(
        SampleOutput([], target_prompt_logprobs=Cells(values, (3, 2), *layout), prompt_draws=draws)
    )
    seen = response_conv.deserialize_sample_response(body)
    assert seen.target_prompt_logprobs is not None
    assert (seen.target_prompt_logprobs.sparse_crow_indices is not None) == sparse
    assert seen.target_prompt_logprobs.dtype == "float32"
    assert seen.target_prompt_logprobs.to_numpy().tolist() == [[0.0, -1.5], [0.0, -2.5], [0.0, 0.0]]
    assert seen.prompt_alt_tokens is not None
    assert seen.prompt_alt_tokens.tokens.dtype == "int64"
    assert seen.prompt_alt_tokens.tokens.to_numpy().tolist() == draws.tokens.tolist()
    assert seen.prompt_alt_tokens.logprobs.to_numpy().tolist() == draws.logprobs.tolist()
    back = proto.decode_sample_response(body)
    assert back.target_prompt_logprobs is not None
    assert np.array_equal(back.target_prompt_logprobs.values, values)
    assert np.array_equal(back.target_prompt_logprobs.rows(), [0, 1] if sparse else [0, 0, 1, 1, 2, 2])
    assert back.prompt_draws is not None
    assert np.array_equal(back.prompt_draws.tokens, draws.tokens)


def test_the_wire_imports_neither_torch_nor_the_sdk() -> None:
    program = (
        "import sys, knapper.wire.proto, knapper.wire.requests, knapper.wire.zstd;"
        "print([m for m in ('torch', 'tinker', 'transformers') if m in sys.modules])"
    )
    seen = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert seen.stdout.strip() == "[]"
