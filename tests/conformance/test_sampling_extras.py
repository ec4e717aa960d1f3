"""What can be asked of a prompt, clones of a sampling client, weights that move on, and what is refused.

P tokens of a prompt, V vocabulary, K targets a position.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.conformance import data
from tests.conformance.conftest import NewClient, Trained
from tests.conformance.reference import Standard
from tests.conformance.server import Dtype, Server, wait_until
from tests.nearness import expect_near

pytestmark = [
    pytest.mark.timeout(60),
    # PEFT cannot know that a deliberately untied output adapter is meant (docs/decisions/0002).
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]

CLONE = 10**9
rng = np.random.default_rng
Scored = tuple[types.ModelInput, torch.Tensor, torch.Tensor]


def params(max_tokens: int = 1, seed: int = 0, **more: Any) -> types.SamplingParams:
    return types.SamplingParams(max_tokens=max_tokens, seed=seed, stop=[], **more)


def clone_of(client: tinker.SamplingClient) -> tinker.SamplingClient:
    """As another process gets it."""
    clone: tinker.SamplingClient = pickle.loads(pickle.dumps(client))  # noqa: S301  our own bytes
    return clone


def set_flag(service: tinker.ServiceClient, name: str, value: bool) -> None:
    """As if the server's config had said so."""
    config = service.holder._client_config
    assert getattr(config, name) != value
    service.holder._client_config = config.model_copy(update={name: value})


@pytest.fixture
def adapted(service: tinker.ServiceClient, trained: Trained) -> tinker.SamplingClient:
    return service.create_sampling_client(model_path=trained.path).result()


@pytest.fixture
def scored(model: Path, dtype: Dtype, trained: Trained) -> Scored:
    """A prompt of 80 tokens, and the adapter's distribution over each after the first, (P - 1, V): truth and peer."""
    tokens = data.tokens(rng(21), 80)
    with torch.no_grad():
        truth, peer = Standard(model, trained.directory, dtype).both(lambda of: of.distribution(tokens)[:-1])
    return types.ModelInput.from_ints(tokens), truth, peer


@pytest.fixture
def torch_only(sampler_name: str) -> None:
    if sampler_name == "vllm":
        pytest.skip("vLLM refuses it, which another test holds")


@pytest.mark.usefixtures("torch_only")
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_chosen_targets_of_a_prompt_are_scored_in_their_layout(
    sparse: bool, adapted: tinker.SamplingClient, scored: Scored
) -> None:
    prompt, *distributions = scored
    dice = rng(22)
    ids = torch.from_numpy(np.where(dice.random((79, 6)) < 0.15, dice.integers(0, data.vocabulary, (79, 6)), -1))
    asked = types.TensorData.from_torch_sparse(ids, pad_value=-1) if sparse else types.TensorData.from_torch(ids)
    assert (asked.sparse_crow_indices is not None) == sparse
    answer = adapted.sample(prompt, 1, params(temperature=0.5), target_prompt_logprobs=asked).result()
    found = answer.target_prompt_logprobs
    assert found is not None
    assert found.sparse_crow_indices == asked.sparse_crow_indices
    assert found.sparse_col_indices == asked.sparse_col_indices
    assert (found.dtype, found.shape) == ("float32", [79, 6])
    there, tokens = ids >= 0, ids.clamp(min=0)
    expect_near(found.to_torch()[there], *(each.gather(1, tokens)[there] for each in distributions))
    assert (found.to_torch()[~there] == 0.0).all()


def test_vllm_refuses_what_it_cannot_score(adapted: tinker.SamplingClient, sampler_name: str) -> None:
    if sampler_name == "torch":
        pytest.skip("the torch sampler scores all of it, which other tests hold")
    prompt = data.prompt(rng(22), 9)
    targets = types.TensorData.from_torch(torch.zeros((8, 2), dtype=torch.int64))
    for asked, complaint in (
        ({"target_prompt_logprobs": targets}, "target_prompt_logprobs is 'given'; allowed: none with the vLLM sampler"),
        ({"prompt_alt_tokens_k": 3}, "prompt_alt_tokens_k is 3; allowed: 0 with the vLLM sampler"),
    ):
        with pytest.raises(tinker.RequestFailedError, match=complaint):
            adapted.sample(prompt, 1, params(), **asked).result()
    with pytest.raises(
        tinker.RequestFailedError, match=r"temperature is 3.0; allowed: 0 to 1e-06 .greedy., or 0.01 to 2"
    ):
        adapted.sample(prompt, 1, params(temperature=3.0)).result()
    assert adapted.sample(prompt, 1, params()).result().sequences


