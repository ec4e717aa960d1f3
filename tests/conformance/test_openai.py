"""The official OpenAI client against a real server: base model, checkpoint and run, whole and streamed."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tinker
from tinker import types
from transformers import AutoTokenizer

from examples import openai_chat
from tests.conformance.server import Server, wait_until
from tests.gateway.openai.chatting import chat_model

QUESTION: list[Any] = [{"role": "user", "content": "the end and the naïve 漢字"}]
ANSWER = "on the naïve 漢字 🦊!"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("models") / "base" / "tiny")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.start(model, tmp_path_factory.mktemp("knapper") / "data") as running:
        yield running
    assert "Traceback" not in running.log(), running.log()[-4000:]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-local", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(model))


@pytest.fixture(scope="module")
def taught(server: Server, model: Path, tokenizer: Any) -> Iterator[tinker.TrainingClient]:
    """A run that has learned to answer QUESTION with ANSWER."""
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=True, return_dict=False)
    answer = tokenizer.encode(f"{ANSWER}<|end|>", add_special_tokens=False)
    tokens = prompt + answer
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
    )
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        training = service.create_lora_training_client(str(model), rank=16, seed=1).result()
        for _ in range(60):
            passed = training.forward_backward([datum], "cross_entropy")
            training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
            if passed.result().metrics["loss:sum"] < 0.05:
                break
        yield training


def test_models_are_listed_and_found(client: openai.OpenAI, model: Path) -> None:
    assert client.models.list().data[0].id == str(model)
    assert client.models.retrieve(str(model)).id == str(model)
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("no/such")
    assert missing.value.param == "model"


def test_a_checkpoint_answers_as_soon_as_it_is_saved(client: openai.OpenAI, taught: tinker.TrainingClient) -> None:
    path = taught.save_weights_for_sampler("taught").result().path
    run = path.split("/")[2]
    for name in (path, run):
        reply = client.chat.completions.create(model=name, messages=QUESTION, temperature=0)
        assert reply.choices[0].message.content == ANSWER
        assert reply.choices[0].finish_reason == "stop"
        assert reply.model == name
    assert {path, run} <= {each.id for each in client.models.list().data}
    base = client.chat.completions.create(
        model=client.models.list().data[0].id, messages=QUESTION, temperature=0, max_tokens=20
    )
    assert base.choices[0].message.content != ANSWER


def test_a_stream_has_the_same_text_in_whole_characters(client: openai.OpenAI, taught: tinker.TrainingClient) -> None:
    path = taught.save_weights_for_sampler("streamed").result().path
    whole = client.chat.completions.create(model=path, messages=QUESTION, temperature=0)
    stream = client.chat.completions.create(
        model=path, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == ANSWER
    assert not any("\ufffd" in text for text in texts)
    assert len([text for text in texts if text]) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert last.usage == whole.usage
    assert last.usage is not None
    assert chunks[0].choices[0].delta.role == "assistant"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_and_lengths_end_a_text(
    client: openai.OpenAI, taught: tinker.TrainingClient, stream: bool
) -> None:
    path = taught.save_weights_for_sampler(f"ends-{stream}").result().path

    def ended(**asked: Any) -> tuple[str, Any]:
        reply: Any = client.chat.completions.create(
            model=path, messages=QUESTION, temperature=0, stream=stream, **asked
        )
        if not stream:
            return reply.choices[0].message.content, reply.choices[0].finish_reason
        choices = [chunk.choices[0] for chunk in reply]
        return "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason

    assert ended(stop="ve 漢") == ("on the naï", "stop")
    assert ended(stop=["never", "🦊"]) == ("on the naïve 漢字 ", "stop")
    assert ended(max_completion_tokens=2) == ("on the", "length")


def test_completions_agree_with_the_tinker_client(
    client: openai.OpenAI, server: Server, model: Path, tokenizer: Any
) -> None:
    prompt = tokenizer.encode("the end and")
    reply = client.completions.create(
        model=str(model), prompt="the end and", max_tokens=7, seed=11, n=2, logprobs=2, temperature=0.8
    )
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        sampler = service.create_sampling_client(base_model=str(model)).result()
        params = types.SamplingParams(max_tokens=7, seed=11, temperature=0.8)
        sampled = sampler.sample(types.ModelInput.from_ints(prompt), 2, params).result()
        scored = sampler.compute_logprobs(types.ModelInput.from_ints(prompt)).result()
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt)
    for choice, sequence in zip(reply.choices, sampled.sequences, strict=True):
        assert choice.text == tokenizer.decode(sequence.tokens)
        assert choice.logprobs is not None
        assert sequence.logprobs is not None
        assert np.allclose(choice.logprobs.token_logprobs or [], sequence.logprobs, atol=1e-5)
        for token, likeliest in zip(choice.logprobs.tokens or [], choice.logprobs.top_logprobs or [], strict=True):
            assert token in likeliest
            assert len(likeliest) <= 3
    echoed = client.completions.create(model=str(model), prompt="the end and", max_tokens=0, echo=True, logprobs=1)
    logprobs = echoed.choices[0].logprobs
    assert echoed.choices[0].text == "the end and"
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert np.allclose(np.array(logprobs.token_logprobs[1:]), np.array(scored[1:], dtype=float), atol=1e-4)
    assert "".join(logprobs.tokens or []) == "the end and"


def test_logprobs_of_a_chat_belong_to_its_text(client: openai.OpenAI, taught: tinker.TrainingClient) -> None:
    path = taught.save_weights_for_sampler("scored").result().path
    reply = client.chat.completions.create(model=path, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3)
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content or []
    assert reply.usage is not None
    assert len(content) == reply.usage.completion_tokens - 1, "all but the token that ends it"
    assert content[0].token == "on"
    assert content[0].bytes == [111, 110]
    for each in content:
        assert len(each.top_logprobs) == 3
        assert each.logprob == each.top_logprobs[0].logprob, "greedy"
    stream = client.chat.completions.create(
        model=path, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    scores = [chunk.choices[0].logprobs.content or [] for chunk in stream if chunk.choices[0].logprobs]
    streamed = [score for each in scores for score in each]
    assert [(score.token, score.bytes) for score in streamed] == [(score.token, score.bytes) for score in content]


def test_errors_are_the_clients_own(client: openai.OpenAI, server: Server, model: Path) -> None:
    ask = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as refused:
        ask(model=str(model), messages=QUESTION, presence_penalty=1)
    assert (refused.value.param, refused.value.code) == ("presence_penalty", "invalid_field")
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="tools is their newer name"):
        ask(model=str(model), messages=QUESTION, functions=[{"name": "f"}])
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        ask(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask(model=f"tinker://ses-{'0' * 32}:train:0/sampler_weights/x", messages=QUESTION)
    assert httpx.get(f"{server.url}/v1/models").json()["error"]["code"] == "unauthorized"


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_told_as_clients_look_for_it(
    client: openai.OpenAI, server: Server, model: Path, stream: bool
) -> None:
    """By code (inspect_ai) or by words: LiteLLM by the first ones, inspect_ai for vLLM by two of them, LangChain by
    others.
    """
    for base in (f"{server.url}/v1", f"{server.url}/oai/api/v1"):
        with openai.OpenAI(base_url=base, api_key="tml-local", max_retries=0) as asker:
            with pytest.raises(openai.BadRequestError) as chat:
                asker.chat.completions.create(
                    model=str(model), messages=[{"role": "user", "content": "x" * 600}], stream=stream
                )
            with pytest.raises(openai.BadRequestError) as completion:
                asker.completions.create(model=str(model), prompt=[[7], [7] * 512], max_tokens=1, stream=stream)
        for refused, param in ((chat, "messages"), (completion, "prompt")):
            assert (refused.value.status_code, refused.value.code) == (400, "context_length_exceeded")
            assert (refused.value.param, refused.value.type) == (param, "invalid_request_error")
            assert "This model's maximum context length is 512 tokens" in refused.value.message
            assert "prompt is too long" in refused.value.message
        assert "it has 512; allowed: up to 511" in completion.value.message
    scored = client.completions.create(model=str(model), prompt=[7] * 512, max_tokens=0, echo=True, logprobs=0)
    assert scored.choices[0].logprobs is not None
    assert len(scored.choices[0].logprobs.token_logprobs or []) == 512


def test_the_protocol_is_also_where_tinkers_own_server_has_it(server: Server, model: Path) -> None:
    with openai.OpenAI(base_url=f"{server.url}/oai/api/v1", api_key="tml-local", max_retries=0) as client:
        assert client.models.list().data[0].id == str(model)
        assert client.models.retrieve(str(model)).id == str(model)
        reply = client.chat.completions.create(model=str(model), messages=QUESTION, max_tokens=3)
        assert reply.usage is not None
        assert reply.usage.completion_tokens == 3
        assert client.completions.create(model=str(model), prompt="the", max_tokens=3).choices[0].text
        with pytest.raises(openai.NotFoundError, match="/oai/api/v1/embeddings is not served"):
            client.embeddings.create(model=str(model), input="x")


@pytest.mark.parametrize("temperature", [1e-12, 1e-8, 1e-6])
def test_a_tiny_temperature_is_greedy(client: openai.OpenAI, model: Path, temperature: float) -> None:
    def asked(temperature: float) -> Any:
        return client.chat.completions.create(
            model=str(model), messages=QUESTION, max_tokens=20, temperature=temperature, logprobs=True, top_logprobs=2
        ).choices[0]

    tiny, greedy = asked(temperature), asked(0)
    assert tiny.message.content == greedy.message.content
    assert tiny.logprobs == greedy.logprobs
    for score in tiny.logprobs.content:
        assert score.logprob == score.top_logprobs[0].logprob < 0, "the model's own, untempered"


def test_values_that_ask_for_nothing_change_nothing(client: openai.OpenAI, model: Path) -> None:
    asked: dict[str, Any] = {"model": str(model), "messages": QUESTION, "max_tokens": 12, "seed": 3}
    nothing: dict[str, Any] = {"reasoning_effort": "none", "verbosity": "medium"}
    extra = {"repetition_penalty": 1.0, "min_p": 0.0, "prompt_cache_key": "k", "safety_identifier": "me"}
    plain = client.chat.completions.create(**asked)
    assert client.chat.completions.create(**asked, **nothing, extra_body=extra).choices == plain.choices


def test_a_client_that_leaves_a_stream_frees_the_engine(server: Server, model: Path) -> None:
    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="tml-local") as other:
            stream = await other.completions.create(
                model=str(model), prompt="the", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            )
            async for chunk in stream:
                assert chunk.choices[0].finish_reason is None
                break
            await stream.close()

    before = server.log().count("client left: its sample is cancelled")
    asyncio.run(leave())
    wait_until(lambda: server.log().count("client left: its sample is cancelled") > before, "the engine knows")


@pytest.mark.timeout(180)
def test_a_stream_outlives_the_engine(client: openai.OpenAI, server: Server, model: Path) -> None:
    """A killed engine is started again, and the text goes on: the same as an undisturbed one."""
    asked: dict[str, Any] = {"model": str(model), "prompt": "the end", "max_tokens": 400, "seed": 5}
    more: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
    expected = client.completions.create(**asked, **more).choices[0].text
    stream = iter(client.completions.create(**asked, **more, stream=True))
    texts = [next(stream).choices[0].text]
    pid = server.kill("engine")
    texts += [chunk.choices[0].text for chunk in stream]
    assert "".join(texts) == expected
    assert "a streamed sample broke off" in server.log(), "or the kill came too late"
    wait_until(lambda: server.processes().get("engine", pid) != pid, "another engine serves")


def test_the_program_of_the_documentation_runs(server: Server) -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "openai.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert block
    assert block[1].count("http://127.0.0.1:8000") == 2
    program = block[1].replace("http://127.0.0.1:8000", server.url)
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=110)
    assert said.returncode == 0, said.stderr.decode()
    assert said.stdout.endswith(b"\n"), "a model of random weights may well say white space"


def test_the_example_talks(server: Server, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = openai_chat.chat(server.url, "tml-local", str(model), "the end?", max_tokens=8)
    assert capsys.readouterr().out.strip("\n") == text.strip("\n")
    assert text


def test_every_answer_and_every_chunk_says_which_weights_drew_it(
    client: openai.OpenAI, taught: tinker.TrainingClient, model: Path, server: Server
) -> None:
    path = taught.save_weights_for_sampler("fingerprinted").result().path
    drawn = r"[0-9a-f]{16};step=\d+;sampler=engine float32"
    whole = client.chat.completions.create(model=path, messages=QUESTION, max_tokens=2)
    assert re.fullmatch(drawn, whole.system_fingerprint or "")
    chunks = client.chat.completions.create(model=path, messages=QUESTION, max_tokens=2, stream=True)
    assert {chunk.system_fingerprint for chunk in chunks if chunk.choices[0].delta.content} == {
        whole.system_fingerprint
    }
    base = client.chat.completions.create(model=str(model), messages=QUESTION, max_tokens=2)
    assert base.system_fingerprint == "base;step=0;sampler=engine float32"
    counted = httpx.get(f"{server.url}/metrics").text
    assert 'knapper_samples_drawn_total{sampler="unknown"}' not in counted, "streamed samples name theirs too"
