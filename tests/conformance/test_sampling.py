"""Sampling clients: of the base model and of adapters, alone and in a crowd."""

import pickle
import threading
import time
from concurrent.futures import CancelledError
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.conformance import data
from tests.conformance.conftest import NewClient, NewService, Trained
from tests.conformance.data import CE
from tests.conformance.reference import Reference, Standard
from tests.conformance.server import Dtype, Server, wait_until
from tests.nearness import expect_near

pytestmark = pytest.mark.timeout(60)
rng = np.random.default_rng


def texts(answer: types.SampleResponse) -> list[list[int]]:
    return [each.tokens for each in answer.sequences]


def params(max_tokens: int = 8, seed: int = 0, **more: Any) -> types.SamplingParams:
    """Of texts that end by length alone, unless told otherwise."""
    given: dict[str, Any] = {"max_tokens": max_tokens, "seed": seed, "stop": [], **more}
    return types.SamplingParams(**given)


@pytest.fixture
def base(service: tinker.ServiceClient, model: Path) -> tinker.SamplingClient:
    return service.create_sampling_client(base_model=str(model)).result()


@pytest.fixture
def adapted(service: tinker.ServiceClient, trained: Trained) -> tinker.SamplingClient:
    return service.create_sampling_client(model_path=trained.path).result()


def test_a_sampler_knows_its_base_model_and_tokenizer(
    base: tinker.SamplingClient, adapted: tinker.SamplingClient, model: Path
) -> None:
    for each in (base, adapted):
        assert each.get_base_model() == str(model)
        assert each.get_tokenizer().encode("and the")


@pytest.mark.parametrize(("kind", "temperature"), [("base", 0.0), ("adapted", 0.0), ("base", 1e-8), ("base", 1e-6)])
def test_greedy_texts_and_their_log_probabilities_are_the_models(
    kind: str,
    temperature: float,
    base: tinker.SamplingClient,
    adapted: tinker.SamplingClient,
    model: Path,
    dtype: Dtype,
    trained: Trained,
) -> None:
    sampler, adapter = (base, None) if kind == "base" else (adapted, trained.directory)
    standard = Standard(model, adapter, dtype)
    prompt = data.tokens(rng(1), 11)
    answer = sampler.sample(types.ModelInput.from_ints(prompt), 2, params(40, temperature=temperature)).result()
    first, second = answer.sequences
    assert first.tokens == second.tokens
    assert first.stop_reason == "length"
    standard.expect(first.logprobs, lambda model: model.continued(prompt, first.tokens), "of what was sampled")
    standard.expect(first.logprobs, lambda model: model.after(prompt, first.tokens).max(-1).values, "of the likeliest")


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_log_probabilities_are_those_of_the_tempered_distribution(
    temperature: float, adapted: tinker.SamplingClient, model: Path, dtype: Dtype, trained: Trained
) -> None:
    prompt = data.tokens(rng(2), 9)
    answer = adapted.sample(types.ModelInput.from_ints(prompt), 4, params(10, temperature=temperature)).result()
    found = [logprob for each in answer.sequences for logprob in each.logprobs or []]
    Standard(model, trained.directory, dtype).expect(
        found,
        lambda model: torch.cat([model.continued(prompt, each.tokens, temperature) for each in answer.sequences]),
    )


def test_prompt_log_probabilities_are_those_of_a_forward_pass(
    service: tinker.ServiceClient, adapted: tinker.SamplingClient, model: Path, dtype: Dtype, trained: Trained
) -> None:
    """In bfloat16 the two may differ by what transformers differs from the truth."""
    client = service.create_training_client_from_state(trained.path).result()
    text = data.tokens(rng(3), 41)
    [forward] = data.logprobs(client.forward([data.weighted(text)], CE).result())
    standard = Standard(model, trained.directory, dtype)
    with torch.no_grad():
        truth, peer = standard.both(lambda reference: reference.logprobs(data.weighted(text)))
    first, *rest = adapted.compute_logprobs(types.ModelInput.from_ints(text)).result()
    assert first is None
    expect_near(torch.tensor(rest), torch.from_numpy(forward), torch.from_numpy(forward) + peer - truth)


