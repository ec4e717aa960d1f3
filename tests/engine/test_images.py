"""Images in prompts: training and sampling equal transformers with PEFT; bits are a request's own."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from knapper import limits
from knapper.engine.models import loader
from knapper.engine.models.composite import PREPROCESSOR
from knapper.engine.models.tensor_header import BrokenModel
from knapper.engine.sampling import decode_batch
from knapper.engine.training.batch import micro_batches
from knapper.engine.training.trainer import Trainer
from knapper.errors import InvalidField, TooLarge
from knapper.wire.types import AdamW, Datum, Image, Int32, SampleRequest
from tests.engine.pictures import IMAGE_TOKEN, picture, picture_model, with_images
from tests.engine.runs import done, request, spec
from tests.engine.sampling.test_scheduler import House, same
from tests.engine.sampling.test_scheduler import request as sample_request
from tests.engine.test_peft_parity import arena, load_in_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]
Inputs = dict[str, np.ndarray[Any, Any]]
# One image, two of different shapes with text between, none, and one at the end.
SEQUENCES: Sequence[Sequence[int | tuple[int, int]]] = (
    (5, (64, 96), 9), (3, (96, 32), 4, (32, 64), 6), (12,), (2, (64, 64))
)  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_model(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def trainer(directory: Path) -> Trainer:
    return Trainer(loader.load(directory))


def image_datum(parts: Sequence[Any], rng: np.random.Generator) -> Datum:
    tokens, images = with_images(parts, rng)
    weights = rng.normal(size=len(tokens)).astype(np.float32)
    return Datum(tokens, {"target_tokens": rng.integers(0, 200, len(tokens)), "weights": weights}, tuple(images))


def whole_inputs(directory: Path, tokens: Int32, images: Sequence[Image]) -> dict[str, Tensor]:
    """What transformers' model of images and text is called with."""
    ids = torch.from_numpy(tokens).long()[None].clone()
    types = torch.zeros_like(ids)
    for image in images:
        rows = slice(image.at, image.at + image.tokens)
        ids[0, rows], types[0, rows] = IMAGE_TOKEN, 1
    inputs = {"input_ids": ids, "mm_token_type_ids": types, "attention_mask": torch.ones_like(ids)}
    if images:
        processor: Any = Qwen2VLImageProcessorPil.from_pretrained(directory)
        opened = [Pillow.open(io.BytesIO(image.data)) for image in images]
        inputs |= processor(images=opened, return_tensors="pt")
    return inputs


def logprobs_in_whole(model: Any, directory: Path, datum: Datum) -> Tensor:
    model.base_model.model.model.rope_deltas = None  # of an earlier text
    logits = model(**whole_inputs(directory, datum.tokens, datum.images)).logits[0].float()
    targets = torch.from_numpy(datum.inputs["target_tokens"])[:, None]
    return torch.log_softmax(logits, dim=-1).gather(1, targets)[:, 0]


def test_training_equals_transformers_with_peft(directory: Path, trainer: Trainer, tmp_path: Path) -> None:
    """Log-probabilities and gradients of packed sequences with and without images, before and after a step."""
    state = trainer.create(spec())
    model = load_in_peft(
        state, directory, tmp_path / "adapter", trainable=True, auto=AutoModelForImageTextToText
    ).eval()  # fmt: skip
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == state.layout.numel  # none in the tower
    adam = torch.optim.AdamW(trainable, lr=3e-3, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0, foreach=False)
    rng = np.random.default_rng(3)
    for _ in range(2):
        adam.zero_grad()
        data = [image_datum(parts, rng) for parts in SEQUENCES]
        state, output = done(trainer.forward_backward(state, request(data)))
        for datum, found in zip(data, output.outputs, strict=True):
            p = logprobs_in_whole(model, directory, datum)
            (-p * torch.from_numpy(datum.inputs["weights"])).sum().backward()
            np.testing.assert_allclose(found["logprobs"], p.detach().numpy(), atol=1e-5, rtol=1e-5)
        gradient_P = arena(state, model, lambda p: p.grad)
        assert state.grads_P is not None
        assert (state.grads_P - gradient_P).norm() < 1e-5 * gradient_P.norm()
        adam.step()
        state, _ = done(trainer.optim_step(state, AdamW(learning_rate=3e-3)))


