"""The GPU's side of the engine, without a GPU: what each phase asks at real sizes, and what fits each card."""

import gc
from dataclasses import asdict
from pathlib import Path

import pytest

from knapper.engine import memory
from knapper.errors import UserError
from knapper.settings import Settings
from tests.engine.gate import checks
from tests.engine.gate.conftest import expect_reference
from tests.engine.gate.models import CONFIGS, REDUCED, write_model
from tests.engine.gate.phases import Bench, bench
from tests.engine.gpu import Driver, with_gpu

pytestmark = pytest.mark.timeout(300)  # on a machine that does much else
# The least, the usual and the most; what lies between is left to the long run.
_CARDS = [pytest.param(card, marks=[pytest.mark.long] if card == "A100 (40 GB)" else []) for card in memory.CARDS]


def test_every_model_and_phase_has_floors() -> None:
    floors = {model: set(phases) for model, phases in checks.FLOORS.items()}
    assert {model: floors[model] for model in CONFIGS} == {model: set(checks.PHASES) for model in CONFIGS}
    assert floors.keys() == CONFIGS.keys() | REDUCED.keys()


@pytest.mark.parametrize("phase", list(checks.PHASES))
def test_a_phase_asks_no_more_of_a_gpu_than_its_floor(sized_model: tuple[str, Bench], phase: str) -> None:
    name, bench = sized_model
    expect_reference(bench)
    gc.collect()  # what earlier phases have not let go of
    assert checks.complaints(name, phase, checks.counted(bench, phase)) == []


@pytest.mark.parametrize("name", list(REDUCED))
def test_a_layer_asks_no_more_of_a_gpu_than_its_floor(tmp_path: Path, name: str) -> None:
    with bench(write_model(tmp_path, name)) as one:
        expect_reference(one)
        assert [checks.complaints(name, phase, checks.counted(one, phase)) for phase in checks.FLOORS[name]] == [[]]


@pytest.mark.parametrize("card", _CARDS)
def test_a_pass_fits_a_card(sized_model: tuple[str, Bench], card: str) -> None:
    """With what the account gives it, and not with half of it: an account that gives too little is slow."""
    _, bench = sized_model
    plan = _plan(bench, card)
    if plan is None:  # no pass: the engine says so when it starts
        return
    of_card = checks.account(bench, memory.CARDS[card])
    if any(plan == _plan(bench, smaller) for smaller in list(memory.CARDS)[: list(memory.CARDS).index(card)]):
        return  # the same pass as on a smaller card
    assert checks.over_budget(bench, memory.CARDS[card], of_card) == []
    beside = bench.meter.counts.peak - bench.decoder.weights_bytes
    keeps_all = plan[1] >= len(bench.decoder.config.layers)
    assert keeps_all or beside > 0.6 * of_card.activations, "most of it is not used"


def _plan(bench: Bench, card: str) -> tuple[int, int] | None:
    """(rows of a pass, layers that keep their activations); None for a card that the model does not fit."""
    try:
        of_card = checks.account(bench, memory.CARDS[card])
    except UserError:
        return None
    assert of_card.passes is not None
    return of_card.rows_max, of_card.passes.layers_kept(of_card.rows_max)


@pytest.mark.parametrize("setting", ["auto", "cuda"])
def test_an_engine_starts_on_a_gpu(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    with_gpu(monkeypatch, Driver())
    assert checks.started(Settings.load({"KNAPPER_DEVICE": setting, "KNAPPER_GPU_MEMORY_SHARE": "0.5"})) == []


def test_weights_are_what_the_plan_of_a_card_counts(sized_model: tuple[str, Bench]) -> None:
    name, bench = sized_model
    config = bench.decoder.config
    planned = memory.ModelBytes.planned(config)
    loaded = memory.ModelBytes.of(bench.decoder, bench.decoder.weights_bytes)
    small = asdict(planned) | {"weights": loaded.weights}
    assert asdict(loaded) == small, name
    assert abs(planned.weights - loaded.weights) < 0.001 * loaded.weights, "norms are left out of one"
