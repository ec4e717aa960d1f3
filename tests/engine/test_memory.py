"""One account of memory: it is divided once, by what the device has, and all limits follow from it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from knapper.engine import memory
from knapper.engine.hardware import device_for, memory_left, take_memory
from knapper.engine.memory import CARDS, Account, ModelBytes, kv_bytes
from knapper.engine.memory_table import MODELS
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.preflight import expect_device, expect_loadable
from knapper.engine.training.trainer import Trainer
from knapper.errors import ContextLengthExceeded, InvalidField, TooLarge, UserError, WaitsForMemory
from knapper.settings import Settings
from tests.engine.gate.models import CONFIGS, write_config
from tests.engine.gpu import GIB, Driver, with_gpu
from tests.engine.runs import datum, request, spec, tiny_trainer
from tests.engine.sampling.test_scheduler import House, prompt_of
from tests.engine.sampling.test_scheduler import request as sample_request
from tests.engine.tiny import tiny_model


def _on(card: str, name: str = "Qwen3-8B", share: float = 1.0, part: float = 0.0) -> Account:
    model = ModelBytes.planned(MODELS[name])
    return memory.divide(memory.planned_left(CARDS[card], share, model.weights), model, part, is_cpu=False)


def test_keys_and_values_have_a_quarter_and_a_text_of_the_whole_context_has_more() -> None:
    assert kv_bytes(64 * GIB, 0, 6 * GIB) == 16 * GIB
    assert kv_bytes(16 * GIB, 0, 9 * GIB) == 9 * GIB, "more than a quarter, less than three"
    assert kv_bytes(16 * GIB, 0, 16 * GIB) == 12 * GIB, "three quarters: the context does not fit"
    assert kv_bytes(16 * GIB, 0.5, 16 * GIB) == 8 * GIB, "an operator's part is that part"
    assert kv_bytes(0, 0, GIB) == 0


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_table_of_cards_is_of_the_published_models(tmp_path: Path, name: str) -> None:
    published = ModelConfig.read(write_config(tmp_path / "model", CONFIGS[name]))
    assert ModelBytes.planned(published) == ModelBytes.planned(MODELS[name])


def test_the_account_expects_a_run_of_a_mixture_of_the_rank_that_is_advised() -> None:
    assert memory.expected_rank(MODELS["Qwen3-8B"]) == 32
    assert memory.expected_rank(MODELS["Qwen3-30B-A3B"]) == 4
    of_mixture = ModelBytes.planned(MODELS["Qwen3-30B-A3B"])
    experts = 48 * 128 * 3 * (2048 + 768)
    assert of_mixture.arena > 4 * 4 * experts, "a pair of every expert"
    assert of_mixture.weights > 2 * 48 * 128 * 3 * 2048 * 768


@pytest.mark.parametrize("card", list(CARDS))
@pytest.mark.parametrize("share", [1.0, 0.45])
def test_no_part_is_given_twice(card: str, share: float) -> None:
    account = _on(card, "Llama-3.2-3B", share)
    on_card = sum(account.parts.values()) - account.snapshots  # which are on the host
    assert account.total - 16 <= on_card <= account.total <= share * CARDS[card]
    assert account.kv_tokens * 114_688 <= account.kv


def test_a_run_has_room_for_a_step_while_the_commit_before_it_is_stored() -> None:
    model = ModelBytes.planned(MODELS["Qwen3-8B"])
    durable, newest, step = 4, 4, 4  # weights, two moments, gradients; of a step its results and clipped gradients
    assert model.run == (durable + newest + step) * model.arena
    assert _on("H100 (80 GB)").runs >= model.run


def test_a_small_card_computes_fewer_rows_and_a_larger_one_keeps_more_layers() -> None:
    rows = [_on(card).rows_max for card in ("L4 (24 GB)", "A100 (40 GB)", "H200 (141 GB)")]
    assert rows[0] < rows[1] == rows[2] == 8192
    layers = [account.passes.layers_kept(8192) for card in CARDS if (account := _on(card)).passes is not None]
    assert layers == sorted(layers)
    assert layers[-1] > layers[1] > layers[0] == 0


def test_an_operators_part_of_keys_and_values_is_kept() -> None:
    account, left = _on("H100 (80 GB)", part=0.5), memory.planned_left(CARDS["H100 (80 GB)"], 1.0, 16_381_470_720)
    assert account.kv == left // 2


@pytest.mark.parametrize(("name", "share"), [("Qwen3-8B", 0.45), ("Qwen3-32B", 1.0), ("Qwen3-14B", 1.0)])
def test_a_card_that_holds_no_run_beside_the_weights_is_refused_in_one_line(name: str, share: float) -> None:
    words = r"the weights take .* GiB and leave .* need .* beside them: raise KNAPPER_GPU"
    with pytest.raises(UserError, match=words) as refused:
        _on("L4 (24 GB)", name, share)
    assert "\n" not in str(refused.value)


def test_what_a_share_of_a_card_leaves_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own figures: an H100 of which half is ours, 16 GiB of that weights."""
    driver = with_gpu(monkeypatch, Driver(total=80 * GIB))
    device = device_for("auto")
    take_memory(device, 0.5)
    driver.held, driver.reserved = 16 * GIB, 18 * GIB
    model = replace(ModelBytes.planned(MODELS["Qwen3-8B"]), weights=16 * GIB)
    account = memory.divide(memory_left(device), model, 0, is_cpu=False)
    assert account.total == 40 * GIB
    assert account.kv == max(6 * GIB, 40_960 * 147_456)