def test_the_likeliest_tokens_of_prompt_and_text_come_with_their_log_probabilities(
    adapted: tinker.SamplingClient, model: Path, dtype: Dtype, trained: Trained
) -> None:
    prompt = data.tokens(rng(4), 15)
    answer = adapted.sample(
        types.ModelInput.from_ints(prompt), 1, params(6), include_prompt_logprobs=True,
        topk_prompt_logprobs=3, topk_sample_logprobs=5,
    ).result()  # fmt: skip
    [text] = answer.sequences
    of_prompt, of_text = answer.topk_prompt_logprobs, text.topk_logprobs
    assert of_prompt is not None
    assert of_text is not None
    assert of_prompt[0] is None
    assert len(of_prompt) == 15
    assert len(of_text) == 6
    rows = [row or [] for row in (*of_prompt[1:], *of_text)]
    assert [len(row) for row in rows] == [3] * 14 + [5] * 6
    assert all(row == sorted(row, key=lambda one: -one[1]) for row in rows)
    asked, standard = prompt + text.tokens[:-1], Standard(model, trained.directory, dtype)

    def of_those_tokens(reference: Reference) -> torch.Tensor:
        after = zip(rows, reference.distribution(asked), strict=True)
        return torch.cat([each_V[[token for token, _ in row]] for row, each_V in after])

    def of_the_likeliest(reference: Reference) -> torch.Tensor:
        after = zip(rows, reference.distribution(asked), strict=True)
        return torch.cat([each_V.topk(len(row)).values for row, each_V in after])

    for compute in (of_those_tokens, of_the_likeliest):
        standard.expect([logprob for row in rows for _, logprob in row], compute, compute.__name__)


def test_a_seed_reproduces_its_texts_and_samples_differ(base: tinker.SamplingClient) -> None:
    prompt = data.prompt(rng(5), 8)
    one, same, other = (base.sample(prompt, 6, params(10, seed=seed)).result() for seed in (41, 41, 42))
    assert texts(one) == texts(same)
    assert [each.logprobs for each in one.sequences] == [each.logprobs for each in same.sequences]
    assert texts(one) != texts(other)
    assert len({tuple(each) for each in texts(one)}) > 3
    assert len({each.sequence_id for each in [*one.sequences, *same.sequences]}) == 12


def test_without_a_seed_no_two_requests_are_the_same(base: tinker.SamplingClient) -> None:
    prompt = data.prompt(rng(6), 8)
    free = types.SamplingParams(max_tokens=12, stop=[])
    assert texts(base.sample(prompt, 2, free).result()) != texts(base.sample(prompt, 2, free).result())


def test_a_prompt_in_pieces_is_the_prompt(base: tinker.SamplingClient) -> None:
    text = data.tokens(rng(7), 12)
    pieces = types.ModelInput(chunks=[types.EncodedTextChunk(tokens=part) for part in (text[:3], text[3:4], text[4:])])
    whole = types.ModelInput.from_ints(text)
    assert texts(base.sample(pieces, 3, params()).result()) == texts(base.sample(whole, 3, params()).result())


def test_a_text_ends_with_its_stop_which_stays_in_it(base: tinker.SamplingClient) -> None:
    """By token id, by string, and by one of several strings; the same text as without the stop, up to there."""
    prompt = data.prompt(rng(8), 10)
    free = base.sample(prompt, 1, params(30)).result().sequences[0]
    tokenizer = base.get_tokenizer()
    stop = next(token for index, token in enumerate(free.tokens) if index > 4 and token not in free.tokens[:index])
    upto = free.tokens[: free.tokens.index(stop) + 1]
    by_id = base.sample(prompt, 1, params(30, stop=[stop])).result().sequences[0]
    assert by_id.tokens == upto
    assert by_id.stop_reason == "stop"
    pieces = [str(tokenizer.decode([token])) for token in free.tokens]
    text = next(piece for piece in pieces[3:] if piece.isascii() and piece.strip())
    ends = next(n for n in range(1, 31) if text in tokenizer.decode(free.tokens[:n]))
    for stops in (text, [text], ["nowhere in it", text]):
        by_text = base.sample(prompt, 1, params(30, stop=stops)).result().sequences[0]
        assert by_text.tokens == free.tokens[:ends]
        assert by_text.stop_reason == "stop"


def test_the_end_token_ends_a_text_unless_stop_is_empty(service: tinker.ServiceClient, new_client: NewClient) -> None:
    """A run that learnt to say nothing but the end."""
    client = new_client()
    end = client.get_tokenizer().eos_token_id
    assert isinstance(end, int)
    text = data.tokens(rng(9), 10)
    for _ in range(16):  # at 2e-2 the loss leaps up again now and then, in float32 too
        client.forward_backward([data.weighted([*text, *([end] * 8)])], CE)
        client.optim_step(types.AdamParams(learning_rate=5e-3))
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(text)
    ended = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=6, temperature=0.0)).result().sequences[0]
    assert ended.tokens == [end]
    assert ended.stop_reason == "stop"
    going = sampler.sample(prompt, 1, params(6, temperature=0.0)).result().sequences[0]
    assert going.tokens == [end] * 6
    assert going.stop_reason == "length"


