"""Every notebook of recipes/ runs to its end, in a reduced form against a tiny random model."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.conformance.server import Server
from tests.engine.tiny import tiny_model
from tests.recipes import notebooks
from tests.recipes.notebooks import RECIPES, ROOT

_CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
_SMALL: Final[dict[str, dict[str, int]]] = {
    "arithmetic": {"steps": 1, "prompts": 2, "samples": 2, "largest": 3, "held_out": 2},
    "autoresearch": {"trials": 2, "at_once": 2, "alone": 1, "steps": 1, "largest": 3, "held_out": 2},
    "distillation": {
        "teacher_steps": 1, "steps": 1, "prompts": 2, "samples": 2, "largest": 3, "held_out": 2, "rank": 2,
    },
    "pig_latin": {"steps": 2, "batch": 2, "held_out": 2, "rank": 2},
    "preference": {"questions": 4, "held_out": 1, "warm_steps": 1, "steps": 1, "pairs": 2, "max_tokens": 4},
    "text_to_sql": {
        "warm_steps": 1, "steps": 1, "prompts": 2, "samples": 2, "max_tokens": 4, "shown": 2, "held_out": 2,
    },
    "tool_use": {"warm_steps": 1, "steps": 1, "prompts": 2, "samples": 2, "shown": 2, "tried": 4, "held_out": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    (made / "chat_template.jinja").write_text(_CHAT)
    return made


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.start(model, tmp_path_factory.mktemp("knapper") / "data") as running:
        yield running
    assert "Traceback" not in running.log(), running.log()[-4000:]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_notebook_runs_to_its_end(recipe: str, server: Server, tmp_path: Path) -> None:
    before = dict(os.environ)
    notebook = notebooks.reduced(notebooks.read(recipe), _SMALL[recipe])
    done = notebooks.execute(notebook, server.url, tmp_path, timeout_s=150)
    result = json.loads((tmp_path / "out" / "recipes" / f"{recipe}.json").read_text())
    assert {name: result["options"][name] for name in _SMALL[recipe]} == _SMALL[recipe]
    assert "| --- |" in notebooks.printed(done)
    assert any("image/svg+xml" in output.get("data", {}) for cell in done.cells for output in cell.get("outputs", []))
    assert dict(os.environ) == before


def test_a_script_runs_by_its_flags_on_the_model_that_is_named(server: Server, model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipes.pig_latin.train", "--model", str(model)]
    flags = ["--steps", "1", "--batch", "2", "--held-out", "2", "--rank", "2", "--learning-rate", "0.01"]
    environment = {**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out" / "recipes" / "pig_latin.json").read_text())
    assert (result["model"], result["options"]["learning_rate"]) == (str(model), 0.01)


def test_every_recipe_has_a_reduced_form() -> None:
    assert sorted(_SMALL) == RECIPES
