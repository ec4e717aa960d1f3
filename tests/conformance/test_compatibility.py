"""docs/compatibility.md is true: every public method of the SDK, and its twin, is called against a running server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

from tests.conformance.compatibility.checks import CHECKS, REFUSALS, Check, Refusal, World
from tests.conformance.compatibility.methods import CLIENTS, public
from tests.conformance.compatibility.page import COMMAND, PATH, render, unknown
from tests.conformance.server import Server

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is experimental:tinker.lib.experimental.ExperimentalWarning"),
]
METHODS = [method for client in CLIENTS for method in public(client)]


def test_every_public_method_of_the_sdk_has_a_check() -> None:
    assert not unknown(), f"tinker {tinker.__version__} has methods that no check knows: {', '.join(unknown())}"
    checked = [method for check in CHECKS for method in check.methods]
    gone = sorted(set(checked) - set(METHODS))
    assert not gone, f"tinker {tinker.__version__} has no {', '.join(gone)}; remove their checks"
    assert len(checked) == len(set(checked)), "two checks of one method"


def test_a_method_that_a_new_sdk_brings_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tinker.RestClient, "forecast_weather", lambda _: None, raising=False)
    assert unknown() == ["RestClient.forecast_weather"]
    assert "| `forecast_weather` | **unknown** |" in render()


def test_the_page_says_what_the_checks_see() -> None:
    assert PATH.read_text(encoding="utf-8") == render(), f"docs/compatibility.md is out of date; run: {COMMAND}"


@pytest.fixture(scope="module")
def jwt_server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("knapper-compatibility") / "data"
    with Server.start(model, data, settings={"KNAPPER_JWT": "true"}) as running:
        yield running


@pytest.fixture
def world(jwt_server: Server, model: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(jwt_server.url, str(model), twins=getattr(request, "param", False))
    yield world
    world.close()


def has_twin(check: Check) -> bool:
    return any(f"{method}_async" in METHODS for method in check.methods)


CASES = [(check, False) for check in CHECKS] + [(check, True) for check in CHECKS if has_twin(check)]


@pytest.mark.parametrize(
    ("check", "world"),
    CASES,
    indirect=["world"],
    ids=[f"{'twins of ' if twins else ''}{', '.join(check.methods)}" for check, twins in CASES],
)
def test_methods_do_what_they_say(check: Check, world: World) -> None:
    check.call(world)
    twins = {f"{method}_async" for method in check.methods if f"{method}_async" in METHODS}
    expected = twins if world.twins else set(check.methods)
    assert expected <= world.called, "the check does not call what it is a check of"


def test_these_cases_call_every_method() -> None:
    called = {method for check, _ in CASES for method in check.methods}
    assert called | {f"{method}_async" for method in called} >= set(METHODS)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.what)
def test_what_is_refused_is_refused_with_what_to_do_instead(refusal: Refusal, world: World) -> None:
    with pytest.raises(tinker.TinkerError) as raised:
        refusal.asks(world)
    assert refusal.says in str(raised.value)