def test_a_row_has_the_bits_that_it_has_alone(trainer: Trainer) -> None:
    """Whatever shares its pass; and equal token ids with another image are other rows."""
    rng = np.random.default_rng(7)
    state = trainer.create(spec())
    beginning, end = with_images((40, (64, 96)), rng), with_images((5,), rng)
    tokens = np.concatenate([beginning[0], end[0]])
    inputs: Inputs = {"target_tokens": tokens.astype(np.int64), "weights": np.ones(len(tokens), dtype=np.float32)}
    first = Datum(tokens, inputs, tuple(beginning[1]))
    other = replace(first, images=(replace(first.images[0], data=picture(64, 96, seed=99)),))
    text = Datum(tokens, inputs)
    data = [first, other, text, replace(first), image_datum(SEQUENCES[1], rng)]
    _, together = done(trainer.forward_backward(state, request(data)))
    (batch,) = micro_batches(data, 1024, [trainer.decoder.placed(each.images, "") for each in data])
    assert len(batch.prefixes) == 3 * len(tokens) - 2 * 40 + len(data[-1].tokens), "40 tokens and a repetition shared"
    for datum, found in zip(data, together.outputs, strict=True):
        _, alone = done(trainer.forward_backward(state, request([datum])))
        np.testing.assert_array_equal(found["logprobs"], alone.outputs[0]["logprobs"])
    by_image = [found["logprobs"] for found in together.outputs[:3]]
    assert all((one[40:] != two[40:]).any() for one, two in itertools.combinations(by_image, 2))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"), make=picture_model)


def prompt(parts: Sequence[Any], seed: int, **fields: Any) -> SampleRequest:
    tokens, images = with_images(parts, np.random.default_rng(seed))
    return sample_request(prompt=tokens, images=tuple(images), seed=seed, **fields)


def test_greedy_samples_equal_those_of_transformers(house: House, directory: Path) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
    for seed, parts in enumerate(SEQUENCES):
        greedy = prompt(parts, seed, temperature=0.0, max_tokens=12, ignore_eos=True)
        inputs = whole_inputs(directory, greedy.prompt, greedy.images)
        found = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0, len(greedy.prompt) :]
        assert house.run(greedy)[0].sequences[0].tokens.tolist() == found.tolist()


def test_samples_have_their_bits_in_a_crowd_and_the_trainers_logprobs(house: House) -> None:
    """One prompt with an image, with another one of the same shape, without any; a text that goes on; and others."""
    tokens, images = with_images((35, (64, 96), 6), np.random.default_rng(1))
    other = replace(images[0], data=picture(64, 96, seed=5))
    more, later = with_images((tokens[41:].size, (32, 64), 3), np.random.default_rng(2))
    longer = np.concatenate([tokens[:41], more]), (images[0], replace(later[0], at=later[0].at + 41))
    requests = [
        sample_request(prompt=tokens, images=tuple(images), seed=1, prompt_logprobs=True, num_samples=2),
        sample_request(prompt=tokens, images=(other,), seed=1),
        sample_request(prompt=tokens, seed=1),
        sample_request(prompt=longer[0], images=longer[1], seed=1),
        *(prompt(parts, seed) for seed, parts in enumerate(SEQUENCES)),
    ]
    crowd, again = house.run(*requests), house.run(*requests)
    assert again[3].prompt_cache_hit_tokens == len(longer[0])
    trainer = Trainer(house.decoder)
    state = trainer.create(spec())
    for each, output, repeated in zip(requests, crowd, again, strict=True):
        house.within(house.sampler.release())
        (alone,) = house.run(each)
        assert alone.prompt_cache_hit_tokens == 0
        for one, two, three in zip(output.sequences, repeated.sequences, alone.sequences, strict=True):
            assert same(one, two)
            assert same(one, three)
            whole = np.concatenate([each.prompt, one.tokens])
            inputs: Inputs = {
                "target_tokens": whole[1:].astype(np.int64),
                "weights": np.ones(len(whole) - 1, dtype=np.float32),
            }
            _, trained = done(trainer.forward_backward(state, request([Datum(whole[:-1], inputs, each.images)])))
            np.testing.assert_array_equal(one.logprobs, trained.outputs[0]["logprobs"][len(each.prompt) - 1 :])
    scores = crowd[0].prompt_logprobs
    assert scores is not None
    np.testing.assert_array_equal(np.isnan(scores), [n == 0 or 35 <= n < 41 for n in range(len(tokens))])


