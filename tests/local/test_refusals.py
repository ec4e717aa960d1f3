"""What cannot be served ends `knapper up` before it says `ready`, in one line that says what is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from knapper.engine.models.loader import expect_architecture
from knapper.errors import KnapperError
from tests.command import knapper
from tests.engine.strange import strange_model
from tests.engine.tiny import tiny_model
from tests.local.broken import BROKEN, REFUSED, config, copied


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "base" / "tiny")


def refusal(directory: Path | str, tmp_path: Path, *flags: str, cwd: Path | None = None, **settings: str) -> str:
    """The one line with which `knapper up` ended."""
    environment = {**os.environ, "KNAPPER_CACHE": str(tmp_path / "cache"), **settings}
    where = ("--model", str(directory), "--data", str(tmp_path / "data"), "--port", "0")
    done = knapper("up", *where, *flags, environment=environment, cwd=cwd)
    assert done.returncode == 1, done.stderr
    assert "ready" not in done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("knapper: ")
    return lines[0]


@pytest.mark.parametrize("what", BROKEN)
def test_what_its_files_tell_ends_the_command_with_one_line(what: str, model: Path, tmp_path: Path) -> None:
    change, said = BROKEN[what]
    assert said in refusal(copied(model, tmp_path / "broken" / "model", change), tmp_path)


@pytest.mark.parametrize("what", REFUSED)
def test_an_architecture_that_is_refused_is_said_in_words(what: str, model: Path, tmp_path: Path) -> None:
    change, said = REFUSED[what]
    with pytest.raises(KnapperError, match=said):
        expect_architecture(copied(model, tmp_path / "model", change))


def test_an_architecture_that_is_refused_ends_it_too(model: Path, tmp_path: Path) -> None:
    """One of them: the command asks a process that imports transformers, which takes seconds."""
    change, said = REFUSED["a mixture of experts"]
    assert said in refusal(copied(model, tmp_path / "broken" / "model", change), tmp_path)


@pytest.mark.parametrize(
    ("devices", "settings", "said"),
    [
        ("65", {}, "KNAPPER_DEVICES"),
        ("0", {}, "KNAPPER_DEVICES"),
        ("two", {}, "KNAPPER_DEVICES"),
        ("2", {"KNAPPER_DEVICE": "mps"}, "KNAPPER_DEVICES is 2; allowed: 1 on mps"),
        ("2", {"KNAPPER_POD_SNAPSHOT": "/proc/x"}, "KNAPPER_DEVICES is 2; allowed: 1 with KNAPPER_POD_SNAPSHOT"),
        ("2", {"KNAPPER_RANK_TIMEOUT_S": "0"}, "KNAPPER_RANK_TIMEOUT_S"),
    ],
)
def test_devices_that_a_model_cannot_be_spread_over_end_it(
    model: Path, tmp_path: Path, devices: str, settings: dict[str, Any], said: str
) -> None:
    assert said in refusal(model, tmp_path, cwd=None, KNAPPER_DEVICES=devices, **settings)


def test_several_models_are_not_spread(model: Path, tmp_path: Path) -> None:
    other = copied(model, tmp_path / "other" / "tiny", lambda _: None)
    said = refusal(model, tmp_path, "--model", str(other), "--devices", "2")
    assert "KNAPPER_DEVICES is 2; allowed: 1 where 2 base models share a machine" in said


def test_a_model_of_transformers_is_not_spread(tmp_path: Path) -> None:
    directory = strange_model(tmp_path / "model", "gpt_neox")
    said = refusal(directory, tmp_path, "--devices", "2")
    assert "KNAPPER_DEVICES is 2; allowed: 1 for a model that transformers computes" in said


def test_a_device_that_is_not_there_ends_it(model: Path, tmp_path: Path) -> None:
    said = refusal(model, tmp_path, KNAPPER_DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    assert "KNAPPER_DEVICE is 'cuda'; allowed: auto, cpu on this machine" in said


def test_a_share_of_a_memory_that_is_not_divided_ends_it(model: Path, tmp_path: Path) -> None:
    said = refusal(model, tmp_path, KNAPPER_DEVICE="cpu", KNAPPER_GPU_MEMORY_SHARE="0.5")
    assert "KNAPPER_GPU_MEMORY_SHARE is 0.5; allowed: 1 on cpu" in said


def _as_large_as_no_machine(directory: Path) -> None:
    """8 TiB of embeddings: a header that is right, before a hole in the file."""
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rows = json.loads(data[8 : 8 + length]), 2**35
    one = header["model.embed_tokens.weight"]
    end = max(each["data_offsets"][1] for name, each in header.items() if name != "__metadata__")
    width = one["shape"][1]
    # Behind all others; where it was there is a tensor that nobody reads, as gaps are not allowed.
    header["model.layers.0.self_attn.rotary_emb.inv_freq"] = dict(one)
    header["model.embed_tokens.weight"] = {
        "dtype": "F32", "shape": [rows, width], "data_offsets": [end, end + 4 * rows * width],
    }  # fmt: skip
    changed = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
        file.truncate(8 + len(changed) + end + 4 * rows * width)
    config(vocab_size=rows)(directory)


def test_weights_that_do_not_fit_into_the_memory_end_it(model: Path, tmp_path: Path) -> None:
    try:
        directory = copied(model, tmp_path / "large" / "model", _as_large_as_no_machine)
    except OSError as error:
        pytest.skip(f"no file of 8 TiB here: {error}")
    said = refusal(directory, tmp_path, KNAPPER_DEVICE="cpu", KNAPPER_DTYPE="bfloat16")
    assert re.search(r"the weights of \S+ take 4096 GiB, and [\d.]+ [MG]iB of memory are free on cpu", said)


def test_a_model_that_vllm_does_not_sample_ends_it(model: Path, tmp_path: Path) -> None:
    said = refusal(model, tmp_path, KNAPPER_SAMPLER="vllm")
    assert "vllm is not installed in" in said


_AS_NOBODY = """
import os, sys
from knapper.errors import KnapperError
from knapper.local import base_model
from knapper.settings import Settings
settings = Settings.load(os.environ)
os.setgid(65534)
os.setuid(65534)
try:
    base_model.chosen(settings, os.environ)
