"""Validation of forward_backward requests before anything is computed. An error names the first wrong datum and
position.

T tokens of a datum, K targets a position.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knapper import limits
from knapper.engine.models.config import Facts
from knapper.engine.training import losses
from knapper.engine.training.losses import Loss
from knapper.errors import InvalidField, TooLarge, UserError
from knapper.wire.types import Datum, ForwardBackward

Array = NDArray[Any]


def check(request: ForwardBackward, model: Facts) -> tuple[Loss, dict[str, float]]:
    """The loss and its config. Raises UserError."""
    loss = losses.find(request.loss)
    config = loss.read_config(request.config)
    if not request.data:
        raise InvalidField("data", [], f"1 to {limits.datums_per_request_max} datums")
    if len(request.data) > limits.datums_per_request_max:
        raise TooLarge(
            f"data has {len(request.data)} datums; allowed: {limits.datums_per_request_max}; send fewer a call"
        )
    for index, datum in enumerate(request.data):
        where = f"datum {index}: "
        _check_tokens(where, datum.tokens, model)
        _check_names(where, datum, loss)
        _check_targets(where, datum, loss, model)
        for name, values in datum.inputs.items():
            if name != "target_tokens":
                _check_values(where, name, values, datum.inputs["target_tokens"].shape)
        _check_thresholds(where, datum.inputs, loss, config)
        if "sequence_ratio_mask" in datum.inputs:
            _check_mask(where, datum.inputs["sequence_ratio_mask"])
    return loss, config


def expect_fit(request: ForwardBackward, rows_max: int | None) -> None:
    """Raises TooLarge for a datum of more tokens than the device's memory can hold the activations of."""
    for index, datum in enumerate(request.data):
        if rows_max is not None and len(datum.tokens) > rows_max:
            raise TooLarge(
                f"datum {index} has {len(datum.tokens)} tokens; allowed: {rows_max}, for which the server's memory has "
                "room in a training pass. Send shorter ones, or train where there is more memory"
            )


def _check_tokens(where: str, tokens_T: Array, model: Facts) -> None:
    if not 1 <= len(tokens_T) <= model.context:
        raise InvalidField(
            f"{where}model_input's length in tokens", len(tokens_T), f"1 to {model.context}, the model's context"
        )
    _check_ids(where, "model_input", tokens_T, model)


def _check_ids(where: str, name: str, ids: Array, model: Facts) -> None:
    wrong = (ids < 0) | (ids >= model.vocab_size)
    if wrong.any():
        position = _first(wrong)
        allowed = f"0 to {model.vocab_size - 1}: the vocabulary has {model.vocab_size} tokens"
        raise InvalidField(
            f"{where}{name}[{position}]", int(ids[wrong][0]), allowed, "Tokenize with this model's tokenizer"
        )


def _check_names(where: str, datum: Datum, loss: Loss) -> None:
    allowed = (*loss.required, *loss.optional)
    missing = [name for name in loss.required if name not in datum.inputs]
    if missing:
        raise UserError(
            f"{where}loss_fn_inputs has no {' and no '.join(missing)}; {loss.name} needs {', '.join(loss.required)}"
        )
    for name in datum.inputs:
        if name not in allowed:
            raise UserError(f"{where}loss_fn_inputs has {name!r}; allowed for {loss.name}: {', '.join(allowed)}")


def _check_targets(where: str, datum: Datum, loss: Loss, model: Facts) -> None:
    targets = datum.inputs["target_tokens"]
    if targets.dtype.kind != "i":
        raise InvalidField(f"{where}target_tokens' dtype", str(targets.dtype), "int64")
    if targets.ndim != 1 and not (targets.ndim == 2 and loss.columns):
        columns = " or (N, K)" if loss.columns else ""
        raise InvalidField(f"{where}target_tokens' shape", targets.shape, f"(N){columns} for {loss.name}")
    if targets.ndim == 2 and not 1 <= targets.shape[1] <= limits.target_columns_max:
        raise InvalidField(f"{where}target_tokens' shape", targets.shape, f"(N, 1 to {limits.target_columns_max})")
    if len(targets) != len(datum.tokens):
        raise UserError(
            f"{where}target_tokens has {len(targets)} values but model_input has {len(datum.tokens)} tokens; "
            "they must match (model_input = tokens[:-1], target_tokens = tokens[1:])"
        )
    _check_ids(where, "target_tokens", targets, model)


def _check_values(where: str, name: str, values: Array, shape: tuple[int, ...]) -> None:
    if values.dtype.kind != "f":
        raise InvalidField(f"{where}{name}' dtype", str(values.dtype), "float32", "Convert it before you send it")
    if values.ndim == 1 and len(shape) == 1 and len(values) != shape[0]:
        raise UserError(f"{where}{name} has {len(values)} values but target_tokens has {shape[0]}; they must match")
    if values.shape != shape:
        raise UserError(f"{where}{name} has shape {values.shape} but target_tokens has {shape}; they must match")
    wrong = ~np.isfinite(values)
    if wrong.any():
        raise InvalidField(f"{where}{name}[{_first(wrong)}]", float(values[wrong][0]), "a finite number")


def _check_thresholds(where: str, inputs: Mapping[str, Array], loss: Loss, config: Mapping[str, float]) -> None:
    """Clip bounds: each given once (by config, per token, or by default), low <= high everywhere."""
    bounds: list[Array] = []
    for name in ("clip_low_threshold", "clip_high_threshold"):
        if name not in loss.config:
            return
        if name in config and name in inputs:
            raise UserError(f"{where}{name} is given both in loss_fn_config and in loss_fn_inputs; give it once")
        value = inputs.get(name, config.get(name, loss.default(name)))
        if value is None:
            raise UserError(
                f"{where}{loss.name} needs {name}, in loss_fn_config (one number) or in loss_fn_inputs (one a token); "
                "there is no published default"
            )
        bounds.append(np.asarray(value))
        if (bounds[-1] < 0).any():
            wrong = np.atleast_1d(bounds[-1] < 0)
            raise InvalidField(f"{where}{name}[{_first(wrong)}]", float(bounds[-1][wrong][0]), "0 or more")
    low, high = np.broadcast_arrays(*bounds)
    wrong = np.atleast_1d(low > high)
    if wrong.any():
        values = (float(np.atleast_1d(low)[wrong][0]), float(np.atleast_1d(high)[wrong][0]))
        raise InvalidField(
            f"{where}(clip_low_threshold, clip_high_threshold) at {_first(wrong)}", values, "low not above high"
        )


def _check_mask(where: str, mask: Array) -> None:
    wrong = (mask != 0) & (mask != 1)
    if wrong.any():
        raise InvalidField(f"{where}sequence_ratio_mask[{_first(wrong)}]", float(mask[wrong][0]), "0 or 1")
    if not mask.any():
        raise UserError(f"{where}sequence_ratio_mask is 0 everywhere; at least one token must be 1")


def _first(wrong: Array) -> str:
    """The position of the first True: `4`, or `4, 1` in two dimensions."""
    return ", ".join(str(int(axis[0])) for axis in np.nonzero(wrong))