@pytest.mark.usefixtures("torch_only")
def test_alternatives_to_a_prompt_s_tokens_are_drawn_and_scored(adapted: tinker.SamplingClient, scored: Scored) -> None:
    prompt, *distributions = scored
    answers = [
        adapted.sample(prompt, 1, params(seed=seed, temperature=0.7), prompt_alt_tokens_k=64).result()
        for seed in (1, 1, 2)
    ]
    drawn = [answer.prompt_alt_tokens for answer in answers]
    assert drawn[0] is not None
    assert drawn[1] is not None
    assert drawn[2] is not None
    tokens = drawn[0].tokens.to_torch()
    assert tokens.shape == (79, 64)
    expect_near(drawn[0].logprobs.to_torch(), *(each.gather(1, tokens) for each in distributions))
    assert torch.equal(tokens, drawn[1].tokens.to_torch())
    assert not torch.equal(tokens, drawn[2].tokens.to_torch())
    tempered = (distributions[0].double() / 0.7).softmax(-1)
    # The mean chance of what is drawn is that of a draw: five standard deviations over 79 * 64 draws.
    expected, chance = (tempered**2).sum(-1).mean(), tempered.gather(1, tokens)
    assert abs(float(chance.mean() - expected)) < 5 * float(chance.std()) / (79 * 64) ** 0.5


def test_the_last_n_tokens_alone_are_scored(adapted: tinker.SamplingClient, scored: Scored) -> None:
    prompt, *distributions = scored
    whole = adapted.compute_logprobs(prompt).result()
    some = adapted.compute_logprobs(prompt, prompt_logprobs_last_n=7).result()
    assert some[:-7] == [None] * 73
    assert some[-7:] == whole[-7:]
    tokens = torch.tensor(prompt.to_ints()[1:])[:, None]
    expect_near(torch.tensor(whole[1:])[:, None], *(each.gather(1, tokens) for each in distributions))
    answer = adapted.sample(
        prompt, 1, params(), include_prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=7
    ).result()
    assert answer.topk_prompt_logprobs is not None
    assert answer.topk_prompt_logprobs[:-7] == [None] * 73
    assert all(row is not None and len(row) == 2 for row in answer.topk_prompt_logprobs[-7:])


def test_what_cannot_be_asked_is_refused_by_name(adapted: tinker.SamplingClient) -> None:
    prompt = data.prompt(rng(23), 9)
    short = types.TensorData.from_torch(torch.zeros((7, 2), dtype=torch.int64))
    asked: list[tuple[str, dict[str, Any]]] = [
        (r"target_prompt_logprobs.shape is \[7, 2\]; allowed: \(8, K\)", {"target_prompt_logprobs": short}),
        ("prompt_alt_tokens_k is 65", {"prompt_alt_tokens_k": 65}),
        (
            "prompt_logprobs_last_n is 9; allowed: 1 to 8",
            {"prompt_logprobs_last_n": 9, "include_prompt_logprobs": True},
        ),
    ]
    for complaint, fields in asked:
        with pytest.raises(tinker.TinkerError, match=complaint):
            adapted.sample(prompt, 1, params(), **fields).result()


