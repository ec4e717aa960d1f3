"""A fault that is planted in a client's loop is printed in its terminal by the SDK, stored, and counted."""

from collections.abc import Callable

import httpx
import pytest
import tinker
from tinker import types

from knapper.diagnostics import rules
from knapper.engine.training.losses import LOSSES
from tests.conformance.loops import PROMPT, clean_steps, datum, rollouts, step
from tests.conformance.server import Server, wait_until

NewClient = Callable[..., tinker.TrainingClient]


def _said(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    messages = (record.getMessage() for record in caplog.records if record.name.startswith("tinker"))
    return [message for message in messages if words in message]


def test_the_user_is_told_of_a_stale_sampler_and_of_a_wrong_temperature_and_of_nothing_else(
    new_client: NewClient, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    client = new_client()
    sampler = client.save_weights_and_get_sampling_client().result()
    metrics = step(client, rollouts(sampler))
    assert metrics["sampled_tokens:sum"] == 24
    assert abs(metrics["kl_sample_train_v1:sum"]) < 1e-4
    assert metrics["kl_sample_train_v2:sum"] < 1e-8
    assert metrics["entropy:sum"] > 0
    assert metrics["ratio_p01:min"] == pytest.approx(1.0, abs=1e-4)
    assert (metrics["groups:sum"], metrics["degenerate_groups:sum"]) == (1.0, 0.0)
    for _ in range(2):
        sampler = client.save_weights_and_get_sampling_client().result()
        step(client, rollouts(sampler))
    assert not _said(caplog, "rollouts of step"), "three clean steps"

    step(client, rollouts(sampler))
    stale = "all 2 rollouts of step 4 were drawn by weights that are 1 updates old"

    def heard() -> bool:
        client.forward(rollouts(sampler), "importance_sampling").result()  # any operation brings the news
        return bool(_said(caplog, stale))

    wait_until(heard, "the SDK prints it")
    sampler = client.save_weights_and_get_sampling_client().result()
    step(client, rollouts(sampler, temperature=0.5))
    sampler = client.save_weights_and_get_sampling_client().result()
    step(client, rollouts(sampler))
    assert len(_said(caplog, "all 2 rollouts of step 5 were drawn with temperature 0.5")) == 1
    assert len(_said(caplog, "rollouts of step")) == 2

    page = httpx.get(f"{server.url}/runs/{client.model_id}/operations").text
    assert "stale sampler</strong> at step 4, " in page
    assert "all 2 rollouts of step 4" in page
    assert "wrong temperature</strong> at step 5," in page
    (*_, point) = httpx.get(f"{server.url}/runs/{client.model_id}/curve").json()["points"]
    assert point["kl_sample_train_v2/mean"] < 1e-8
    assert point["ratio_p99"] == pytest.approx(1.0, abs=1e-4)
    assert point["degenerate_groups"] == 0.0
    counted = httpx.get(f"{server.url}/metrics").text
    assert 'knapper_alarms_total{alarm="stale_sampler"}' in counted
    assert 'knapper_alarms_total{alarm="wrong_temperature"}' in counted
    assert "knapper_sample_age_updates_bucket" in counted


def test_another_run_s_adapter_is_said_and_an_answer_names_its_weights(
    new_client: NewClient, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (new_client() for _ in range(2))
    wrong = second.save_weights_and_get_sampling_client().result()
    step(second, rollouts(wrong))
    wrong = second.save_weights_and_get_sampling_client().result()
    step(first, rollouts(wrong))
    first.forward(rollouts(wrong), "importance_sampling").result()
    (said,) = _said(caplog, "were drawn by another adapter")
    assert f"that of {second.model_id}, step 1." in said


def test_an_answered_sample_names_the_weights_that_drew_it(new_client: NewClient, server: Server) -> None:
    client = new_client()
    sampler = client.save_weights_and_get_sampling_client().result()
    step(client, rollouts(sampler))
    client.save_weights_for_sampler("named").result()
    with httpx.Client(base_url=f"{server.url}/api/v1/", headers={"X-API-Key": "tml-local"}) as http:
        path = f"tinker://{client.model_id}/sampler_weights/named"
        session = client.model_id.partition(":")[0]
        asked = {"session_id": session, "sampling_session_seq_id": 90, "model_path": path}
        sampling = http.post("create_sampling_session", json=asked).raise_for_status().json()["sampling_session_id"]
        prompt = {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]}
        sample = {"sampling_session_id": sampling, "seq_id": 1, "prompt": prompt, "num_samples": 1}
        sample |= {"sampling_params": {"max_tokens": 3}}
        future = http.post("asample", json=sample).raise_for_status().json()["request_id"]
        answer = http.post("retrieve_future", json={"request_id": future}, timeout=60).raise_for_status()
        digest, steps, sampled_by = answer.headers["knapper-weights"].split(";")
        assert len(digest) == 16
        assert (steps, sampled_by) == ("step=1", "sampler=engine float32")


STEPS = [pytest.param(3), pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])]
CONFIG = {"gspo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if "logprobs" in loss.required])
def test_clean_steps_of_a_real_engine_are_far_below_the_limits(
    new_client: NewClient, server: Server, loss: str, steps: int
) -> None:
    client, apart = new_client(seed=2), []
    masked = "sequence_ratio_mask" in LOSSES[loss].required
    for _ in range(steps):
        sampler = client.save_weights_and_get_sampling_client().result()
        metrics = step(client, rollouts(sampler, masked=masked), loss, **CONFIG.get(loss, {}))
        apart.append(metrics["kl_sample_train_v2:sum"] / metrics["sampled_tokens:sum"])
    assert max(apart) < rules.KL_EXACT / 10, f"the largest k2 a token is {max(apart):.2g}"
    assert "Alarms</h2>" not in httpx.get(f"{server.url}/runs/{client.model_id}/operations").text


def _six(client: tinker.TrainingClient) -> list[types.Datum]:
    sampler = client.save_weights_and_get_sampling_client().result()
    return [each for _ in range(3) for each in rollouts(sampler)]


def _resumed(client: tinker.TrainingClient, service: tinker.ServiceClient) -> tinker.TrainingClient:
    path = client.save_state("before").result().path
    again = service.create_training_client_from_state(path).result()
    step(again, _six(again))
    return again


def _doubled_optim_step(client: tinker.TrainingClient, _: tinker.ServiceClient) -> tinker.TrainingClient:
    client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    return client


def _repeated_after_a_load(client: tinker.TrainingClient, service: tinker.ServiceClient) -> tinker.TrainingClient:
    data = _six(client)
    step(client, data)
    path = client.save_state("contained").result().path
    again = service.create_training_client_from_state_with_optimizer(path).result()
    step(again, data)
    return again


def _doubled_pass(client: tinker.TrainingClient, _: tinker.ServiceClient) -> tinker.TrainingClient:
    data = _six(client)
    client.forward_backward(data, "importance_sampling").result()
    step(client, data)
    return client


def _rewards_of_zero(client: tinker.TrainingClient, _: tinker.ServiceClient) -> tinker.TrainingClient:
    sampler = client.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=4, stop=[])
    data = []
    for first in range(rules.SILENT_GROUPS):
        prompt = [first + 10, 9, 2]
        drawn = sampler.sample(types.ModelInput.from_ints(prompt), 2, params).result().sequences
        data += [datum(each, 0.0, prompt=prompt) for each in drawn]
    step(client, data)
    return client


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_resumed, "goes on from a checkpoint of step 2 with a fresh optimizer"),
        (_doubled_optim_step, "optim_step was applied twice: step 3 has no forward_backward"),
        (_repeated_after_a_load, "step 4 trained on exactly the data of step 3, which the checkpoint that was loaded"),
        (_doubled_pass, "step 3 was given the same data twice before one optim_step"),
        (_rewards_of_zero, "step 3 learned nothing: in the last 16 groups all completions of a prompt have the same"),
    ],
)
def test_each_planted_fault_is_printed_by_the_sdk_within_a_step(
    new_client: NewClient,
    service: tinker.ServiceClient,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[tinker.TrainingClient, tinker.ServiceClient], tinker.TrainingClient],
    words: str,
) -> None:
    client = new_client()
    sampler = clean_steps(client, 2)
    client = fault(client, service)

    def heard() -> bool:
        client.forward(rollouts(sampler), "importance_sampling").result()
        return bool(_said(caplog, words))

    wait_until(heard, "the SDK prints it")
    assert len(_said(caplog, words)) == 1