def test_a_prompt_shares_what_stands_before_the_first_other_image(house: House) -> None:
    tokens, images = with_images((35, (64, 96), 6, (32, 32), 4), np.random.default_rng(1))
    second = replace(images[1], data=picture(32, 32, seed=50))
    house.within(house.sampler.release())
    for kept, shared in ((images, 0), ([images[0], second], 47), ([second, second], 35)):
        kept[0] = replace(images[0], data=picture(64, 96, seed=51)) if shared == 35 else kept[0]
        (output,) = house.run(sample_request(prompt=tokens, images=tuple(kept)))
        assert output.prompt_cache_hit_tokens == shared


def test_parked_sequences_go_on_with_their_positions(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_batch, "GROWTH", 4)
    scarce = House(tmp_path, make=picture_model, kv_tokens_max=192)
    requests = [prompt((25, (128, 96), 20), seed, max_tokens=24) for seed in range(3)]
    together = scarce.run(*requests)
    assert scarce.sampler.counters.parked > 0
    for each, output in zip(requests, together, strict=True):
        assert same(output.sequences[0], house.run(each)[0].sequences[0])


SIZES = ((10, 20), (64, 96), (50, 33), (400, 90), (31, 900), (600, 600))


def test_an_image_has_the_tokens_that_the_cookbook_counts(trainer: Trainer, directory: Path) -> None:
    """As its renderers do, by the model's processor; scaled up, scaled down, in all kinds of colours."""
    processor: Any = Qwen2VLImageProcessorPil.from_pretrained(directory)
    for width, height in SIZES:
        count = processor.get_number_of_image_patches(height, width, images_kwargs={}) // processor.merge_size**2
        for mode, kind in (("RGB", "jpeg"), ("CMYK", "jpeg"), ("RGBA", "png"), ("P", "png"), ("I;16", "png")):
            out = io.BytesIO()
            Pillow.new(mode, (width, height)).save(out, kind)
            image = Image(0, count, 0, kind, out.getvalue())
            (placed,) = trainer.decoder.placed([image], "prompt")
            assert placed.tokens == count
            inputs = {"target_tokens": np.zeros(count, np.int64), "weights": np.ones(count, np.float32)}
            single = Datum(np.zeros(count, np.int32), inputs, (image,))
            done(trainer.forward_backward(trainer.create(spec()), request([single], forward_only=True)))


def test_limits_of_an_image_are_allowed_themselves(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    data = picture(64, 96)
    image = Image(0, 6, 3, "png", data)
    monkeypatch.setattr(limits, "image_bytes_max", len(data))
    monkeypatch.setattr(limits, "image_pixels_max", 64 * 96)
    assert trainer.decoder.placed([image], "prompt")[0].grid == (3, 2)
    monkeypatch.setattr(limits, "image_bytes_max", len(data) - 1)
    with pytest.raises(TooLarge, match=rf"prompt.chunks\[3\].data has {len(data)} bytes; allowed: {len(data) - 1}"):
        trainer.decoder.placed([image], "prompt")
    monkeypatch.setattr(limits, "image_bytes_max", len(data) * 2)
    monkeypatch.setattr(limits, "image_pixels_max", 64 * 96 - 1)
    with pytest.raises(TooLarge, match=r"has 64 x 96 pixels; allowed: 6143"):
        trainer.decoder.placed([replace(image, data=picture(64, 96, seed=1234))], "prompt")
    with pytest.raises(InvalidField, match=r"format is 'gif'; allowed: png, jpeg"):
        trainer.decoder.placed([replace(image, format="gif")], "prompt")


def test_a_tower_that_is_not_whole_is_named(tmp_path: Path) -> None:
    """Without its processor's configuration the text is served alone; a tower that lacks a tensor is broken."""
    directory = picture_model(tmp_path)
    path = next(p for p in directory.glob("*.safetensors") if any("visual" in name for name in load_file(p)))
    tensors = load_file(path)
    gone = next(name for name in tensors if "visual" in name)
    save_file({name: each for name, each in tensors.items() if name != gone}, path, {"format": "pt"})
    index = directory / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(f'"{gone}"', '"lm_head.weight"'))
    with pytest.raises(BrokenModel, match=f"vision tower.*{gone.removeprefix('model.visual.')}"):
        loader.load(directory)
    (directory / PREPROCESSOR).unlink()
    with pytest.raises(InvalidField, match=r"prompt.chunks\[0\] is 'image'.*text only"):
        loader.load(directory).placed([Image(0, 6, 0, "png", picture(64, 96))], "prompt")
