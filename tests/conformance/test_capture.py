"""Agents' sessions are captured: the official clients of three protocols against a real server, token for token."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import openai
import pytest
import tinker

from tests.command import knapper
from tests.conformance.server import Server, wait_until
from tests.conformance.test_jobs_by_http import environment_of
from tests.gateway.openai.chatting import chat_model

QUESTION: list[Any] = [{"role": "user", "content": "what is it?"}]
HEADER = "X-Knapper-Capture"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("models") / "base" / "tiny", context=4096)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.start(model, tmp_path_factory.mktemp("knapper") / "data") as running:
        yield running
    assert "Traceback" not in running.log(), running.log()[-4000:]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-local", max_retries=0) as client:
        yield client


def told(server: Server, *arguments: str) -> Any:
    done = knapper("capture", *arguments, "--json", environment=environment_of(server))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def turns(server: Server, episode: str) -> list[Any]:
    return list(told(server, "show", episode)["turns"])


def test_all_protocols_keep_what_was_drawn_whole_and_streamed(
    server: Server, client: openai.OpenAI, model: Path
) -> None:
    asked: Any = {"model": str(model), "messages": QUESTION, "max_tokens": 8}
    by = client.with_options(default_headers={HEADER: "math/openai"})
    whole = by.chat.completions.create(**asked, n=2, logprobs=True)
    stream: Any = by.chat.completions.create(**asked, logprobs=True, stream=True)
    chosen = [chunk.choices[0].logprobs for chunk in stream]
    streamed = [token.logprob for each in chosen if each is not None for token in each.content]
    by.responses.create(model=str(model), input="what is it?", max_output_tokens=8)
    with anthropic.Anthropic(base_url=f"{server.url}/capture/math/claude", api_key="tml-local") as claude:
        claude.messages.create(**asked)
        with claude.messages.stream(**asked) as events:
            spent = events.get_final_message().usage
    kept = turns(server, "math/openai")
    assert [len(turn["sequences"]) for turn in kept] == [2, 1, 1]
    for choice, sequence in zip(whole.choices, kept[0]["sequences"], strict=True):
        assert choice.logprobs is not None
        said = [token.logprob for token in choice.logprobs.content or []]
        assert said == sequence["logprobs"][: len(said)] != []
    assert streamed == kept[1]["sequences"][0]["logprobs"][: len(streamed)]
    assert kept[0]["prompt"] == kept[1]["prompt"] == kept[2]["prompt"]
    other = turns(server, "math/claude")
    assert [turn["prompt"] for turn in other] == [kept[0]["prompt"]] * 2
    assert len(other[1]["sequences"][0]["tokens"]) == spent.output_tokens
    for turn in [*kept, *other]:
        assert turn["weights"] == {"run": None, "step": 0, "digest": None, "sampler": "engine float32"}
        assert turn["base_model"] == turn["model"] != ""
    scored = knapper("capture", "score", "math/openai", "--", "-0.5", environment=environment_of(server))
    assert scored.stdout == "episode math/openai scored: -0.5\n"
    shown = knapper("capture", "show", "math/openai", environment=environment_of(server)).stdout.splitlines()
    assert shown[0] == "math/openai: 3 turns, score -0.5"
    assert len(shown) == 2 + 4  # a line an answer
    used = knapper("usage", environment=environment_of(server)).stdout
    assert re.search(r"^captured: \d+ of 10000 episodes$", used, flags=re.MULTILINE)
    listed = {each["episode"]: each for each in told(server, "list")}
    assert [listed[f"math/{name}"]["turns"] for name in ("openai", "claude")] == [3, 2]
    assert (listed["math/openai"]["score"], listed["math/claude"]["score"]) == (-0.5, None)


def test_what_is_kept_is_what_the_trainer_computes(server: Server, client: openai.OpenAI, model: Path) -> None:
    """Of a checkpoint that was trained: ids and log-probabilities as the trainer's forward has them."""
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    training = service.create_lora_training_client(base_model=str(model), rank=4).result()
    inputs: Any = {"target_tokens": [7, 8, 9], "weights": [1.0] * 3}
    learned = tinker.Datum(model_input=tinker.ModelInput.from_ints([6, 7, 8]), loss_fn_inputs=inputs)
    training.forward_backward([learned], "cross_entropy").result()
    training.optim_step(tinker.AdamParams(learning_rate=0.05)).result()
    path = training.save_weights_for_sampler("drawn").result().path
    by = client.with_options(default_headers={HEADER: "exact"})
    stream: Any = by.chat.completions.create(model=path, messages=QUESTION, max_tokens=24, stream=True)
    assert list(stream)
    (turn,) = turns(server, "exact")
    weights = turn["weights"]
    assert (weights["run"], weights["step"]) == (training.model_id, 1)
    assert re.fullmatch("[0-9a-f]{16}", weights["digest"])
    assert turn["model"] == path
    (sequence,) = turn["sequences"]
    prompt, tokens = turn["prompt"], sequence["tokens"]
    whole = [*prompt, *tokens]
    inputs = {"target_tokens": whole[1:], "weights": [1.0] * (len(whole) - 1)}
    datum = tinker.Datum(model_input=tinker.ModelInput.from_ints(whole[:-1]), loss_fn_inputs=inputs)
    outputs = training.forward([datum], "cross_entropy").result().loss_fn_outputs
    computed = np.array(outputs[0]["logprobs"].data, np.float32)[len(prompt) - 1 :]
    np.testing.assert_allclose(computed, np.array(sequence["logprobs"], np.float32), atol=1e-5)


