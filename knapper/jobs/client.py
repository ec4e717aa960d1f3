"""A client of a gateway's jobs, and of what they and others used, as the command line is one."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx

from knapper import limits
from knapper.errors import InvalidField, KnapperError, Unavailable, UserError
from knapper.jobs import names, spec

_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
_METRICS = ("reward/mean", "loss/mean", "accuracy/mean", "tokens/mean", "grad_norm", "wall_seconds")
ENDED = ("completed", "failed", "cancelled", "refused")


class Client:
    """`url`: the gateway's; `key`: the user's."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/")
        self._http = httpx.Client(base_url=f"{self._url}/api/v1/", headers={"X-API-Key": key}, timeout=_TIMEOUT)

    def close(self) -> None:
        self._http.close()

    def submit(self, job_yaml: Path, name: str | None, *, again: bool = False) -> dict[str, Any]:
        """Send job.yaml and the files that it names, which lie beside it. Raises UserError before anything is sent."""
        folder = job_yaml.resolve().parent
        data = _read(job_yaml)
        files = {names.JOB_YAML: data, **{each: _read(folder / each) for each in spec.parse(data).job.files}}
        size = sum(map(len, files.values()))
        if size > limits.body_bytes_max // 2:  # as JSON it grows
            raise InvalidField(
                "the files' size in bytes", size, f"at most {limits.body_bytes_max // 2} in one request",
                "Copy the folder into the server's inbox instead",
            )  # fmt: skip
        texts = {each: _text(each, content) for each, content in files.items()}
        return self._ask("POST", "jobs", {"name": names.job(name or folder.name), "files": texts, "again": again})

    def jobs(self, limit: int) -> tuple[list[dict[str, Any]], int]:
        """(the newest, how many there are)."""
        answer = self._ask("GET", f"jobs?limit={limit}")
        return answer["jobs"], answer["cursor"]["total_count"]

    def show(self, job: str, after: int = 0) -> dict[str, Any]:
        return self._ask("GET", f"jobs/{names.job(job)}?after={after}")

    def cancel(self, job: str) -> dict[str, Any]:
        return self._ask("POST", f"jobs/{names.job(job)}/cancel")

    def resume(self, job: str) -> dict[str, Any]:
        return self._ask("POST", f"jobs/{names.job(job)}/resume")

    def usage(self, starting_on: datetime, ending_before: datetime) -> list[dict[str, Any]]:
        """What was used in each hour between two full hours."""
        window = {"starting_on": starting_on.isoformat(), "ending_before": ending_before.isoformat()}
        found: list[dict[str, Any]] = self._ask("GET", f"billing/usage/events?{urlencode(window)}")["data"]
        return found

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise Unavailable(
                f"{self._url} does not answer ({error}); start `knapper up`, or set TINKER_BASE_URL to your server"
            ) from error
        try:
            said: dict[str, Any] = answer.json()
        except ValueError as error:
            raise Unavailable(f"{self._url} answered {answer.status_code}, and no JSON; is it a knapper?") from error
        if answer.status_code >= 400:
            kind = UserError if answer.status_code < 500 else KnapperError
            raise kind(str(said.get("detail", said)))
        return said


def lines(told: dict[str, Any]) -> Iterator[str]:
    """A line a step."""
    for step in told.get("metrics", []):
        shown = "  ".join(f"{name} {step[name]:.4g}" for name in _METRICS if name in step)
        yield f"step {step['step']:>4}{_of(told)}  {shown}"


def summary(told: dict[str, Any]) -> Iterator[str]:
    """What became of a job."""
    yield f"{told['job']}: {told['state']}, step {told['step']}{_of(told)}"
    if told["reason"]:
        yield told["reason"]
    evaluation = told.get("evaluation") or {}
    for when in ("before", "after"):
        if evaluation.get(when):
            yield f"{when:6}  " + "  ".join(f"{name} {value:.4g}" for name, value in evaluation[when].items())
    if told.get("checkpoint"):
        yield f"adapter: {told['outputs']}adapter/, and {told['checkpoint']}"


def table(jobs: Sequence[dict[str, Any]]) -> Iterator[str]:
    rows = [("JOB", "KIND", "STATE", "STEP", "CREATED", "")]
    for job in jobs:
        step = f"{job['step']}{_of(job)}"
        rows.append((job["job"], job["kind"] or "-", job["state"], step, job["created_at"][:19], job["reason"]))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:5], widths, strict=True)]
        yield "  ".join([*cells, row[5]]).rstrip()


def _of(told: dict[str, Any]) -> str:
    return f"/{told['steps']}" if told["steps"] is not None else ""


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidField("file", str(path), "a file that can be read", str(error.strerror)) from error


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InvalidField(
            "file", name, "a text in UTF-8", f"Byte {error.start} is {content[error.start]:#x}"
        ) from error