except KnapperError as error:
    print(error)
"""


@pytest.fixture
def shut(model: Path) -> Iterator[Path]:
    """A copy of the model where anybody may look for it."""
    with TemporaryDirectory(dir="/tmp") as place:
        Path(place).chmod(0o755)
        directory = Path(shutil.copytree(model, Path(place) / "models" / "shut"))
        for path in directory.iterdir():
            path.chmod(0o644)
        yield directory


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "."])
def test_files_without_rights_end_it(shut: Path, tmp_path: Path, name: str) -> None:
    (shut / name).chmod(0)
    if os.geteuid() == 0:  # who has every right: so the check is made by somebody who has none
        command, environment = [sys.executable, "-c", _AS_NOBODY], {**os.environ, "KNAPPER_MODEL": str(shut)}
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    else:
        said = refusal(shut, tmp_path)
    (shut / name).chmod(0o755)
    assert "Permission denied" in said
    assert str(shut) in said


def test_a_cache_that_cannot_be_written_ends_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refusal("org/name", tmp_path, KNAPPER_CACHE=str(tmp_path / "file" / "cache"))
    assert "model 'org/name': Not a directory" in said


def test_torch_that_is_missing_ends_it(model: Path, tmp_path: Path) -> None:
    """A Python that has all that is installed here, but torch."""
    code = (
        "import importlib.util as u, sys; found = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'torch' else found(name, *more)\n"
        "import knapper.cli.main; sys.argv[0] = 'knapper'; knapper.cli.main.main()"
    )
    command = [sys.executable, "-c", code, "up", "--model", str(model), "--data", str(tmp_path / "data"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"knapper: torch is not installed in \S+, and \S+ needs it: pip install .*\n", done.stderr)