def test_without_max_tokens_a_text_may_fill_the_context(base: tinker.SamplingClient) -> None:
    prompt = data.prompt(rng(10), 505)
    [text] = base.sample(prompt, 1, types.SamplingParams(stop=[])).result().sequences
    assert len(text.tokens) == 512 - 505
    assert text.stop_reason == "length"


def test_top_k_and_top_p_draw_from_what_they_leave(base: tinker.SamplingClient) -> None:
    """One token left is greedy; the log-probabilities are those of the distribution that was left."""
    prompt = data.prompt(rng(11), 9)
    greedy = texts(base.sample(prompt, 1, params(10, temperature=0.0)).result())
    assert texts(base.sample(prompt, 1, params(10, top_k=1)).result()) == greedy
    assert texts(base.sample(prompt, 1, params(10, top_p=1e-6)).result()) == greedy
    [text] = base.sample(prompt, 1, params(10, top_k=2), topk_sample_logprobs=4).result().sequences
    assert text.topk_logprobs is not None
    assert text.logprobs is not None
    for token, logprob, row in zip(text.tokens, text.logprobs, text.topk_logprobs, strict=True):
        assert row is not None
        assert len(row) == 2
        assert sum(np.exp(each) for _, each in row) == pytest.approx(1.0, abs=1e-5)
        assert logprob == pytest.approx(dict(row)[token], abs=1e-6)


def test_a_snapshot_never_sees_later_training(service: tinker.ServiceClient, new_client: NewClient) -> None:
    client = new_client()
    probe = data.prompt(rng(12), 20)
    snapshots, expected = [], []
    for index in range(3):
        client.forward_backward(data.batch(rng(30 + index)), CE)
        client.optim_step(types.AdamParams(learning_rate=2e-2))
        snapshots.append(client.save_weights_and_get_sampling_client().result())
        expected.append(snapshots[-1].compute_logprobs(probe).result())
    named = client.save_weights_for_sampler("last").result().path
    client.optim_step(types.AdamParams(learning_rate=2e-2)).result()
    assert expected[0] != expected[1] != expected[2]
    assert [each.compute_logprobs(probe).result() for each in snapshots] == expected
    again = service.create_sampling_client(model_path=named).result()
    assert again.compute_logprobs(probe).result() == expected[2]


def test_a_snapshot_is_taken_where_it_was_asked_for(new_client: NewClient) -> None:
    """Between two steps that were both submitted before anything was waited for."""
    hasty, patient = new_client(), new_client()
    probe = data.prompt(rng(13), 20)
    wanted = []
    for each in (hasty, patient):
        each.forward_backward(data.batch(rng(40)), CE)
        each.optim_step(types.AdamParams(learning_rate=2e-2))
        snapshot = each.save_weights_and_get_sampling_client()
        if each is patient:
            snapshot.result()
        each.forward_backward(data.batch(rng(41)), CE)
        each.optim_step(types.AdamParams(learning_rate=2e-2))
        wanted.append(snapshot.result().compute_logprobs(probe).result())
    assert wanted[0] == wanted[1]


def test_an_inflight_sampler_sees_the_weights_that_were_published(new_client: NewClient) -> None:
    client = new_client()
    probe = data.prompt(rng(14), 20)
    client.forward_backward(data.batch(rng(50)), CE)
    client.optim_step(types.AdamParams(learning_rate=2e-2))
    inflight = client.save_weights_and_get_sampling_client(kind="inflight").result()
    snapshot = client.save_weights_and_get_sampling_client().result()
    assert inflight.compute_logprobs(probe).result() == snapshot.compute_logprobs(probe).result()


