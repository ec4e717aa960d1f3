"""No request loads the settings: that takes a millisecond, a seventh of what a sample of one token takes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVING = [path for part in ("knapper/serving", "functions", "gateway") for path in (ROOT / part).rglob("*.py")]
# What runs once in a life of the process, or once after a copy of it has woken.
AT_THE_START = {
    "gateway/app.py: _from_environment", "knapper/serving/engine.py: holder", "knapper/serving/gates.py: _engine",
    "knapper/serving/gates.py: _settings", "knapper/serving/gates.py: _vllm",
}  # fmt: skip


def loads(tree: ast.AST, within: str = "", cached: bool = True) -> Iterator[str]:
    """Functions that load the settings at each call: not those of a module's own level, nor cached ones."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = {ast.unparse(each) for each in node.decorator_list}
            yield from loads(node, node.name, "cache" in names)
        else:
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Settings.load" and not cached:
                yield within
            yield from loads(node, within, cached)


@pytest.mark.parametrize("path", SERVING, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_are_loaded_at_the_start_alone(path: Path) -> None:
    where = path.relative_to(ROOT)
    found = {f"{where}: {name}" for name in loads(ast.parse(path.read_text()))}
    assert found <= AT_THE_START


def test_a_function_that_loads_them_at_each_call_is_found() -> None:
    asked = "@cache\ndef once(): return Settings.load(e)\nasync def each():\n    if Settings.load(e).sampler: pass\n"
    assert list(loads(ast.parse(asked))) == ["each"]
