"""forward_backward and sample results as protobuf: bytes to values and back.

Broken or hostile bytes raise a UserError, never anything else. Shapes: see knapper.wire.types.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from knapper import limits
from knapper.errors import InvalidField, TooLarge, UserError
from knapper.wire import descriptor, prompts, scan, tensors
from knapper.wire.prompts import Prompt
from knapper.wire.types import (
    Cells,
    Datum,
    ForwardBackward,
    ForwardBackwardOutput,
    Image,
    PromptDraws,
    SampleOutput,
    TopK,
)
from knapper.wire.types import SampledSequence as Sampled
from knapper.wire.untrusted import parsing

# ---- forward_backward: request


def decode_forward_backward(body: bytes) -> ForwardBackward:
    """The request, each array checked against its shape. The trainer checks values (vocabulary, lengths, NaN)."""
    request = _parse_request(body)
    keys = max(len(request.loss_fn_config_v2), len(request.loss_fn_config))
    if keys > limits.loss_config_keys_max:
        raise TooLarge(f"loss_fn_config has {keys} keys; allowed: {limits.loss_config_keys_max}")
    if len(request.data) > limits.datums_per_request_max:
        raise TooLarge(
            f"data has {len(request.data)} datums; allowed: {limits.datums_per_request_max}; send fewer a call"
        )
    prompts.expect_few(
        sum(chunk.WhichOneof("chunk") == "image" for datum in request.data for chunk in datum.model_input)
    )
    config: dict[str, float | str] = {}
    for key, value in request.loss_fn_config_v2.items():
        arm = value.WhichOneof("value")
        if arm is None:
            raise InvalidField(f"loss_fn_config[{key!r}]", None, "a number or a text")
        config[key] = getattr(value, arm)
    return ForwardBackward(
        run=request.model_id,
        seq=request.seq_id,
        data=[_decode_datum(datum, f"data[{i}]") for i, datum in enumerate(request.data)],
        loss=request.loss_fn,
        config=config or dict(request.loss_fn_config),
        forward_only=request.forward_only,
    )


def check_forward_backward(body: bytes) -> tuple[str, int, int]:
    """(model_id, seq_id, tokens) of a request that parses and has no unknown fields; arrays are not checked.

    `tokens`: exact if the request can be decoded.
    """
    request = _parse_request(body)
    tokens = sum(
        len(chunk.encoded_text.tokens) // 4 or max(0, chunk.image.expected_tokens)
        for datum in request.data
        for chunk in datum.model_input
    )
    return request.model_id, request.seq_id, tokens


def is_forward_only(body: bytes) -> bool:
    """Whether the request computes no gradients."""
    return bool(_parse(descriptor.ForwardBackwardRequest, body).forward_only)


def _parse_request(body: bytes) -> Any:
    scan.bound(body)
    request = _parse(descriptor.ForwardBackwardRequest, body)
    # Provenance spans are known and unused: only stable_reinforce reads them, and the trainer refuses that loss.
    size = request.ByteSize()
    request.DiscardUnknownFields()
    if request.ByteSize() != size:
        raise UserError(
            "the forward_backward request has protobuf fields that this server does not know; "
            "allowed: those of tinker 0.38; use that version of the SDK, or upgrade the server"
        )
    return request


def _decode_datum(datum: Any, field: str) -> Datum:
    whole = _decode_prompt(datum.model_input, f"{field}.model_input")
    if len(datum.loss_fn_inputs) > limits.loss_inputs_max:
        raise TooLarge(
            f"{field}.loss_fn_inputs has {len(datum.loss_fn_inputs)} arrays; allowed: {limits.loss_inputs_max}"
        )
    return Datum(
        tokens=whole.tokens,
        inputs={
            name: tensors.decode(tensor, f"{field}.loss_fn_inputs.{name}")
            for name, tensor in datum.loss_fn_inputs.items()
        },
        images=tuple(whole.images),
    )


def _decode_prompt(chunks: Any, field: str) -> Prompt:
    whole = Prompt(field)
    for j, chunk in enumerate(chunks):
        kind = chunk.WhichOneof("chunk")
        if kind == "encoded_text":
            data = chunk.encoded_text.tokens
            if len(data) % 4:
                raise InvalidField(f"{field}.chunks[{j}].tokens: length in bytes", len(data), "a multiple of 4")
            whole.add_text(np.frombuffer(data, dtype="<i4").astype(np.int32))
        elif kind == "image":
            image = chunk.image
            if image.HasField("override_dimensions"):
                allowed = "none: an image is read in its own size"
                raise InvalidField(f"{field}.chunks[{j}].override_dimensions", "given", allowed)
            expected = image.expected_tokens if image.HasField("expected_tokens") else None
            whole.add_image(j, image.data, image.format, expected)
        else:
            raise prompts.refused(field, j, kind)
    return whole


def encode_forward_backward(request: ForwardBackward) -> bytes:
    """The request as protobuf; arrays dense, int64 or float32."""
    message = descriptor.ForwardBackwardRequest(
        model_id=request.run, seq_id=request.seq, loss_fn=request.loss, forward_only=request.forward_only
    )
    for key, value in request.config.items():
        if isinstance(value, str):
            message.loss_fn_config_v2[key].text = value
        else:
            message.loss_fn_config_v2[key].number = value
    for datum in request.data:
        encoded = message.data.add()
        for part in prompts.cut(datum.tokens.astype(np.int32), datum.images):
            chunk = encoded.model_input.add()
            if isinstance(part, Image):
                chunk.image.data, chunk.image.format, chunk.image.expected_tokens = part.data, part.format, part.tokens
            else:
                chunk.encoded_text.tokens = tensors.little_endian(part)
        for name, array in datum.inputs.items():
            tensors.encode(encoded.loss_fn_inputs[name], array)
    return _serialize(message)


# ---- forward_backward: response


def encode_forward_backward_output(output: ForwardBackwardOutput) -> bytes:
    """Consecutive datums whose arrays agree in dtype and trailing shape share a record; lengths may differ.

    All datums have the same names. Metric keys have the form `name:reduction`. Equal outputs give equal bytes.
    """
    message = descriptor.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord")
    for key, value in output.metrics.items():
        if key.count(":") != 1:
            raise ValueError(f"metric {key!r} must have the form name:reduction")  # else the SDK crashes
        message.metrics[key] = value
    for group in _groups(output.outputs):
        record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(group))
        for name, first in group[0].items():
            arrays = [datum[name] for datum in group]
            batch = record.fields[name]
            batch.data = b"".join(map(tensors.little_endian, arrays))
            ends = np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64)
            batch.offsets, batch.dtype = tensors.little_endian(ends), tensors.number(first.dtype)
            batch.trailing_shape.extend(first.shape[1:])
    return _serialize(message)


def decode_forward_backward_output(body: bytes) -> ForwardBackwardOutput:
    """The inverse, for clients in this package."""
    message = _parse(descriptor.ForwardBackwardOutput, body)
    outputs: list[dict[str, tensors.Array]] = []
    for record in message.loss_fn_outputs:
        datums: list[dict[str, tensors.Array]] = [{} for _ in range(record.num_datums)]
        for name, batch in record.fields.items():
            ends = np.frombuffer(batch.offsets, dtype="<i8")
            for i, datum in enumerate(datums):
                flat = tensors.elements(batch.data[ends[i] : ends[i + 1]], batch.dtype, name)
                trailing = list(batch.trailing_shape)
                datum[name] = flat.reshape([flat.size // (math.prod(trailing) or 1), *trailing])
        outputs += datums
    return ForwardBackwardOutput(outputs=outputs, metrics=dict(message.metrics))


def decode_metrics(body: bytes) -> dict[str, float]:
    """The metrics of a result, without its arrays."""
    return dict(_parse(descriptor.ForwardBackwardOutput, body).metrics)


def _groups(outputs: Sequence[dict[str, tensors.Array]]) -> Iterator[list[dict[str, tensors.Array]]]:
    """Groups of consecutive datums that fit one record."""
    group: list[dict[str, tensors.Array]] = []
    group_shape: object = None
    for datum in outputs:
        if datum.keys() != outputs[0].keys():
            raise ValueError(f"datums must have the same arrays: {sorted(datum)} and {sorted(outputs[0])}")
        shape = {name: (array.dtype, array.shape[1:]) for name, array in datum.items()}
        if group and shape != group_shape:
            yield group
            group = []
        group.append(datum)
        group_shape = shape
    if group:
        yield group


# ---- sample: response


def encode_sample_response(output: SampleOutput) -> bytes:
    """Sequences in order; arrays as int32 and float32."""
    message = descriptor.SampleResponse(prompt_cache_hit_tokens=output.prompt_cache_hit_tokens)
    for sequence in output.sequences:
        encoded = message.sequences.add(
            stop_reason=descriptor.STOP if sequence.stopped else descriptor.LENGTH,
            tokens=tensors.little_endian(sequence.tokens.astype(np.int32)),
            logprobs=tensors.little_endian(sequence.logprobs.astype(np.float32)),
        )
        _encode_topk(encoded, "topk_sampled_logprobs", sequence.topk)
    if output.prompt_logprobs is not None:
        message.prompt_logprobs = tensors.little_endian(output.prompt_logprobs.astype(np.float32))
    _encode_topk(message, "topk_prompt_logprobs", output.topk_prompt_logprobs)
    if output.target_prompt_logprobs is not None:
        _encode_cells(message.target_prompt_logprobs, output.target_prompt_logprobs)
    if output.prompt_draws is not None:
        tensors.encode(message.prompt_alt_tokens.tokens, output.prompt_draws.tokens.astype(np.int32))
        tensors.encode(message.prompt_alt_tokens.logprobs, output.prompt_draws.logprobs)
    return _serialize(message)


def decode_sample_response(body: bytes) -> SampleOutput:
    """The inverse, for clients in this package."""
    message = _parse(descriptor.SampleResponse, body)
    return SampleOutput(
        sequences=[
            Sampled(
                tokens=np.frombuffer(sequence.tokens, dtype="<i4").astype(np.int32),
                logprobs=np.frombuffer(sequence.logprobs, dtype="<f4").astype(np.float32),
                stopped=sequence.stop_reason == descriptor.STOP,
                topk=_decode_topk(sequence, "topk_sampled_logprobs"),
            )
            for sequence in message.sequences
        ],
        prompt_logprobs=(
            np.frombuffer(message.prompt_logprobs, dtype="<f4").astype(np.float32)
            if message.HasField("prompt_logprobs")
            else None
        ),
        topk_prompt_logprobs=_decode_topk(message, "topk_prompt_logprobs"),
        target_prompt_logprobs=(
            _decode_cells(message.target_prompt_logprobs) if message.HasField("target_prompt_logprobs") else None
        ),
        prompt_draws=(
            PromptDraws(
                tensors.decode(message.prompt_alt_tokens.tokens, "prompt_alt_tokens.tokens"),
                tensors.decode(message.prompt_alt_tokens.logprobs, "prompt_alt_tokens.logprobs"),
            )
            if message.HasField("prompt_alt_tokens")
            else None
        ),
        prompt_cache_hit_tokens=message.prompt_cache_hit_tokens,
    )


def _encode_topk(message: Any, field: str, topk: TopK | None) -> None:
    if topk is not None:
        encoded = getattr(message, field)
        encoded.token_ids = tensors.little_endian(topk.tokens.astype(np.int32))
        encoded.logprobs = tensors.little_endian(topk.logprobs.astype(np.float32))
        encoded.length, encoded.k = topk.tokens.shape


def _decode_topk(message: Any, field: str) -> TopK | None:
    if not message.HasField(field):
        return None
    encoded = getattr(message, field)
    shape = (encoded.length, encoded.k)
    return TopK(
        tokens=np.frombuffer(encoded.token_ids, dtype="<i4").astype(np.int32).reshape(shape),
        logprobs=np.frombuffer(encoded.logprobs, dtype="<f4").astype(np.float32).reshape(shape),
    )


def _encode_cells(message: Any, cells: Cells) -> None:
    if cells.starts is None or cells.columns is None:
        tensors.encode(message, cells.values.reshape(cells.shape))
        return
    message.dtype = tensors.number(cells.values.dtype)
    message.shape.extend(cells.shape)
    message.sparse_csr.values = tensors.little_endian(cells.values)
    message.sparse_csr.crow_indices = tensors.little_endian(cells.starts)
    message.sparse_csr.col_indices = tensors.little_endian(cells.columns)


def _decode_cells(message: Any) -> Cells:
    rows, columns = message.shape
    if message.WhichOneof("encoding") == "dense":
        return Cells(tensors.elements(message.dense, message.dtype, "dense"), (rows, columns))
    csr = message.sparse_csr
    return Cells(
        tensors.elements(csr.values, message.dtype, "values"),
        (rows, columns),
        tensors.elements(csr.crow_indices, descriptor.INT64, "crow_indices"),
        tensors.elements(csr.col_indices, descriptor.INT64, "col_indices"),
    )


# ---- bytes


def _parse(kind: Any, body: bytes) -> Any:
    with parsing(lambda _: _broken(kind, body)):
        return kind.FromString(body)


def _broken(kind: Any, body: bytes) -> UserError:
    name = kind.DESCRIPTOR.full_name
    return UserError(f"the body ({len(body)} bytes) is not a protobuf {name}; allowed: what tinker 0.25 and newer send")


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString(deterministic=True))