def test_engines_have_equal_parts_of_a_card_and_one_too_small_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What does not fit into its part never will: nobody waits for it, as on a CPU."""
    weights = tiny_model(tmp_path / "model")
    settings = Settings.load(
        {"KNAPPER_MODEL_DIRECTORY": str(weights), "KNAPPER_DATA": str(tmp_path), "KNAPPER_ENGINES": "2"}
    )
    with_gpu(monkeypatch, Driver(total=80 * GIB))
    device = expect_device(settings)
    assert memory_left(device) == 40 * GIB
    expect_loadable(settings, device)
    with_gpu(monkeypatch, Driver(total=1024))
    with pytest.raises(UserError, match="are free on cuda") as refused:
        expect_loadable(settings, expect_device(settings))
    assert not isinstance(refused.value, WaitsForMemory)


@pytest.mark.parametrize("share", ["0", "2"])
def test_a_share_of_none_or_two_is_refused(share: str) -> None:
    with pytest.raises(InvalidField, match=rf"KNAPPER_GPU_MEMORY_SHARE is '{share}'; allowed: a number above 0 to 1"):
        Settings.load({"KNAPPER_GPU_MEMORY_SHARE": share})


def test_on_a_cpu_rows_are_the_same_on_every_machine_and_layers_keep_what_there_is_room_for(tmp_path: Path) -> None:
    model = tiny_trainer(tmp_path / "model").decoder
    assert isinstance(model, Decoder)
    sizes = ModelBytes.of(model, model.weights_bytes)
    small, large = (memory.divide(left, sizes, 0, is_cpu=True) for left in (GIB, 64 * GIB))
    assert small.rows_max == large.rows_max == 1024
    assert small.passes == model.passes, "a gibibyte, as without an account"
    assert large.passes is not None
    assert large.passes.layer_row == model.passes.layer_row
    assert 20 * GIB < large.passes.total < large.activations
    assert small.kv < large.kv
    assert small.runs < large.runs


def test_a_datum_without_memory_is_refused_before_it_is_computed(tmp_path: Path) -> None:
    trainer = Trainer(tiny_trainer(tmp_path / "model").decoder, 64, datum_rows_max=20)
    rng = np.random.default_rng(0)
    state = trainer.create(spec())
    trainer.open(state, request([datum(20, "cross_entropy", rng)]))
    with pytest.raises(TooLarge, match=r"datum 1 has 21 tokens; allowed: 20, for which the server's memory has room"):
        trainer.open(state, request([datum(20, "cross_entropy", rng), datum(21, "cross_entropy", rng)]))


def test_a_text_that_cannot_be_computed_at_once_is_refused(tmp_path: Path) -> None:
    house = House(tmp_path, text_tokens_max=64)
    house.run(sample_request(prompt=prompt_of(60), max_tokens=5))
    with pytest.raises(TooLarge, match=r"a prompt of 60 tokens with up to 6 sampled ones .* allowed: 64"):
        house.run(sample_request(prompt=prompt_of(60), max_tokens=6))
    with pytest.raises(ContextLengthExceeded, match="65"):
        house.run(sample_request(prompt=prompt_of(65), max_tokens=2))
    (output,) = house.run(sample_request(prompt=prompt_of(60), max_tokens=None))
    assert len(output.sequences[0].tokens) == 5, "to the end of what there is memory for"


def test_the_account_is_told_in_one_line() -> None:
    told = _on("H100 (80 GB)").described()
    for word in ("weights 15.3 GiB", "kv 15.", "adapters 4.0 GiB", "8,192 rows a pass", "tokens of samples"):
        assert word in told
    assert "\n" not in told
