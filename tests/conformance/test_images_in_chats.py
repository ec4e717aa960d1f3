"""Images in chats: the official clients of three protocols, against what the SDK samples of the same prompt."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import tinker
from tinker import types
from tokenizers import Tokenizer

from tests.conformance.server import Server
from tests.engine.pictures import IMAGE_TOKEN, picture, picture_model

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}\n{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)
FILES = [(picture(64, 96), "png"), (picture(64, 32, seed=1, kind="jpeg"), "jpeg")]  # of 6 tokens, and of 2
PLACES = ("user\nwhat is ", " and\nthis ", "?\nassistant\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = picture_model(tmp_path_factory.mktemp("seeing"))
    text = (directory / "tokenizer.json").read_text(encoding="utf-8")
    named = json.loads(text)
    named["model"]["vocab"] = {
        "<image>" if number == IMAGE_TOKEN else token: number for token, number in named["model"]["vocab"].items()
    }
    tokenizer = Tokenizer.from_str(json.dumps(named))
    tokenizer.add_special_tokens(["<image>"])
    assert tokenizer.encode("a<image>b").ids.count(IMAGE_TOKEN) == 1
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.start(model, tmp_path_factory.mktemp("knapper") / "data", dtype="float32") as running:
        yield running
    assert "Traceback" not in running.log(), running.log()[-4000:]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-local", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="tml-local", max_retries=0) as client:
        yield client


def url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def question(files: Any = FILES) -> Any:
    first, second = ({"type": "image_url", "image_url": {"url": url(*file), "detail": "high"}} for file in files)
    texts = ({"type": "text", "text": text} for text in ("what is ", " and\nthis ", "?"))
    one, two, three = texts
    return [{"role": "user", "content": [one, first, two, second, three]}]


def test_a_chat_samples_what_the_sdk_samples(client: openai.OpenAI, server: Server, model: Path) -> None:
    chat = client.chat.completions.create(
        model=str(model), messages=question(), temperature=0, max_tokens=8, logprobs=True
    )
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    chunks: list[types.ModelInputChunk] = []
    for text, (data, kind), tokens in zip(PLACES, FILES, (6, 2), strict=False):
        chunks.append(types.EncodedTextChunk(tokens=tokenizer.encode(text).ids))
        chunks.append(types.ImageChunk(data=data, format=kind, expected_tokens=tokens))  # type: ignore[arg-type]  # it is one
    chunks.append(types.EncodedTextChunk(tokens=tokenizer.encode(PLACES[2]).ids))
    prompt = types.ModelInput(chunks=chunks)
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        sampler = service.create_sampling_client(base_model=str(model)).result()
        [drawn] = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=8, temperature=0)).result().sequences
    (choice,) = chat.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert drawn.logprobs is not None
    assert [each.logprob for each in choice.logprobs.content] == pytest.approx(drawn.logprobs, abs=1e-6)
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == prompt.length

    swapped = client.chat.completions.create(
        model=str(model), messages=question(FILES[::-1]), temperature=0, max_tokens=1, logprobs=True
    ).choices[0]
    assert swapped.logprobs is not None
    assert swapped.logprobs.content is not None
    assert swapped.logprobs.content[0].logprob != choice.logprobs.content[0].logprob, "each is in its own place"


def test_all_protocols_see_the_same(client: openai.OpenAI, claude: anthropic.Anthropic, model: Path) -> None:
    chat = client.chat.completions.create(model=str(model), messages=question(), temperature=0, max_tokens=8)
    items: Any = [
        {"type": "input_text", "text": "what is "},
        {"type": "input_image", "image_url": url(*FILES[0]), "detail": "auto"},
        {"type": "input_text", "text": " and\n"}, {"type": "input_text", "text": "this "},
        {"type": "input_image", "image_url": url(*FILES[1])}, {"type": "input_text", "text": "?"},
    ]  # fmt: skip
    response = client.responses.create(
        model=str(model), input=[{"role": "user", "content": items}], temperature=0, max_output_tokens=8
    )
    assert response.output_text == chat.choices[0].message.content

    def block(data: bytes, kind: str) -> Any:
        source = {"type": "base64", "media_type": f"image/{kind}", "data": base64.b64encode(data).decode()}
        return {"type": "image", "source": source, "cache_control": {"type": "ephemeral"}}

    blocks = [
        {"type": "text", "text": "what is "}, block(*FILES[0]), {"type": "text", "text": " and"},
        {"type": "text", "text": "this "}, block(*FILES[1]), {"type": "text", "text": "?"},
    ]  # fmt: skip
    asked: Any = [{"role": "user", "content": blocks}]
    message = claude.messages.create(model=str(model), messages=asked, max_tokens=8, extra_body={"temperature": 0})
    (said,) = message.content
    assert said.type == "text"
    assert said.text == chat.choices[0].message.content
    assert chat.usage is not None
    count = claude.messages.count_tokens(model=str(model), messages=asked).input_tokens
    assert count == message.usage.input_tokens == chat.usage.prompt_tokens


def test_what_cannot_be_is_refused_in_words(client: openai.OpenAI, claude: anthropic.Anthropic, model: Path) -> None:
    def refused(*parts: Any, role: str = "user", header: str = "") -> str:
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(
                model=str(model), messages=[{"role": role, "content": list(parts)}],  # type: ignore[list-item, misc]  # of any role
                extra_headers={"X-Knapper-Capture": header} if header else {},
            )  # fmt: skip
        return f"{error.value.param}: {error.value}"

    def part(address: str) -> Any:
        return {"type": "image_url", "image_url": {"url": address}}

    whole = url(*FILES[0])
    assert "content[0].image_url.url" in (said := refused(part("https://example.com/a.png")))
    assert "fetches nothing that a request names" in said
    assert "messages[0].content[0].data" in (said := refused(part(url(FILES[0][0][:2000], "png"))))
    assert "a whole PNG or JPEG file" in said, "its pixels are read by the engine"
    assert "texts in messages of the role system" in refused(part(whole), role="system")
    text = {"type": "text", "text": "<image>"}
    assert "2 image tokens of 1 images" in refused(part(whole), text)
    assert "no episode with images" in refused(part(whole), header="seen")
    asked: Any = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}]}]
    with pytest.raises(anthropic.BadRequestError, match="fetches nothing that a request names"):
        claude.messages.create(model=str(model), messages=asked, max_tokens=1)