def test_sixty_four_requests_at_once_answer_as_one_at_a_time(
    base: tinker.SamplingClient, adapted: tinker.SamplingClient
) -> None:
    """Of two adapters, of different lengths; the same tokens and log-probabilities, bit for bit."""
    dice = rng(15)
    requests = [
        (base if n % 3 else adapted, data.prompt(dice, int(dice.integers(2, 60))), params(int(dice.integers(1, 24)), n))
        for n in range(64)
    ]
    futures = [sampler.sample(prompt, 1 + n % 3, how) for n, (sampler, prompt, how) in enumerate(requests)]
    crowd = [each.result() for each in futures]
    for n in range(0, 64, 5):
        sampler, prompt, how = requests[n]
        alone = sampler.sample(prompt, 1 + n % 3, how).result()
        assert texts(alone) == texts(crowd[n])
        assert [each.logprobs for each in alone.sequences] == [each.logprobs for each in crowd[n].sequences]
    assert [len(each.sequences) for each in crowd] == [1 + n % 3 for n in range(64)]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_many_requests_at_once_are_all_answered_and_leave_no_memory_behind(
    base: tinker.SamplingClient, server: Server, count: int
) -> None:
    """Once it is warm: the first rounds leave kernels, one for each number of rows, and the allocator's pages.

    vLLM's core, a child of the engine's, keeps some all the same: 9 to 40 MiB were seen.
    """
    prompt = types.ModelInput.from_ints(data.tokens(rng(3), 9))

    def at_once() -> list[types.SampleResponse]:
        futures = [base.sample(prompt, 1, params(2, seed=n)) for n in range(count)]
        return [each.result() for each in futures]

    first, *_ = [at_once() for _ in range(4)]
    before = resident_mib(server)
    _, again = at_once(), at_once()
    assert [texts(each) for each in again] == [texts(each) for each in first]
    assert all(len(each.sequences[0].tokens) == 2 for each in again)
    after = resident_mib(server)
    assert {role: mib for role, mib in after.items() if mib > before[role] + (48 if "child" in role else 24)} == {}


def resident_mib(server: Server) -> dict[str, float]:
    """Of each role's process, and of each role's children together."""
    found: dict[str, float] = {}
    for role, pid in server.processes().items():
        found[role] = _resident_mib(pid)
        found[f"children of {role}"] = sum(_resident_mib(each) for each in server.members(role) if each != pid)
    return found


def _resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def test_a_cancelled_sample_stops_computing(server: Server, base: tinker.SamplingClient) -> None:
    """A thousand long texts would keep the engine busy for minutes; once cancelled, it does nothing soon."""
    base.sample(data.prompt(rng(16), 8), 1, params()).result()  # it is up
    pids = server.members("engine")
    future = base.sample(data.prompt(rng(16), 8), 1024, params(500))

    def busy() -> float:
        """The share of the last moments that the engine computed."""
        before, began = sum(map(_cpu_s, pids)), time.monotonic()
        time.sleep(0.3)
        return (sum(map(_cpu_s, pids)) - before) / (time.monotonic() - began)

    wait_until(lambda: busy() > 0.3, "the engine computes the samples")
    future.future().cancel()
    with pytest.raises(CancelledError):
        future.result()
    wait_until(lambda: busy() < 0.05, "the engine has stopped computing them", 10.0)
    assert base.sample(data.prompt(rng(17), 8), 1, params()).result().sequences


def _cpu_s(pid: int) -> float:
    """Processor seconds that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_a_sampler_can_be_handed_to_another_process(base: tinker.SamplingClient) -> None:
    """Pickled, and as a handle; their requests do not collide with those of the first."""
    prompt = data.prompt(rng(18), 8)
    expected = texts(base.sample(prompt, 2, params()).result())
    pickled = pickle.loads(pickle.dumps(base))  # noqa: S301 - our own bytes
    handled = tinker.SamplingClient.from_sampler_handle(base.get_sampler_handle(), api_key="tml-local")
    with closing(pickled.holder), closing(handled.holder):  # or their heartbeats go on after the server has ended
        assert texts(pickled.sample(prompt, 2, params()).result()) == expected
        assert texts(handled.sample(prompt, 2, params()).result()) == expected
    assert texts(base.sample(prompt, 2, params(seed=9)).result()) != expected


def test_training_and_sampling_go_on_beside_each_other(
    new_service: NewService, new_client: NewClient, base: tinker.SamplingClient
) -> None:
    client = new_client()
    stop = threading.Event()
    answers: list[list[list[int]]] = []

    def sample() -> None:
        while not stop.is_set():
            answers.append(texts(base.sample(data.prompt(rng(19), 10), 4, params(20)).result()))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        for index in range(10):
            client.forward_backward(data.batch(rng(index)), CE)
            client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    finally:
        stop.set()
        thread.join(30)
    assert len(answers) > 1
    assert all(each == answers[0] for each in answers)
