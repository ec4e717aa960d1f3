"""Saving a run, and going on from what was saved."""

from collections.abc import Callable

import numpy as np
import pytest
import tinker
from tinker import types

from tests.conformance import data
from tests.conformance.conftest import NewClient, NewService
from tests.conformance.data import CE

pytestmark = pytest.mark.timeout(60)
PROBE = data.batch(np.random.default_rng(99))


def go(client: tinker.TrainingClient, first: int, steps: int) -> list[bytes]:
    """Take steps `first` and on, which differ from each other; then say what the weights are."""
    for index in range(first, first + steps):
        client.forward_backward(data.batch(np.random.default_rng(index)), CE)
        client.optim_step(types.AdamParams(learning_rate=1e-2))
    return data.bits(client.forward(PROBE, CE).result())


def test_going_on_with_the_optimizer_is_as_if_nothing_had_happened(
    service: tinker.ServiceClient, new_client: NewClient
) -> None:
    straight = new_client()
    saved = go(straight, 0, 3)
    path = straight.save_state("middle").result().path
    end = go(straight, 3, 3)
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    assert resumed.model_id != straight.model_id
    assert resumed.get_info().lora_rank == 4
    assert go(resumed, 0, 0) == saved
    assert go(resumed, 3, 3) == end


def test_going_on_without_the_optimizer_starts_its_moments_afresh(
    service: tinker.ServiceClient, new_client: NewClient
) -> None:
    """Not as the run itself goes on; the first step from fresh moments is checked in test_losses."""
    straight = new_client()
    saved = go(straight, 0, 3)
    path = straight.save_state("middle").result().path
    end = go(straight, 3, 2)
    fresh, again = (service.create_training_client_from_state(path).result() for _ in range(2))
    assert go(fresh, 0, 0) == saved
    resumed = go(fresh, 3, 2)
    assert resumed != end
    assert go(again, 3, 2) == resumed


@pytest.mark.parametrize("optimizer", [True, False])
def test_a_state_loaded_into_a_run_replaces_what_it_had(
    optimizer: bool, service: tinker.ServiceClient, new_client: NewClient
) -> None:
    straight, other = new_client(), new_client(seed=8)
    saved = go(straight, 0, 2)
    path = straight.save_state("here").result().path
    go(other, 20, 2)
    other.forward_backward(data.batch(np.random.default_rng(77)), CE).result()  # pending gradients go too
    load: Callable[[str], tinker.APIFuture[types.LoadWeightsResponse]]
    load = other.load_state_with_optimizer if optimizer else other.load_state
    with pytest.warns(FutureWarning, match="deprecated"):
        loaded = load(path).result()
    assert loaded.path == path
    create = (
        service.create_training_client_from_state_with_optimizer
        if optimizer
        else service.create_training_client_from_state
    )
    assert go(other, 0, 0) == saved
    assert go(other, 2, 2) == go(create(path).result(), 2, 2)


def test_a_saved_state_stays_what_it_was(service: tinker.ServiceClient, new_client: NewClient) -> None:
    client = new_client()
    saved = go(client, 0, 1)
    path = client.save_state("first").result().path
    assert go(client, 1, 2) != saved
    assert go(service.create_training_client_from_state(path).result(), 0, 0) == saved


def test_a_name_is_used_once_unless_it_is_overwritten(service: tinker.ServiceClient, new_client: NewClient) -> None:
    client = new_client()
    first = go(client, 0, 1)
    path = client.save_state("twice").result().path
    second = go(client, 1, 1)
    with pytest.raises(tinker.RequestFailedError, match=r"'twice'.*exists already.*overwrite=True") as refused:
        client.save_state("twice").result()
    assert refused.value.category.value == "user"
    assert go(service.create_training_client_from_state(path).result(), 0, 0) == first
    assert client.save_state("twice", overwrite=True).result().path == path
    assert go(service.create_training_client_from_state(path).result(), 0, 0) == second


def test_a_state_and_sampler_weights_may_share_a_name(client: tinker.TrainingClient) -> None:
    state = client.save_state("same").result().path
    weights = client.save_weights_for_sampler("same").result().path
    assert state == f"tinker://{client.model_id}/weights/same"
    assert weights == f"tinker://{client.model_id}/sampler_weights/same"


def test_a_run_of_another_session_goes_on_from_the_state(new_service: NewService, new_client: NewClient) -> None:
    client = new_client()
    saved = go(client, 0, 1)
    path = client.save_state("shared").result().path
    with new_service() as other:
        assert go(other.create_training_client_from_state(path).result(), 0, 0) == saved


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("tinker://{run}/weights/none", "none.*does not exist"),
        ("tinker://ses-00000000000000000000000000000000:train:0/weights/none", "does not exist"),
        ("tinker://{run}/cookies/none", "cookies"),
        ("/etc/passwd", "tinker://"),
        ("tinker://{run}/weights/../../x", r"\.\."),
    ],
)
def test_a_path_that_leads_nowhere_says_so(
    path: str, said: str, service: tinker.ServiceClient, new_client: NewClient
) -> None:
    client = new_client()
    path = path.format(run=client.model_id)
    with pytest.raises(tinker.TinkerError, match=said):
        service.create_training_client_from_state(path).result()
    with pytest.warns(FutureWarning), pytest.raises(tinker.TinkerError, match=said):
        client.load_state(path).result()
    go(client, 0, 1)


def test_weights_for_a_sampler_have_no_optimizer_to_go_on_with(
    service: tinker.ServiceClient, new_client: NewClient
) -> None:
    """Their weights can be trained on; their optimizer is asked for in vain."""
    client = new_client()
    now = go(client, 0, 1)
    path = client.save_weights_for_sampler("only").result().path
    with pytest.raises(tinker.TinkerError, match=r"optimizer.*create_training_client_from_state"):
        service.create_training_client_from_state_with_optimizer(path).result()
    with pytest.warns(FutureWarning), pytest.raises(tinker.TinkerError, match="optimizer"):
        client.load_state_with_optimizer(path).result()
    assert go(client, 0, 0) == now
    assert go(service.create_training_client_from_state(path).result(), 0, 0) == now


def test_a_state_of_another_shape_does_not_fit(new_client: NewClient) -> None:
    small, large = new_client(rank=2), new_client(rank=8)
    path = small.save_state("small").result().path
    before = go(large, 0, 1)
    with pytest.warns(FutureWarning), pytest.raises(tinker.RequestFailedError, match=r"r is 2.*8"):
        large.load_state(path).result()
    assert go(large, 0, 0) == before
