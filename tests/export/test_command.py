"""`knapper export` of a PEFT directory on this machine: what it writes, uploads and refuses, before it begins."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from knapper.export.gguf import SCRIPT
from tests import command
from tests.engine.tiny import tiny_model
from tests.export import hub
from tests.export.hub import Hub
from tests.export.test_gguf import STAND_IN
from tests.export.test_merge import loaded, logprobs, trained


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "adapter"
    trained(base, directory, target_modules=["q_proj", "down_proj"])
    (directory / "README.md").unlink()  # PEFT's own
    return directory


@pytest.fixture
def shown() -> Iterator[Hub]:
    with hub.running() as running:
        yield running


def export(*arguments: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    hermetic = {
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return command.knapper("export", *map(str, arguments), environment={**os.environ, **hermetic, **environment})


def test_merging_names_the_base_model_where_the_server_names_a_directory_of_its_own(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    done = export(adapter, "--merged", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert logprobs(loaded(tmp_path / "out" / "merged")).shape == logprobs(loaded(base)).shape
    config = adapter / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace(str(base), "/srv/models/elsewhere"))
    try:
        refused = export(adapter, "--merged", "--out", tmp_path / "other")
        assert "'/srv/models/elsewhere', which is no directory of this machine; name a copy of it" in refused.stderr
        again = export(adapter, "--merged", "--out", tmp_path / "out", "--base", base)
        assert f"{tmp_path}/out/merged is complete already" in again.stdout
    finally:
        config.write_text(text)


def test_what_is_missing_is_said_before_anything_is_written(adapter: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    nowhere = {"PATH": "/nowhere"}
    for arguments, said in (
        (("--gguf", "q9_0"), "--gguf is 'q9_0'; allowed: f32, f16, bf16, q8_0, q6_k, "),
        (("--gguf", "q8_0"), "convert_hf_to_gguf.py, is not on PATH; name its sources by --llama-cpp"),
        (("--ollama", "mine"), "convert_hf_to_gguf.py, is not on PATH"),
        (("--gguf", "q8_0", "--llama-cpp", tmp_path), f"{tmp_path}, which has no convert_hf_to_gguf.py"),
        (("--peft", "--merged", "--push-to-hub", "ada/x"), "with peft and merged; allowed: one of them"),
    ):
        refused = export(adapter, *arguments, *out, **nowhere)
        assert refused.returncode == 1
        assert said in refused.stderr
    (tmp_path / "convert_hf_to_gguf.py").touch()
    refused = export(adapter, "--gguf", "q4_k_m", "--llama-cpp", tmp_path, *out, **nowhere)
    assert "llama-quantize is neither on PATH nor in build/bin" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_ollama_is_given_a_modelfile_beside_its_file(adapter: Path, tmp_path: Path) -> None:
    """A script stands for Ollama: it looks for what the Modelfile names where Ollama would, beside it."""
    (programs := tmp_path / "bin").mkdir()
    (programs / SCRIPT).write_text(STAND_IN.format(names=("token_embd.weight",)))
    (stands_for := programs / "ollama").write_text(
        'if [ "$1 $2 $3" != "create mine -f" ]; then echo "unknown: $*" >&2; exit 2; fi\n'
        'read -r word file < "$4"; test "$word" = FROM && test -f "$file" || { echo "no $file" >&2; exit 1; }\n'
    )
    stands_for.write_text("#!/bin/sh\n" + stands_for.read_text())
    stands_for.chmod(0o755)
    asked = (adapter, "--ollama", "mine", "--llama-cpp", programs, "--out", tmp_path / "out")
    alone = export(*asked, PATH="/nowhere")
    assert alone.returncode == 1
    assert f"ollama is not on PATH; {tmp_path}/out/Modelfile is written" in alone.stderr
    done = export(*asked, PATH=f"{programs}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [
        f"{tmp_path}/out/Modelfile; the model's chat template is more than turns, so Ollama's own guess is used",
        "ollama run mine",
    ]
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM ./adapter-q8_0.gguf\n"


def test_an_adapter_on_the_hub_is_private_and_is_not_sent_twice(adapter: Path, shown: Hub) -> None:
    environment = {"HF_ENDPOINT": shown.url, "HF_TOKEN": hub.TOKEN}
    done = export(adapter, "--push-to-hub", "ada/mine", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{shown.url}/ada/mine"
    assert shown.private == {"ada/mine": True}
    files = shown.repositories["ada/mine"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert b"library_name: peft" in files["README.md"]
    assert len(shown.received) == 1
    assert export(adapter, "--push-to-hub", "ada/mine", **environment).returncode == 0
    assert len(shown.received) == 1, "the hub had it"


def test_a_hub_that_refuses_or_is_not_there_is_said_in_one_line(adapter: Path, shown: Hub) -> None:
    for repository, token, said in (
        ("ada/mine", "hf_wrong", "401 "),
        ("grace/hers", hub.TOKEN, "403 "),
        ("a/b/c", hub.TOKEN, "--push-to-hub is 'a/b/c'; allowed: a name like 'organisation/model'"),
    ):
        refused = export(adapter, "--push-to-hub", repository, HF_ENDPOINT=shown.url, HF_TOKEN=token)
        assert refused.returncode == 1, repository
        assert said in refused.stderr
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
    gone = export(adapter, "--push-to-hub", "ada/mine", HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN=hub.TOKEN)
    assert "http://127.0.0.1:9 does not answer" in gone.stderr
    (adapter / "README.md").write_text("---\nbase_model: /srv/models/mine\n---\n")
    try:
        path = export(adapter, "--push-to-hub", "ada/mine", HF_ENDPOINT=shown.url, HF_TOKEN=hub.TOKEN)
    finally:
        (adapter / "README.md").unlink()
    assert f"{adapter}/README.md: Invalid metadata" in path.stderr
    assert '"/srv/models/mine" is not valid' in path.stderr
    offline = export(adapter, "--push-to-hub", "ada/mine", HF_ENDPOINT=shown.url, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set, so nothing is uploaded" in offline.stderr
    assert shown.repositories == {"ada/mine": {}}
