"""A model that only the engine finds wrong: whoever waits hears why within seconds, and goes on once it is mended."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
import tinker
from tinker import types

from tests.command import knapper
from tests.conformance.server import Server, wait_until
from tests.conformance.test_jobs import CHANGES, EXAMPLES
from tests.engine.tiny import tiny_model
from tests.jobs.works import CHAT
from tests.local.broken import cut

pytestmark = pytest.mark.timeout(240)

WHY = "model.safetensors cannot be read as safetensors: it was cut: it has 1000 bytes"
TOLD_S = 60.0  # a start of Python and torch on a busy machine, and a few seconds


def doctor(server: Server) -> str:
    done = knapper("doctor", "--data", str(server.data))
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def health(server: Server) -> dict[str, object]:
    answer = httpx.get(f"{server.url}/api/v1/healthz", trust_env=False, timeout=10)
    assert answer.status_code == 200
    return dict(answer.json())


def submit(server: Server) -> Path:
    """A job of supervised training; where its status is told."""
    inbox = server.data / "inbox" / "local" / "sft"
    inbox.mkdir(parents=True)
    for file in (EXAMPLES / "sft").glob("*.jsonl"):
        shutil.copy(file, inbox)
    yaml = (EXAMPLES / "sft" / "job.yaml").read_text()
    for old, new in CHANGES["sft"]:
        yaml = yaml.replace(old, new)
    (inbox / "job.yaml").write_text(yaml)
    return server.data / "jobs" / "local" / "sft" / "status.json"


def test_whoever_waits_is_told_why_and_goes_on_once_the_files_are_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(tmp_path / "models" / "tiny")
    (model / "chat_template.jinja").write_text(CHAT)
    whole = (model / "model.safetensors").read_bytes()
    with (
        Server.start(model, tmp_path / "data") as server,
        tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service,
        caplog.at_level(logging.WARNING),
    ):
        cut(1000)(model)  # behind the check, as a disk does
        training = service.create_lora_training_client(str(model), rank=4)
        sampling = service.create_sampling_client(base_model=str(model)).result()
        sample = sampling.sample(types.ModelInput.from_ints([1, 2, 3]), 1, types.SamplingParams(max_tokens=4, stop=[]))
        status = submit(server)
        wait_until(lambda: caplog.text.count(WHY) >= 2, "both who wait are told", TOLD_S)
        told = next(line for line in caplog.text.splitlines() if WHY in line)
        assert told.endswith("Only its operator can fix that; it is tried again by itself, and what waits goes on then")

        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-local")
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match=WHY) as refused:
                client.completions.create(model=str(model), prompt="a", max_tokens=2, stream=stream)
            assert refused.value.status_code == 503
            assert refused.value.code == "unservable"

        wait_until(lambda: status.exists() and WHY in status.read_text(), "the job says so", TOLD_S)
        now = json.loads(status.read_text())
        assert (now["state"], now["reason"].partition(":")[0]) == ("running", "waits")
        assert str(health(server)["unservable"]).count(WHY) == 1
        found = doctor(server)
        assert "wrong   engine: model" in found
        assert f"wrong   model {model}" in found

        before = server.processes()["engine"]
        wait_until(lambda: caplog.text.count(WHY) >= 3, "and told again", TOLD_S)
        assert server.processes()["engine"] == before, "its process stays, and is not started again and again"
        assert server.log().count(WHY) == 1
        assert "Traceback" not in server.log()

        (model / "model.safetensors").write_bytes(whole)
        assert sample.result().sequences[0].tokens
        assert training.result().model_id
        assert health(server) == {"status": "ok"}
        wait_until(lambda: json.loads(status.read_text())["state"] == "completed", "the job ends", TOLD_S)
        assert server.log().count("is served again") == 1


BROKEN_TORCH = """
import os, sys
if os.path.exists({died!r}):
    {how}
