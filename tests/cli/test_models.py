"""`knapper models`: what it says fits is what the account of memory says."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.small_models import CONFIGS
from knapper.catalogue.small_models import SMALL_MODELS, SmallModel
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.weight_files import promised
from knapper.limits import MIB

GIB = 1024 * MIB


def test_the_sizes_are_those_of_the_models(tmp_path: Path) -> None:
    """As the shapes that a config.json promises add up; what is measured is what is listed."""
    assert [model.name for model in SMALL_MODELS] == list(CONFIGS)
    for model in SMALL_MODELS:
        (tmp_path / "config.json").write_text(
            json.dumps({"tie_word_embeddings": True, "max_position_embeddings": 8192, **CONFIGS[model.name]})
        )
        config = ModelConfig.read(tmp_path)
        assert model.weights == sum(math.prod(shape) for _, shape in promised(config)), model.name


@pytest.mark.parametrize(
    ("available", "dtypes"), [(8 * GIB, ["float32", "bfloat16"]), (7 * GIB, ["bfloat16"]), (4 * GIB, [])]
)
def test_a_model_fits_in_the_dtypes_for_which_there_is_memory(available: int, dtypes: list[str]) -> None:
    assert SmallModel("org/model", 500_000_000).dtypes(available) == dtypes


def test_they_are_listed_for_people_and_programs() -> None:
    command = [sys.executable, "-m", "knapper", "models"]
    people = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert people[0].startswith("MODEL")
    assert [line.split()[0] for line in people[1:]] == list(CONFIGS)
    programs = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True, text=True).stdout)
    assert [each["model"] for each in programs] == list(CONFIGS)
    assert programs[0]["memory_bytes"]["bfloat16"] < programs[0]["memory_bytes"]["float32"]