def test_inflight_samplers_move_on_with_the_run_and_snapshots_stay(new_client: NewClient) -> None:
    client = new_client()
    probe = data.prompt(rng(24), 20)

    def train() -> None:
        client.forward_backward(data.batch(rng(25)), "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=2e-2))

    train()
    first = client.save_weights_and_get_sampling_client(kind="inflight").result()
    snapshot = client.save_weights_and_get_sampling_client().result()
    before = snapshot.compute_logprobs(probe).result()
    assert first.compute_logprobs(probe).result() == before
    train()
    client.save_weights_and_get_sampling_client().result()
    assert first.compute_logprobs(probe).result() == before, "a snapshot moved an inflight sampler"
    second = client.save_weights_and_get_sampling_client(kind="inflight").result()
    after = second.compute_logprobs(probe).result()
    assert after != before, "the newest client used older weights"
    wait_until(lambda: first.compute_logprobs(probe).result() == after, "the first sampler has the newest weights")
    assert snapshot.compute_logprobs(probe).result() == before


@pytest.fixture
def closed_at_end() -> Iterator[ExitStack]:
    """For clones: nobody else closes them, and their heartbeats would go on after the server has ended."""
    with ExitStack() as stack:
        yield stack


def test_each_clone_counts_in_a_block_of_its_own(adapted: tinker.SamplingClient, closed_at_end: ExitStack) -> None:
    """The server numbers them: pickled ones, those made from a handle, and clones of clones."""
    prompt = data.prompt(rng(26), 8)
    how = params(6, seed=3)
    expected = [each.tokens for each in adapted.sample(prompt, 2, how).result().sequences]
    handle = adapted.get_sampler_handle()
    assert "tml-local" not in handle
    clones = [
        clone_of(adapted),
        tinker.SamplingClient.from_sampler_handle(handle, api_key="tml-local"),
        tinker.SamplingClient.from_sampler_handle(handle, api_key="tml-local"),
    ]
    clones.append(clone_of(clones[0]))
    for clone in clones:
        closed_at_end.callback(clone.holder.close)
        assert [each.tokens for each in clone.sample(prompt, 2, how).result().sequences] == expected
        assert clone.get_base_model() == adapted.get_base_model()
    assert [clone._cloned_sampler_id for clone in clones] == [1, 2, 3, 4]
    assert [clone._request_id_counter // CLONE for clone in clones] == [1, 2, 3, 4]
    assert adapted._cloned_sampler_id == 0


@pytest.fixture
def one_poll(server: Server, trained: Trained) -> Iterator[Callable[[], tinker.SamplingClient]]:
    """Clients that wait for all their samples by one poll, which this server's config does not ask of them."""
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        set_flag(service, "sample_use_retrieve_futures", True)
        yield lambda: service.create_sampling_client(model_path=trained.path).result()


def test_one_poll_serves_all_samples_of_a_client(
    one_poll: Callable[[], tinker.SamplingClient], adapted: tinker.SamplingClient, closed_at_end: ExitStack
) -> None:
    polling = one_poll()
    clone = clone_of(polling)
    closed_at_end.callback(clone.holder.close)
    asked = [(data.prompt(rng(n), 5 + n), params(4 + n % 5, seed=n)) for n in range(20)]
    for client in (polling, clone, polling):  # the last after a pause, with its cursor moved on
        answers = [future.result() for future in [client.sample(prompt, 2, how) for prompt, how in asked]]
        assert client._futures_poller is not None
        for answer, (prompt, how) in zip(answers[::5], asked[::5], strict=True):
            alone = adapted.sample(prompt, 2, how).result()
            assert [each.tokens for each in answer.sequences] == [each.tokens for each in alone.sequences]
    assert polling._futures_poller is not None
    assert polling._futures_poller._cursor > 0


def test_one_poll_tells_of_failures_too(one_poll: Callable[[], tinker.SamplingClient]) -> None:
    client = one_poll()
    with pytest.raises(tinker.RequestFailedError, match=r"prompt\[0\] is 1000000"):
        client.sample(types.ModelInput.from_ints([10**6]), 1, params()).result()
    assert client.sample(data.prompt(rng(1), 5), 1, params()).result().sequences


def test_losses_of_the_server_are_refused_with_what_to_do_instead(service: tinker.ServiceClient) -> None:
    """Clients ask for them only where the server's config says so, which this one's does not."""

    def mine(logprobs: Any, weights: Any) -> tuple[Any, dict[str, Any]]:
        loss = -(logprobs * weights).sum()
        return loss, {"custom/mine:sum": loss}

    set_flag(service, "custom_loss_server_side", True)
    with pytest.raises(tinker.APIStatusError, match="forward_backward_custom") as refused:
        service.create_custom_loss(mine, input_ranks={"logprobs": 1, "weights": 1}).result()
    assert refused.value.status_code == 422


def test_stable_reinforce_is_refused_with_what_to_pass_instead(
    service: tinker.ServiceClient, client: tinker.TrainingClient, model: Path
) -> None:
    for complaint in ("stable_reinforce", "pass importance_sampling, ppo or cispo instead"):
        with pytest.raises(tinker.RequestFailedError, match=complaint):
            client.forward_backward(data.batch(rng(28)), "stable_reinforce").result()
    recording = service.create_sampling_client(base_model=str(model), record_stability_info=True).result()
    with pytest.raises(tinker.TinkerError, match="pass the loss importance_sampling, ppo or cispo"):
        recording.sample(data.prompt(rng(28), 5), 1, params()).result()
