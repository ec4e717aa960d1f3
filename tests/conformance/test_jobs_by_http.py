"""A job from another machine: by URL and key alone, with kills of the gateway and of the client in between."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import tinker
import transformers

from knapper import limits
from tests.command import knapper
from tests.conformance.server import Server, wait_until

YAML = """kind: rl
data: p.jsonl
steps: 2
lora: {rank: 2}
batch: {prompts: 1, samples: 2}
sampling: {max_tokens: 4}
reward: {name: length, max: 1, slope: 3}
evaluate: {data: held_out.jsonl}
"""
PROMPTS = ('{"prompt": "and the"' + " " * 4000 + "}\n") * 2300  # 9 MB: two parts


def start(server: Server, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "knapper", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment_of(server)
    )


def environment_of(server: Server) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("KNAPPER_")}
    return inherited | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local"}


def told(server: Server, *arguments: str) -> str:
    done = knapper(*arguments, environment=environment_of(server))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log()[-3000:]}"
    return done.stdout


@pytest.mark.timeout(240)
def test_a_job_goes_from_files_to_an_adapter_and_away_again_by_http_alone(model: Path, tmp_path: Path) -> None:
    folder, to = tmp_path / "far-away", tmp_path / "results"
    folder.mkdir()
    (folder / "job.yaml").write_text(YAML)
    (folder / "p.jsonl").write_text(PROMPTS)
    (folder / "held_out.jsonl").write_text('{"prompt": "of a"}\n')
    size = len(PROMPTS.encode())
    staged = f"uploads/{hashlib.sha256(PROMPTS.encode()).hexdigest()}/{size}"
    with Server.start(model, tmp_path / "data") as server:
        http = httpx.Client(base_url=f"{server.url}/api/v1/", headers={"X-API-Key": "tml-local"}, timeout=60)
        assert http.put(f"{staged}/0", content=PROMPTS.encode()[: limits.upload_part_bytes]).status_code == 200
        server.kill("gateway")
        assert not (server.data / "inbox/local").exists(), "half an upload starts nothing"
        assert "far-away: running" in told(server, "submit", str(folder / "job.yaml")), "it waits for the gateway"
        assert (server.data / "inbox/local/far-away/p.jsonl").read_text() == PROMPTS
        shown = _ended(server)
        assert shown["state"] == "completed"

        told(server, "jobs", "download", "far-away", "--to", str(to))
        there = server.data / "jobs/local/far-away"
        names = sorted(str(path.relative_to(there)) for path in there.rglob("*") if path.is_file())
        assert names == sorted(str(path.relative_to(to)) for path in to.rglob("*") if path.is_file())
        assert all((to / name).read_bytes() == (there / name).read_bytes() for name in names)
        base = transformers.AutoModelForCausalLM.from_pretrained(str(model))
        loaded = peft.PeftModel.from_pretrained(base, str(to / "adapter"))
        assert json.loads((to / "adapter/adapter_config.json").read_text())["r"] == 2
        assert any("lora_A" in name for name, _ in loaded.named_parameters())
        assert json.loads((to / "bill.json").read_text()) == shown["bill"]
        rows = json.loads(told(server, "jobs", "rollouts", "far-away", "--step", "1", "--json"))
        assert [row["prompt"] for row in rows] == ["and the"] * 2
        _named(server, http, shown)

        _deleted(server, http, shown)
        assert "Traceback" not in server.log(), server.log()[-4000:]


def _ended(server: Server) -> dict[str, Any]:
    until = time.monotonic() + 120
    while (shown := json.loads(told(server, "jobs", "show", "far-away", "--json")))["state"] == "running":
        assert time.monotonic() < until, server.log()[-4000:]
        time.sleep(0.5)
    found: dict[str, Any] = shown
    return found


def _named(server: Server, http: httpx.Client, shown: dict[str, Any]) -> None:
    """The job's name is the run's: in lists of runs and sessions, on the bill, and as a model."""
    (run,) = tinker.RestClient(base_url=server.url, api_key="tml-local").list_training_runs().result().training_runs
    assert (run.training_run_id, run.user_metadata) == (shown["run"], {"job": "far-away"})
    session = shown["run"].partition(":")[0]
    assert http.get(f"sessions/{session}").json()["display_name"] == "far-away"
    (used,) = [row for row in json.loads(told(server, "usage", "--json")) if row["about"] == "far-away"]
    assert used["tokens_sampled"] > 0
    assert used["prompt_tokens"] > 0
    text = httpx.Client(base_url=f"{server.url}/v1/", headers={"Authorization": "Bearer tml-local"}, timeout=120)
    assert "far-away" in [each["id"] for each in text.get("models").json()["data"]]
    asked = {"prompt": "and the", "max_tokens": 4, "temperature": 0}
    answers = [
        text.post("completions", json={**asked, "model": name}).raise_for_status().json()["choices"][0]["text"]
        for name in ("far-away", shown["checkpoint"])
    ]
    assert answers[0] == answers[1]


def _deleted(server: Server, http: httpx.Client, shown: dict[str, Any]) -> None:
    assert told(server, "jobs", "delete", "far-away") == "far-away: deleted\n"
    left = [path for part in ("inbox", "jobs") for path in (server.data / part / "local/far-away").rglob("*")]
    assert [path for path in left if path.is_file()] == []
    assert http.get(f"training_runs/{shown['run']}").status_code == 404
    assert http.get("jobs/far-away").status_code == 404
    model = {"model": "far-away", "prompt": "x", "max_tokens": 1}
    gone = httpx.post(f"{server.url}/v1/completions", json=model, headers={"X-API-Key": "tml-local"}, timeout=60)
    assert gone.status_code == 404


@pytest.mark.timeout(120)
def test_a_submit_that_is_killed_goes_on_from_there(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    folder.mkdir()
    (folder / "job.yaml").write_text("kind: sft\ndata: d.jsonl\nsteps: 1\n")
    row = json.dumps({"prompt": "a" * 4000, "completion": "b"}) + "\n"
    (folder / "d.jsonl").write_text(row * 10_000)  # 40 MB: five parts
    with Server.start(model, tmp_path / "data") as server:
        uploads = server.data / "uploads" / "local"
        process = start(server, "submit", str(folder / "job.yaml"))
        wait_until(lambda: len(_parts(uploads)) >= 2, "two parts are there")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        before = {path.name: path.stat().st_mtime_ns for path in _parts(uploads)}
        assert 2 <= len(before) <= 5
        assert not (server.data / "inbox/local/cut/job.yaml").exists()
        again = start(server, "submit", str(folder / "job.yaml"))
        wait_until(lambda: len(_parts(uploads)) > len(before) or again.poll() is not None, "more come")
        unchanged = {path.name: path.stat().st_mtime_ns for path in _parts(uploads) if path.name in before}
        assert unchanged in ({}, before), "what was there is not sent again"
        out, said = again.communicate(timeout=100)
        assert out.startswith("cut: "), said
        assert (server.data / "inbox/local/cut/d.jsonl").stat().st_size == (folder / "d.jsonl").stat().st_size


def _parts(uploads: Path) -> list[Path]:
    return [path for path in uploads.glob("*/*") if path.name.isdecimal()]
