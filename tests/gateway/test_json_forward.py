"""forward and forward_backward as older SDKs send them: stored as protobuf, answered as JSON."""

from typing import Any

import msgspec
import numpy as np
import pytest

from knapper.errors import Corrupt
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal.records import Result, encode
from knapper.wire import proto, zstd
from knapper.wire.types import ForwardBackwardOutput
from tests.gateway.running import Running, gateway
from tests.gateway.test_futures import commit


@pytest.fixture(scope="module")
def running() -> Any:
    with gateway() as running:
        yield running


def asked(run: str, seq: int, field: str = "forward_backward_input", loss: str = "cross_entropy") -> dict[str, Any]:
    tensors = {
        "target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]},
        "weights": {"data": [1.0, 0.5], "dtype": "float32", "shape": [2]},
    }
    datum = {"model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}, "loss_fn_inputs": tensors}
    return {field: {"data": [datum], "loss_fn": loss}, "model_id": run, "seq_id": seq}


def test_what_comes_as_json_is_applied_as_protobuf(running: Running) -> None:
    run = running.make_run()
    assert running.post("forward_backward", asked(run, 1))["request_id"] == f"{run}:1"
    assert running.post("forward", asked(run, 2, "forward_input"))["request_id"] == f"{run}:2"
    for seq, only in ((1, False), (2, True)):
        stored = running.stored(run, seq)
        assert stored is not None
        assert stored.kind == "forward_backward"
        request = proto.decode_forward_backward(stored.body())
        assert (request.run, request.seq, request.forward_only) == (run, seq, only)
        assert request.data[0].inputs["weights"].tolist() == [1.0, 0.5]


def test_a_repetition_is_told_by_its_bytes(running: Running) -> None:
    run = running.make_run()
    first = running.post("forward_backward", asked(run, 1))
    assert running.post("forward_backward", asked(run, 1)) == first
    refused = running.post("forward_backward", asked(run, 1, loss="ppo"), status=422)
    assert "was used before" in refused["detail"]


def test_a_wrong_request_leaves_no_hole(running: Running) -> None:
    run = running.make_run()
    wrong = asked(run, 1)
    wrong["forward_backward_input"]["data"][0]["loss_fn_inputs"]["weights"]["shape"] = [9]
    assert running.post("forward_backward", wrong)["request_id"] == f"{run}:1"
    stored = running.stored(run, 1)
    assert stored is not None
    assert stored.kind == "tombstone"
    assert "weights.shape is [9]" in stored.error


def test_an_answer_is_json_unless_protobuf_is_accepted(running: Running) -> None:
    run = running.make_run()
    output = ForwardBackwardOutput([{"logprobs": np.array([-0.5], np.float32)}], {"loss:sum": 0.5})
    body = proto.encode_forward_backward_output(output)
    commit(running, run, 1, Result(seq=0, sha256=b"", content_type="application/x-protobuf", body=body))
    for accept in ("application/json", "*/*"):
        reply = running.http.post("retrieve_future", json={"request_id": f"{run}:0"}, headers={"Accept": accept})
        assert reply.json() == {
            "loss_fn_output_type": "ArrayRecord",
            "loss_fn_outputs": [{"logprobs": {"data": [-0.5], "dtype": "float32", "shape": [1]}}],
            "metrics": {"loss:sum": 0.5},
        }
    for accept in ("application/x-protobuf", "application/x-protobuf, application/json"):
        reply = running.http.post("retrieve_future", json={"request_id": f"{run}:0"}, headers={"Accept": accept})
        assert reply.content == body


def test_what_came_as_json_before_is_read_repeated_and_told_from_damage(running: Running) -> None:
    """Format 1 had one hash, that of the JSON, over a body that was protobuf."""
    run = running.make_run()
    running.post("forward_backward", asked(run, 1))
    stored = running.stored(run, 1)
    assert stored is not None
    old = msgspec.structs.replace(stored, v=1, sha256=stored.request_sha256, asked_sha256=b"")
    assert old.sha256 != stored.sha256
    assert old.body() == stored.body()
    with pytest.raises(Corrupt, match="field sha256 is not that of its body"):
        msgspec.structs.replace(old, v=2).body()
    with pytest.raises(Corrupt, match="field sha256 is not that of its body"):
        msgspec.structs.replace(old, body_zstd=zstd.compress(stored.body() + b"\x00")).body()
    name = layout.operation(RunId(run), 1)
    running.run(running.store.delete(name))
    running.run(running.store.put_if_absent(name, encode(old)))
    assert running.post("forward_backward", asked(run, 1))["request_id"] == f"{run}:1"
    assert "was used before" in running.post("forward_backward", asked(run, 1, loss="ppo"), status=422)["detail"]