def blocks() -> tuple[str, list[str]]:
    """(the program, the commands) of the page."""
    page = (Path(__file__).parents[2] / "docs" / "capture.md").read_text(encoding="utf-8")
    program = re.search(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    commands = re.search(r"^```sh\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert program
    assert commands
    return program[1], commands[1].splitlines()


@pytest.mark.timeout(240)
def test_the_program_and_the_commands_of_the_page_train_an_adapter(
    server: Server, client: openai.OpenAI, model: Path
) -> None:
    """The engine is killed while the job trains."""
    program, commands = blocks()
    for said, meant in (("http://127.0.0.1:8000", server.url), ("HuggingFaceTB/SmolLM2-135M-Instruct", str(model))):
        assert said in program
        program = program.replace(said, meant)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    for command in commands[:-1]:
        done_command = knapper(*command.split()[1:], environment=environment_of(server))
        assert done_command.returncode == 0, command + done_command.stderr
    scores = {each["episode"]: each["score"] for each in told(server, "list") if each["group"] == "colors"}
    assert len(scores) == 4
    assert scores["colors/0"] == 1.0
    first, second = turns(server, "colors/0")
    assert second["prompt"][: len(first["prompt"])] == first["prompt"]
    *words, follow = commands[-1].replace("--epochs 4", "--epochs 20").split()[1:]
    assert follow == "--follow"
    submitted = knapper(*words, environment=environment_of(server))
    assert submitted.returncode == 0, submitted.stderr
    assert submitted.stderr.startswith("4 episodes with ")
    metrics = server.data / "jobs" / "local" / "bolder" / "metrics.jsonl"
    wait_until(metrics.exists, "the job has trained a step")
    server.kill("engine")
    shown = knapper("jobs", "show", "bolder", follow, environment=environment_of(server))
    assert shown.returncode == 0, f"{shown.stdout}{shown.stderr}{server.log()[-3000:]}"
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [each["step"] for each in steps] == list(range(1, 11))  # 20 epochs of 4 episodes, 8 a step
    assert abs(steps[0]["ratio/mean"] - 1) < 1e-4, "the trainer computes what was sampled"
    by = client.with_options(default_headers={HEADER: "after"})
    by.chat.completions.create(model="bolder", messages=QUESTION, max_tokens=4)
    assert turns(server, "after")[0]["weights"]["step"] == 10


def test_a_name_that_cannot_be_is_refused_before_anything_is_sampled(server: Server, model: Path) -> None:
    body = {"model": str(model), "messages": QUESTION, "max_tokens": 2}
    key = {"Authorization": "Bearer tml-local"}
    http = httpx.Client(base_url=server.url, timeout=60)
    for place, headers in (
        ("/v1", {HEADER: "../etc"}), ("/v1", {HEADER: ""}), ("/capture/a/v1", {HEADER: "b"}),
        ("/capture/-/v1", {}), ("/capture/%2e%2e/v1", {}), ("/capture/x%00/v1", {}),
    ):  # fmt: skip
        answer = http.post(f"{place}/chat/completions", json=body, headers=key | headers)
        assert answer.status_code == 400, (place, headers, answer.text)
        assert answer.json()["error"]["param"] == HEADER
    for place in ("/capture/v1", "/capture/a/b/c/v1", "/capture/a/b/api/v1"):
        assert http.post(f"{place}/chat/completions", json=body, headers=key).status_code == 404
    assert http.get("/capture/a/v1/models", headers=key).status_code == 200
    assert http.post("/capture/a/v1/chat/completions", json=body).status_code == 401
    http.close()
    missing = knapper("capture", "show", "a", environment=environment_of(server))
    assert (missing.returncode, "does not exist" in missing.stderr) == (1, True)


def test_a_gateway_that_is_killed_before_it_answers_has_a_whole_turn_or_none(server: Server, model: Path) -> None:
    asked: Any = {"model": str(model), "messages": QUESTION, "max_tokens": 2000, "temperature": 2}
    headers = {HEADER: "killed"}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-local", max_retries=0) as client:
        stream: Any = client.chat.completions.create(**asked, stream=True, extra_headers=headers)
        ends = [next(iter(stream)).choices[0].finish_reason]
        server.kill("gateway")
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            ends += [chunk.choices[0].finish_reason for chunk in stream]
        assert ends == [None] * len(ends)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-local", max_retries=5) as client:
        again = client.chat.completions.create(**asked | {"max_tokens": 3}, extra_headers=headers)
    kept = turns(server, "killed")
    assert 1 <= len(kept) <= 2
    assert len(kept[-1]["sequences"][0]["tokens"]) == (again.usage.completion_tokens if again.usage else 0)
    done = knapper("capture", "delete", "killed", environment=environment_of(server))
    assert done.stdout == f"episode killed deleted: {len(kept)} turns\n"
    assert "killed" not in [each["episode"] for each in told(server, "list")]
