"""More datums than one request carries: the SDK sends the later chunks first, and compresses them."""

import numpy as np
import pytest
from tinker import types

from tests.conformance import data
from tests.conformance.conftest import NewClient
from tests.conformance.data import CE

pytestmark = pytest.mark.timeout(90)


def test_eleven_hundred_datums_in_two_chunks_equal_the_same_in_two_calls(new_client: NewClient) -> None:
    """Results in the order of the datums, losses added up, and the same weights afterwards, bit for bit."""
    rng = np.random.default_rng(0)
    batch = data.batch(rng, tuple(int(n) for n in rng.integers(2, 7, 1100)))
    one, two = new_client(), new_client()
    chunk = one.holder.get_client_config().fwdbwd_max_chunk_len
    assert one.holder.get_client_config().parallel_fwdbwd_chunks
    assert one.holder.get_client_config().proto_compress_fwdbwd
    assert chunk < len(batch) <= 2 * chunk
    whole = one.forward_backward(batch, CE)
    halves = [two.forward_backward(part, CE) for part in (batch[:chunk], batch[chunk:])]
    steps = [each.optim_step(types.AdamParams(learning_rate=1e-2)) for each in (one, two)]
    found = whole.result()
    first, second = (each.result() for each in halves)
    assert [len(each) for each in data.logprobs(found)] == [datum.model_input.length for datum in batch]
    assert data.bits(found) == data.bits(first) + data.bits(second)
    assert found.metrics["loss:sum"] == pytest.approx(first.metrics["loss:sum"] + second.metrics["loss:sum"])
    for each in steps:
        each.result()
    probe = batch[:50]
    assert data.bits(one.forward(probe, CE).result()) == data.bits(two.forward(probe, CE).result())


def test_chunked_operations_in_a_row_keep_their_order(new_client: NewClient) -> None:
    """Everything is submitted before anything is waited for."""
    rng = np.random.default_rng(1)
    batch = data.batch(rng, (3,) * 1030)
    client, patient = new_client(), new_client()
    futures = []
    for _ in range(2):
        futures.append(client.forward_backward(batch, CE))
        client.optim_step(types.AdamParams(learning_rate=1e-2))
    futures.append(client.forward(batch[:3], CE))
    impatient = [data.bits(each.result()) for each in futures]
    calm = []
    for _ in range(2):
        calm.append(data.bits(patient.forward_backward(batch, CE).result()))
        patient.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    calm.append(data.bits(patient.forward(batch[:3], CE).result()))
    assert impatient == calm
    assert calm[0] != calm[1]


def test_a_large_datum_goes_alone_and_whole(new_client: NewClient) -> None:
    """(512, 64) targets and weights: close to 400 kB a datum, some 13 of them to a chunk."""
    rng = np.random.default_rng(2)
    batch = [
        types.Datum(
            model_input=data.prompt(rng, 512),
            loss_fn_inputs={
                "target_tokens": rng.integers(0, data.vocabulary, (512, 64)),
                "weights": rng.normal(size=(512, 64)).astype(np.float32),
            },
        )
        for _ in range(15)
    ]
    client = new_client(rank=1)
    found = client.forward(batch, CE).result()
    alone = [client.forward([datum], CE).result() for datum in (batch[0], batch[-1])]
    assert [each.shape for each in data.logprobs(found)] == [(512, 64)] * 15
    for one, among in zip(alone, (0, -1), strict=True):
        np.testing.assert_allclose(data.logprobs(one)[0], data.logprobs(found)[among], atol=1e-5)
