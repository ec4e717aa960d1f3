"""A datum with images, on the page of a pass: their tokens have no id that says anything."""

from typing import Any

import numpy as np

from gateway.console.passes import tokens_of
from gateway.console.tokens import parts_of
from knapper import limits
from knapper.wire import proto
from knapper.wire.types import Datum, ForwardBackward, ForwardBackwardOutput, Image


def test_an_images_tokens_are_called_an_image() -> None:
    tokens = np.array([5, 6, 0, 0, 7, 8, 0, 0, 0, 9, 4, 3], np.int32)
    images = (Image(2, 2, 1, "png", b"one"), Image(6, 3, 3, "jpeg", b"two"))
    inputs: dict[str, Any] = {
        "target_tokens": np.array([*tokens[1:], 2], np.int64),
        "weights": np.array([0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1], np.float32),
    }
    sent = ForwardBackward("run", 1, [Datum(tokens, inputs, images)], "cross_entropy", {}, forward_only=False)
    result = ForwardBackwardOutput([{"logprobs": np.full(12, -1.0, np.float32)}], {})
    body, output = proto.encode_forward_backward(sent), proto.encode_forward_backward_output(result)
    found = tokens_of(body, output, 0)
    assert found is not None
    parts, rows = found
    assert parts == [[5, 6], 2, [7]]
    assert [(row.token, row.image) for row in rows] == [
        (8, False), (0, True), (0, True), (0, True), (9, False), (4, False), (3, False), (2, False),
    ]  # fmt: skip
    assert parts_of(None, parts) == "5 6 [image of 2 tokens] 7"
    assert parts_of(None, [[1] * limits.console_text_chars_max, 2, [7]]).endswith("1 1")