del sys.modules["torch"], sys.path[sys.path.index({here!r})]
import torch
"""


def shadowed(directory: Path, how: str) -> tuple[Path, Path]:
    """(a PYTHONPATH whose torch does `how` while a file is there, that file)."""
    package = directory / "shadow" / "torch"
    package.mkdir(parents=True)
    died = directory / "dies"
    died.touch()
    (package / "__init__.py").write_text(BROKEN_TORCH.format(died=str(died), how=how, here=str(directory / "shadow")))
    return directory / "shadow", died


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("raise ImportError('libtorch_cpu.so: cannot open shared object file')", "libtorch_cpu.so: cannot open shared"),
        ("os.kill(os.getpid(), 9)", "its process was killed, time and again, while it loaded"),
    ],
    ids=["torch that cannot be imported", "killed at each load"],
)
def test_a_process_that_cannot_load_is_told_of_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, why: str
) -> None:
    model = tiny_model(tmp_path / "models" / "tiny")
    shadow, died = shadowed(tmp_path, how)
    path = os.pathsep.join([str(shadow), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (
        Server.start(model, tmp_path / "data", settings={"PYTHONPATH": path}) as server,
        tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service,
        caplog.at_level(logging.WARNING),
    ):
        training = service.create_lora_training_client(str(model), rank=4)
        wait_until(lambda: why in caplog.text, "the user is told", TOLD_S)
        with pytest.raises(openai.InternalServerError, match=why.partition(":")[0]):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-local").completions.create(
                model=str(model), prompt="a", max_tokens=2
            )
        assert why in str(health(server)["unservable"])
        assert "Traceback" not in server.log()
        died.unlink()
        began = time.monotonic()
        assert training.result().model_id, f"{time.monotonic() - began:.0f} s"
        assert health(server) == {"status": "ok"}


def test_a_relative_directory_is_served_under_the_name_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "Org" / "Name")
    monkeypatch.chdir(tmp_path)
    with Server.start(Path("Org/Name"), tmp_path / "data") as server:
        with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
            by_name = service.create_lora_training_client("Org/Name", rank=2).result()
            by_path = service.create_lora_training_client(str(model), rank=2).result()
            for client in (by_name, by_path):
                assert client.get_info().model_data.model_name == "Org/Name"
                assert client.get_tokenizer().encode("the")
        rest = tinker.RestClient(base_url=server.url, api_key="tml-local")
        assert [each.model_name for each in rest.get_server_capabilities().result().supported_models] == ["Org/Name"]
        listed = openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-local").models.list()
        assert [each.id for each in listed] == ["Org/Name"]


def test_the_start_says_what_is_served_and_how(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "models" / "tiny")
    command = [sys.executable, "-m", "knapper", "up", "--model", str(model), "--data", str(tmp_path / "data")]
    environment = {**os.environ, "KNAPPER_DTYPE": "float32"}
    with subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.readline()
        said = dict(line.split(maxsplit=1) for line in (process.stdout.readline().rstrip() for _ in range(8)))
        process.terminate()
        log = process.stderr.read()
    assert first.startswith("ready: http://127.0.0.1:")
    url = first.removeprefix("ready: ").strip()
    assert said == {
        "model": f"{model} (LlamaForCausalLM, 358 KiB, 512 tokens of context, native)",
        "device": "auto: cuda where there is one, else cpu; the log says which when the engine starts",
        "dtype": "float32",
        "data": str(tmp_path / "data"),
        "inbox": f"{tmp_path / 'data'}/inbox/local/JOB/",
        "/v1": f"{url}/v1",
        "key": "any that begins with tml-, as TINKER_API_KEY=tml-local",
        "stop": "Ctrl-C; what was acknowledged is kept",
    }
    assert [line.split(maxsplit=2)[2] for line in log.splitlines()] == [
        "up: SIGTERM: stopping (once more: at once)", "up: stopped",
    ]  # fmt: skip
