"""Images in prompts, as the SDK sends them, through the whole stack; its reference is transformers' whole model."""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from PIL import Image as Pillow
from tinker import types
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from knapper import limits
from tests.conformance import data
from tests.conformance.data import CE
from tests.conformance.server import Server
from tests.engine.pictures import IMAGE_TOKEN, picture, picture_model

ADAM = types.AdamParams(learning_rate=1e-2)
Part = list[int] | types.ImageChunk


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_model(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def server(seeing: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.start(seeing, tmp_path_factory.mktemp("images") / "data", dtype="float32") as running:
        yield running
    assert "Traceback" not in running.log(), running.log()[-4000:]


@pytest.fixture(scope="module")
def seer(server: Server) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        yield service


def image(width: int, height: int, *, seed: int = 0, kind: Any = "png", tokens: int | None = None) -> types.ImageChunk:
    expected = width * height // 32**2 if tokens is None else tokens
    return types.ImageChunk(data=picture(width, height, seed, kind), format=kind, expected_tokens=expected)


def prompt(*parts: Part) -> types.ModelInput:
    chunks: list[types.ModelInputChunk] = [
        types.EncodedTextChunk(tokens=part) if isinstance(part, list) else part for part in parts
    ]
    return types.ModelInput(chunks=chunks)


def datum(*parts: Part, targets: list[int] | None = None) -> types.Datum:
    """Learns to say the token 7 at each of its places, or `targets`."""
    length = prompt(*parts).length
    inputs = {"target_tokens": targets or [7] * length, "weights": [1.0] * length}
    return types.Datum(model_input=prompt(*parts), loss_fn_inputs=inputs)  # type: ignore[arg-type]  # lists, too


def in_whole(model: Any, directory: Path, chunks: Sequence[types.ModelInputChunk]) -> torch.Tensor:
    """(T, V) log-probabilities of transformers' model of images and text."""
    tokens: list[int] = []
    opened = []
    for chunk in chunks:
        tokens += chunk.tokens if isinstance(chunk, types.EncodedTextChunk) else [IMAGE_TOKEN] * chunk.length
        if isinstance(chunk, types.ImageChunk):
            opened.append(Pillow.open(io.BytesIO(chunk.data)))
    ids = torch.tensor([tokens])
    processor: Any = Qwen2VLImageProcessorPil.from_pretrained(directory)
    inputs = processor(images=opened, return_tensors="pt")
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, mm_token_type_ids=(ids == IMAGE_TOKEN).int(), **inputs).logits
    return logits[0].log_softmax(-1)


def test_training_and_samples_see_images_and_a_kill_changes_no_bit(
    seer: tinker.ServiceClient, server: Server, seeing: Path
) -> None:
    """Before a step training equals transformers; after a kill the run goes on, and samples have its bits."""
    texts = data.tokens(np.random.default_rng(4), 40)
    pass_data = [
        datum(texts[:9], image(64, 96), texts[9:15], image(64, 32, kind="jpeg"), texts[15:20]),
        datum(texts[20:]),
    ]
    calm, killed = (seer.create_lora_training_client(str(seeing), rank=4, seed=1).result() for _ in range(2))
    model: Any = AutoModelForImageTextToText.from_pretrained(seeing, dtype=torch.float32)
    first = calm.forward_backward(pass_data, CE).result()
    expected = in_whole(model, seeing, pass_data[0].model_input.chunks)[:, 7]
    np.testing.assert_allclose(data.logprobs(first)[0], expected.numpy(), atol=1e-5, rtol=1e-5)
    calm.optim_step(ADAM).result()
    second = data.bits(calm.forward(pass_data, CE).result())

    assert data.bits(killed.forward_backward(pass_data, CE).result()) == data.bits(first)
    killed.optim_step(ADAM).result()
    server.kill("engine")
    assert data.bits(killed.forward(pass_data, CE).result()) == second
    assert second != data.bits(first)

    seen = prompt(texts[:9], image(64, 96), texts[9:12])
    path = killed.save_weights_for_sampler("seen").result().path
    sampler = seer.create_sampling_client(model_path=path).result()
    [drawn] = sampler.sample(seen, 1, types.SamplingParams(max_tokens=8, seed=3, stop=[])).result().sequences
    targets = [*[0] * (seen.length - 1), *drawn.tokens]
    whole = datum(texts[:9], image(64, 96), [*texts[9:12], *drawn.tokens[:-1]], targets=targets)
    [forward] = data.logprobs(killed.forward([whole], CE).result())
    assert drawn.logprobs == forward[seen.length - 1 :].tolist()
    scores = sampler.compute_logprobs(seen).result()
    assert [score is None or np.isnan(score) for score in scores] == [n == 0 or 9 <= n < 15 for n in range(seen.length)]


def bomb(side: int) -> bytes:
    """A PNG whose header says so many pixels, of which it has none."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    framed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def broken(content: bytes, kind: Any = "png") -> types.ImageChunk:
    return types.ImageChunk(data=content, format=kind, expected_tokens=6)


REFUSED: dict[str, tuple[types.ImageChunk, str]] = {
    "another number of tokens": (image(64, 96, tokens=7), r"chunks\[1\].expected_tokens is 7; allowed: 6"),
    "too many pixels": (broken(bomb(4097)), rf"4097 x 4097 pixels; allowed: {limits.image_pixels_max}"),
    "a bomb": (broken(bomb(60_000)), rf"pixels; allowed: {limits.image_pixels_max}"),
    "a truncated file": (broken(picture(64, 96)[:-4000]), r"chunks\[1\].data is .*a whole PNG or JPEG file"),
    "a JPEG as PNG": (broken(picture(64, 96, kind="jpeg")), r"chunks\[1\].data is .*as its format says"),
    "a line": (image(2048, 4, tokens=1), r"at most 200 times the shorter one"),
    "no number of tokens": (
        types.ImageChunk(data=picture(64, 96), format="png", expected_tokens=0), r"expected_tokens is .*1 to 16384"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_image_that_is_not_taken_is_refused_by_name(
    seer: tinker.ServiceClient, seeing: Path, case: str, run: tinker.TrainingClient
) -> None:
    chunk, complaint = REFUSED[case]
    base = seer.create_sampling_client(base_model=str(seeing)).result()
    with pytest.raises(tinker.TinkerError, match=complaint):
        base.sample(prompt([1], chunk), 1, types.SamplingParams(max_tokens=1)).result()
    with pytest.raises(tinker.TinkerError, match=complaint):
        run.forward([datum([1], chunk)], CE).result()


@pytest.fixture(scope="module")
def run(seer: tinker.ServiceClient, seeing: Path) -> tinker.TrainingClient:
    return seer.create_lora_training_client(str(seeing), rank=1).result()


def test_a_pointer_is_not_followed(seer: tinker.ServiceClient, seeing: Path) -> None:
    pointer = types.ImageAssetPointerChunk(location="file:///etc/passwd", format="png", expected_tokens=1)
    base = seer.create_sampling_client(base_model=str(seeing)).result()
    with pytest.raises(tinker.TinkerError, match=r"'image_asset_pointer'.*fetches nothing that a request names"):
        base.sample(types.ModelInput(chunks=[pointer]), 1, types.SamplingParams(max_tokens=1)).result()
