"""A sweep that a folder in the inbox starts, with no client, under kills of every process; then by HTTP alone."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conformance.server import Server
from tests.conformance.test_jobs_by_http import told
from tests.jobs.sweep.sweeps import BASE, GRID, SEARCH, SMALL, files

_SECTIONS = {
    "small": (SMALL, ["engine", "gateway", "supervisor"]),
    "grid": (GRID, ["engine", "gateway", "broker", "engine", "supervisor", "gateway", "engine"]),
    "tpe": (SEARCH % 1, ["engine", "gateway", "broker", "engine", "supervisor", "gateway", "engine"]),
}  # with what is killed


def put(server: Server, job: str, section: str) -> None:
    """As people do: the data first, job.yaml last."""
    inbox = server.data / "inbox" / "local" / job
    inbox.mkdir(parents=True)
    for name, content in sorted(files(section, BASE).items(), key=lambda file: file[0] == "job.yaml"):
        (inbox / name).write_text(content)


def client(server: Server) -> httpx.Client:
    transport = httpx.HTTPTransport(retries=3)
    headers = {"X-API-Key": "tml-local"}
    return httpx.Client(base_url=f"{server.url}/api/v1/", headers=headers, timeout=60, transport=transport)


def ended(server: Server, job: str, at_each_look: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
    until = time.monotonic() + 200
    while time.monotonic() < until:
        try:
            with client(server) as http:
                shown: dict[str, Any] = http.get(f"jobs/{job}").json()
        except httpx.TransportError:  # the gateway was killed
            time.sleep(0.2)
            continue
        if shown.get("state") not in (None, "running", "waiting"):
            return shown
        if "trials" in shown:
            at_each_look(shown)
        time.sleep(0.2)
    raise AssertionError(f"{job} has not ended: {server.log()[-4000:]}")


def rows(server: Server, job: str) -> list[tuple[Any, ...]]:
    shown = json.loads((server.data / "jobs" / "local" / job / "sweep.json").read_text())
    return [(row["values"], row["state"], row["value"], row["step"]) for row in shown["trials"]]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name", ["small", pytest.param("grid", marks=pytest.mark.long), pytest.param("tpe", marks=pytest.mark.long)]
)
def test_a_folder_in_the_inbox_becomes_a_table_whatever_is_killed(model: Path, tmp_path: Path, name: str) -> None:
    section, killed = _SECTIONS[name]
    with Server.start(model, tmp_path / "data") as server:
        put(server, "calm", section)
        calm = ended(server, "calm")
        assert calm["state"] == "completed", calm
        put(server, "wild", section)
        roles = iter(killed)

        def kill(shown: dict[str, Any]) -> None:
            if (role := next(roles, None)) is None or role not in server.processes():
                return
            server.kill(role)
            if role == "supervisor":
                server.up()

        wild = ended(server, "wild", kill)
        assert wild["state"] == "completed", wild
        assert next(roles, None) is None, "all kills were done while it ran"
        assert rows(server, "wild") == rows(server, "calm")
        outputs = server.data / "jobs" / "local"
        adapters = [outputs / job / "adapter" / "adapter_model.safetensors" for job in ("calm", "wild")]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()
        best = calm["trials"]["best"]["job"]
        assert adapters[0].read_bytes() == (outputs / best / "adapter" / "adapter_model.safetensors").read_bytes()
        with client(server) as http:
            listed = {each["job"]: each for each in http.get("jobs").json()["jobs"]}
        count = len(rows(server, "calm"))
        trials = {f"{job}.{n}" for job in ("calm", "wild") for n in range(1, count + 1)}
        assert set(listed) == {"calm", "wild"} | trials, "no trial is lost, and none is there twice"
        assert "Traceback" not in server.log(), server.log()[-4000:]


@pytest.mark.timeout(300)
def test_a_sweep_by_http_on_the_terminal_in_the_console_and_as_a_model(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lr"
    folder.mkdir()
    for name, content in files(GRID, BASE).items():
        (folder / name).write_text(content)
    with Server.start(model, tmp_path / "data") as server, client(server) as http:
        printed = told(server, "submit", str(folder), "--follow")
        assert "lr: completed, 4/4 trials" in printed
        assert [line.split()[1] for line in printed.splitlines() if " completed " in line and "lr." in line][:4]
        shown = http.get("jobs/lr").json()
        best = shown["trials"]["best"]
        assert f"*  {best['job']}" in told(server, "jobs", "show", "lr")
        assert shown["checkpoint"] == best["checkpoint"]
        assert "4/4 trials" in told(server, "jobs", "list")
        page = httpx.get(f"{server.url}/jobs/lr", timeout=60).text
        assert "Trials" in page
        assert f'href="/jobs/{best["job"]}"' in page
        assert 'href="/jobs/lr"' in httpx.get(f"{server.url}/jobs/lr.1", timeout=60).text
        text = httpx.Client(base_url=f"{server.url}/v1/", headers={"Authorization": "Bearer tml-local"}, timeout=120)
        assert {"lr", "lr.1"} <= {each["id"] for each in text.get("models").json()["data"]}
        asked = {"prompt": "in and", "max_tokens": 4, "temperature": 0}
        answers = [
            text.post("completions", json={**asked, "model": name}).raise_for_status().json()["choices"][0]["text"]
            for name in ("lr", best["job"], best["checkpoint"])
        ]
        assert len(set(answers)) == 1
        refused = http.post("jobs/lr.1/resume")
        assert refused.status_code == 422
        assert "no trial of a sweep" in refused.json()["detail"]
        named = http.post("jobs", json={"name": "lr.9", "files": files("", BASE)})
        assert (named.status_code, named.json()["code"]) == (422, "invalid_field")
        assert told(server, "jobs", "delete", "lr") == "lr: deleted\n"
        assert http.get("jobs").json()["jobs"] == []
        assert [path for path in (server.data / "jobs").rglob("*") if path.is_file()] == []


@pytest.mark.timeout(300)
@pytest.mark.long
def test_a_cancelled_sweep_goes_on_where_it_stopped(model: Path, tmp_path: Path) -> None:
    with Server.start(model, tmp_path / "data") as server, client(server) as http:
        put(server, "calm", GRID)
        ended(server, "calm")
        put(server, "cut", GRID)
        cancelled: list[int] = []

        def cancel(shown: dict[str, Any]) -> None:
            if shown["trials"]["ended"] and not cancelled:
                cancelled.append(http.post("jobs/cut/cancel").status_code)

        assert ended(server, "cut", cancel)["state"] == "cancelled"
        assert cancelled == [200]
        assert http.post("jobs/cut/resume").status_code == 200
        assert ended(server, "cut")["state"] == "completed"
        assert rows(server, "cut") == rows(server, "calm")
