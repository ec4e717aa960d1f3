"""forward and forward_backward in the JSON of SDK 0.18 to 0.24, and JSON responses to samples for clients without
protobuf. Shapes: see knapper.wire.types.
"""

from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from knapper import limits
from knapper.errors import TooLarge
from knapper.wire import prompts
from knapper.wire.fields import Id, RequestBody, Seq, Text
from knapper.wire.json import decode
from knapper.wire.json_tensors import TensorData
from knapper.wire.sample_requests import PromptBody
from knapper.wire.tensors import Array
from knapper.wire.types import Cells, Datum, Float32, ForwardBackward, ForwardBackwardOutput, SampleOutput, TopK


class JsonDatum(RequestBody, frozen=True, kw_only=True):
    loss_fn_inputs: Annotated[dict[Text, TensorData], Meta(max_length=limits.loss_inputs_max)]
    model_input: PromptBody


class ForwardBackwardInput(RequestBody, frozen=True, kw_only=True):
    data: list[JsonDatum]
    loss_fn: Text
    loss_fn_config: Annotated[dict[Text, float | str], Meta(max_length=limits.loss_config_keys_max)] | None = None

    def request(self, run: str, seq: int, field: str, *, forward_only: bool) -> ForwardBackward:
        if len(self.data) > limits.datums_per_request_max:
            raise TooLarge(
                f"{field}.data has {len(self.data)} datums; allowed: {limits.datums_per_request_max}; send fewer a call"
            )
        prompts.expect_few(sum(datum.model_input.images for datum in self.data))
        return ForwardBackward(
            run=run,
            seq=seq,
            data=[_datum(datum, f"{field}.data[{i}]") for i, datum in enumerate(self.data)],
            loss=self.loss_fn,
            config=self.loss_fn_config or {},
            forward_only=forward_only,
        )


class JsonForwardBackward(RequestBody, frozen=True, kw_only=True):
    """forward_backward"""

    model_id: Id
    seq_id: Seq
    forward_backward_input: ForwardBackwardInput

    def request(self) -> ForwardBackward:
        """The request in knapper.wire.types. Raises UserError for an inconsistent array."""
        return self.forward_backward_input.request(
            self.model_id, self.seq_id, "forward_backward_input", forward_only=False
        )


class JsonForward(RequestBody, frozen=True, kw_only=True):
    """forward: as forward_backward, without a gradient"""

    model_id: Id
    seq_id: Seq
    forward_input: ForwardBackwardInput

    def request(self) -> ForwardBackward:
        """The request in knapper.wire.types. Raises UserError for an inconsistent array."""
        return self.forward_input.request(self.model_id, self.seq_id, "forward_input", forward_only=True)


def decode_forward_backward(body: bytes) -> ForwardBackward:
    return decode(body, JsonForwardBackward).request()


def decode_forward(body: bytes) -> ForwardBackward:
    return decode(body, JsonForward).request()


def _datum(datum: JsonDatum, field: str) -> Datum:
    whole = datum.model_input.whole(f"{field}.model_input")
    return Datum(
        tokens=whole.tokens,
        inputs={name: tensor.array(f"{field}.loss_fn_inputs.{name}") for name, tensor in datum.loss_fn_inputs.items()},
        images=tuple(whole.images),
    )


# ---- responses


def encode_forward_backward_output(output: ForwardBackwardOutput) -> bytes:
    """The JSON of `ForwardBackwardOutput` in those SDKs."""
    outputs = [{name: _tensor(array) for name, array in datum.items()} for datum in output.outputs]
    return msgspec.json.encode(
        {"loss_fn_output_type": "ArrayRecord", "loss_fn_outputs": outputs, "metrics": output.metrics}
    )


def encode_sample_response(output: SampleOutput) -> bytes:
    """The JSON of a sample; null for a missing log-probability."""
    response: dict[str, Any] = {
        "type": "sample",
        "sequences": [
            {
                "stop_reason": "stop" if sequence.stopped else "length",
                "tokens": sequence.tokens.tolist(),
                "logprobs": sequence.logprobs.tolist(),
                "topk_logprobs": _topk(sequence.topk),
            }
            for sequence in output.sequences
        ],
        "prompt_logprobs": None if output.prompt_logprobs is None else _nullable(output.prompt_logprobs),
        "topk_prompt_logprobs": _topk(output.topk_prompt_logprobs),
        "target_prompt_logprobs": _cells(output.target_prompt_logprobs),
        "prompt_alt_tokens": None,
        "prompt_cache_hit_tokens": output.prompt_cache_hit_tokens,
    }
    if (draws := output.prompt_draws) is not None:
        response["prompt_alt_tokens"] = {"tokens": _tensor(draws.tokens), "logprobs": _tensor(draws.logprobs)}
    return msgspec.json.encode(response)


def _tensor(array: Array) -> dict[str, Any]:
    kind = "float32" if array.dtype.kind == "f" else "int64"
    return {"data": array.ravel().tolist(), "dtype": kind, "shape": list(array.shape)}


def _cells(cells: Cells | None) -> dict[str, Any] | None:
    if cells is None:
        return None
    tensor = _tensor(cells.values) | {"shape": list(cells.shape)}
    if cells.starts is not None and cells.columns is not None:
        tensor |= {"sparse_crow_indices": cells.starts.tolist(), "sparse_col_indices": cells.columns.tolist()}
    return tensor


def _nullable(logprobs: Float32) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in logprobs]


def _topk(topk: TopK | None) -> list[list[tuple[int, float]] | None] | None:
    """A list of (token, log-probability) for each position, null for a position without any."""
    if topk is None:
        return None
    rows = [
        [(int(token), float(logprob)) for token, logprob in zip(tokens, logprobs, strict=True) if logprob > _EMPTY]
        for tokens, logprobs in zip(topk.tokens, topk.logprobs, strict=True)
    ]
    return [row or None for row in rows]


_EMPTY = -99999.0
