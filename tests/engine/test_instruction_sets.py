"""The promised bits, on a real model at its real shapes, under every instruction set that this CPU has.

Two of its thirty layers have every shape that all have: a product's bits depend on the shapes, not on how many came
before it. The long run takes all of them, and every dtype in every set.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.exactness import DTYPES, InstructionSet, instruction_sets, measured
from knapper.catalogue.download import SMOLLM2, obtain
from knapper.settings import Settings
from tests import instructions as instructions_tried

LAYERS = 2


def of_layers(whole: Path, directory: Path, count: int) -> Path:
    """The same model with its first `count` layers."""
    shutil.copytree(whole, directory, ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.loads((whole / "config.json").read_text())
    assert config["num_hidden_layers"] > count
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    with safe_open(whole / "model.safetensors", framework="pt") as weights:
        names = [name for name in weights.keys() if ".layers." not in name or int(name.split(".")[2]) < count]  # noqa: SIM118
        save_file({name: weights.get_tensor(name) for name in names}, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def whole() -> Path:
    """The demo's model, 135 million weights, where `make demo` has it too."""
    return obtain(SMOLLM2, Settings.load(os.environ).cache)


@pytest.fixture(scope="module")
def shallow(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return of_layers(whole, tmp_path_factory.mktemp("shallow") / "smollm2", LAYERS)


WHOLE = [pytest.param(one, dtype, id=f"{one.name} {dtype}") for one in instruction_sets() for dtype in DTYPES]
# bfloat16 emulated, as AVX2 has it (and a CPU that has no more), takes minutes whatever the depth: the product with the
# vocabulary is most of it.
# What sets with AVX-512 add to each other is for bfloat16; float32 is tried in the oldest and in this CPU's own.
SHALLOW = [
    pytest.param(one, dtype, id=f"{one.name} {dtype}")
    for one in instruction_sets()
    for dtype in DTYPES
    if (one.name == "AVX2") == (dtype == "float32") or (not one.environment and one.name != "AVX2")
]


def no_neighbour_changes_a_bit(instructions: InstructionSet, dtype: str, model: Path, threads: int = 1) -> None:
    row = measured(instructions, str(model), dtype, threads=threads, quick=True)
    instructions_tried.note(dtype, environment={**os.environ, **instructions.environment})
    assert row.broken == []
    assert row.zero, row
    assert any("adapter of rank 32" in product for product in row.found), "the adapters were not tried"


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("instructions", "dtype"), SHALLOW)
def test_no_neighbour_changes_a_bit_at_real_shapes(instructions: InstructionSet, dtype: str, shallow: Path) -> None:
    # Five threads have parts of a tensor that end in the middle of a register, of whatever width its rows are.
    threads = 1 if instructions.environment or dtype == "bfloat16" else 5
    no_neighbour_changes_a_bit(instructions, dtype, shallow, threads)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("instructions", "dtype"), WHOLE)
def test_no_neighbour_changes_a_bit_in_all_the_layers(instructions: InstructionSet, dtype: str, whole: Path) -> None:
    no_neighbour_changes_a_bit(instructions, dtype, whole)


# (query heads, key heads, width): SmolLM2's, Qwen3's, Gemma's, DeepSeek's, Phi's. By Intel's libraries each of these
# widths, and few query heads beside many, ask for another layout of the products than the others do.
ATTENTION = [(9, 3, 64), (8, 2, 128), (4, 1, 256), (2, 2, 192), (2, 2, 80)]
PROGRAM = """
import json, sys, torch
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.batch_invariant_attention import LAYOUTS
from knapper.engine.layers.paged_attention import found_layout
from knapper.engine.models.layer import ScoreRule

torch.set_num_threads(1)
exactness = Exactness()
for heads, groups, width in json.loads(sys.argv[1]):
    for window in (None, 100):
        found_layout(exactness, heads, groups, width, ScoreRule(width**-0.5, window), torch.device("cpu"))
print(json.dumps(exactness.broken))
"""


@pytest.mark.parametrize("instructions", instruction_sets(), ids=lambda one: one.name)
def test_attention_has_a_layout_that_keeps_the_bits_at_the_sizes_of_every_family(instructions: InstructionSet) -> None:
    environment = {**os.environ, **instructions.environment}
    program = [sys.executable, "-c", PROGRAM, json.dumps(ATTENTION)]
    said = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    instructions_tried.note("float32", environment=environment)
    assert json.loads(said.stdout.splitlines()[-1]) == []
