"""Several base models on one machine: an engine each, which is there while it is asked."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types

from tests.conformance.kill_client import datum, tokens
from tests.conformance.server import Server, wait_until
from tests.engine.tiny import tiny_model

PROMPT = types.ModelInput.from_ints(tokens(1))
PARAMS = types.SamplingParams(max_tokens=8, seed=3, stop=[])

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "a" / "teacher", seed=1)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "a" / "student", seed=2)


def logprobs(url: str, model: Path) -> list[float | None]:
    with tinker.ServiceClient(base_url=url, api_key="tml-local") as service:
        return service.create_sampling_client(base_model=str(model)).result().compute_logprobs(PROMPT).result()


def loss(url: str, model: Path) -> float:
    with tinker.ServiceClient(base_url=url, api_key="tml-local") as service:
        training = service.create_lora_training_client(str(model), rank=4, seed=1).result()
        training.forward_backward([datum(1)], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        return float(training.forward([datum(1)], "cross_entropy").result().metrics["loss:sum"])


def test_each_model_is_as_it_is_alone_and_is_there_while_it_is_asked(
    tmp_path: Path, teacher: Path, student: Path
) -> None:
    alone = {}
    for model in (teacher, student):
        with Server.start(model, tmp_path / f"data-{model.name}") as server:
            alone[model] = logprobs(server.url, model), loss(server.url, model)
    with Server.start(teacher, tmp_path / "data", "--model", str(student), "--idle", "3") as server:
        with httpx.Client(base_url=server.url, headers={"X-API-Key": "tml-local"}, trust_env=False) as http:
            offered = http.get("/api/v1/get_server_capabilities").json()["supported_models"]
            assert {each["model_name"] for each in offered} == {str(teacher), str(student)}
            assert {each["id"] for each in http.get("/v1/models").json()["data"]} >= {str(teacher), str(student)}
        assert (logprobs(server.url, teacher), loss(server.url, teacher)) == alone[teacher]
        engines = {role for role in server.processes() if role.startswith("engine")}
        assert engines == {f"engine:{teacher}"}, "nobody asked for the other"
        assert logprobs(server.url, student) == alone[student][0]
        wait_until(lambda: f"engine:{teacher}" not in server.processes(), "the first has ended", timeout_s=60)
        assert loss(server.url, student) == alone[student][1]
        assert "memory: " not in server.log() or "waits" not in server.log()


def test_a_job_goes_to_the_engine_of_its_model_and_one_that_names_none_is_asked_which(
    tmp_path: Path, teacher: Path, student: Path
) -> None:
    (tmp_path / "models.txt").write_text(f"# two\n{student}\n")
    job = tmp_path / "job"
    job.mkdir()
    rows = '{"prompt": "the and", "completion": " in"}\n' * 4
    (job / "rows.jsonl").write_text(rows)
    text = "kind: sft\ndata: rows.jsonl\nepochs: 2\nbatch: {sequences: 4}\nlora: {rank: 4}\n"
    with Server.start(teacher, tmp_path / "data", "--models", str(tmp_path / "models.txt")) as server:
        environment = {**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local"}
        (job / "job.yaml").write_text(text)
        command = [sys.executable, "-m", "knapper", "submit", str(job / "job.yaml"), "--follow"]
        refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert refused.returncode == 1
        assert "base_model" in refused.stdout
        assert str(student) in refused.stdout
        (job / "job.yaml").write_text(text + f"base_model: {student}\n")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        engines = {role for role in server.processes() if role.startswith("engine")}
        assert engines == {f"engine:{student}"}


def test_a_model_that_does_not_fit_beside_another_waits_and_says_so(
    tmp_path: Path, teacher: Path, student: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Server.start(teacher, tmp_path / "data", "--model", str(student)) as server:
        hungry = server.data / "run" / f"memory-{os.getpid()}"  # an engine that will yet take more than there is
        ticks = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()[19]
        hungry.write_text(f"{ticks} {2**50}")
        with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
            asked = service.create_sampling_client(base_model=str(student)).result().compute_logprobs(PROMPT)
            wait_until(lambda: "waits: its weights take" in server.log(), "it waits", timeout_s=60)
            said = "memory are free beside the other models' engines"
            wait_until(lambda: any(said in each.getMessage() for each in caplog.records), "its user knows", 60)
            hungry.unlink()
            assert len(asked.result(timeout=60)) == PROMPT.length
        assert "cannot be served" not in server.log()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model", "{teacher}"), "is '{teacher}'; allowed: each model once"),
        (("--models", "{empty}"), "allowed: a file that names a model a line"),
        (("--models", "{missing}"), "allowed: a text file that can be read"),
        (("--models", "/dev/zero"), "allowed: a text file that can be read"),
        (("--models", "{large}"), "allowed: a file of at most 65536 bytes"),
    ],
)
def test_what_is_wrong_with_a_list_of_models_is_said(
    tmp_path: Path, teacher: Path, flags: tuple[str, str], said: str
) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "large").write_text("a" * 65537)
    names = {
        "large": tmp_path / "large",
        "teacher": teacher,
        "empty": tmp_path / "empty",
        "missing": tmp_path / "missing",
    }
    with pytest.raises(AssertionError) as failed:
        Server.start(teacher, tmp_path / "data", *(flag.format(**names) for flag in flags))
    assert said.format(**names) in " ".join(str(failed.value).split())
