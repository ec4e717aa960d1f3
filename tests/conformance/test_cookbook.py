"""tinker-cookbook, unmodified, trains here; docs/cookbook.md has the figures of a run in full."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.cookbook.loops import LOOPS, Loop, distilled_from_another_model, learned_and_reinforced, refused
from tests.conformance.cookbook.page import COMMAND, PATH, figures_of, render
from tests.conformance.cookbook.workplace import COOKBOOK, MODEL, TEACHER, Workplace, installed, opened

pytestmark = pytest.mark.timeout(300)
CASES = [pytest.param(loop, loop.steps[0], id=loop.name) for loop in LOOPS if loop.steps[0]]
CASES += [
    pytest.param(loop, loop.steps[1], id=f"{loop.name}, in full", marks=pytest.mark.long)
    for loop in LOOPS
    if loop.steps[1] > loop.steps[0]
]


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    assert installed(), f"the cookbook is not in {COOKBOOK}; `make setup` installs it"
    with opened(tmp_path_factory.mktemp("cookbook")) as workplace:
        yield workplace
        log = workplace.server.log()
    assert "Traceback" not in log, log[-4000:]
    alarms = [line for line in log.splitlines() if "alarm=" in line]
    assert not alarms, "loops that do nothing wrong raise no alarm"


@pytest.mark.parametrize(("loop", "steps"), CASES)
def test_a_loop_of_the_cookbook_has_its_effect(loop: Loop, steps: int, at: Workplace) -> None:
    seen = loop.follow(at, steps)
    print(f"{loop.name}: {loop.figure} {seen.first:.3g} -> {seen.last:.3g}, {seen.steps} steps")


def test_a_student_is_taught_by_another_base_model(tmp_path: Path) -> None:
    """One of random weights is soon approached by nobody: it is about whose log-probabilities the student is given."""
    assert installed()
    with opened(tmp_path, TEACHER) as workplace:
        divergences = distilled_from_another_model(workplace, 2)
        assert {f"engine:{name}" for name in (MODEL, TEACHER)} <= set(workplace.server.processes())
    assert len(divergences) == 2
    assert min(divergences) > 1, "of a student that is its own teacher it is 0"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_moe", "nemotron_h"])
def test_hybrids_and_mixtures_are_taught_and_reinforced(tmp_path: Path, kind: str) -> None:
    """Layers with a state, experts, and both. What samples is what is trained, to rounding."""
    assert installed()
    with opened(tmp_path, kind=kind) as workplace:
        losses, distances = learned_and_reinforced(workplace, 3)
        assert "Traceback" not in workplace.server.log()
    print(f"{kind}: loss {losses[0]:.3g} -> {losses[-1]:.3g}, distances {distances}")
    assert losses[-1] < 0.6 * losses[0], losses
    assert len(distances) == 3
    assert max(distances) < 1e-8, distances


@pytest.mark.parametrize("options", [{}, {"max_steps_off_policy": 1}], ids=["synchronous", "asynchronous"])
def test_the_default_loss_is_refused_with_what_to_pass_instead(options: dict[str, int], at: Workplace) -> None:
    said = refused(at, **options)
    assert "stable_reinforce" in said
    assert "pass the loss importance_sampling, ppo or cispo" in said


def test_the_page_has_every_loop_and_figures_that_show_its_effect() -> None:
    page = PATH.read_text(encoding="utf-8")
    figures = figures_of(page)
    assert list(figures) == [loop.name for loop in LOOPS], f"docs/cookbook.md is out of date; run: {COMMAND}"
    assert page == render(figures), f"docs/cookbook.md is out of date; run: {COMMAND}"
    for loop in LOOPS:
        seen = figures[loop.name]
        assert seen.steps == loop.steps[1]
        assert seen.last > seen.first if "reward" in loop.figure else seen.last <= max(seen.first, 1e-5)
