"""A client of a gateway's jobs, and of what they and others used, as the command line is one."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx

from knapper import limits
from knapper.cli.tables import table
from knapper.errors import InvalidField, NotFound, Unavailable, UserError
from knapper.jobs import names, spec
from knapper.text.durations import clock

_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
_LATER = (408, 425, 429)
_METRICS = ("reward/mean", "loss/mean", "accuracy/mean", "tokens/mean", "grad_norm", "wall_seconds")
_USED = {
    ("training", "token_count"): "tokens_trained",
    ("training", "device_seconds"): "training_device_seconds",
    ("sampling_prefill", "token_count"): "prompt_tokens",
    ("sampling_sample", "token_count"): "tokens_sampled",
    ("sampling_sample", "device_seconds"): "sampling_device_seconds",
    ("checkpoint", "count"): "checkpoints",
}
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
        return self._ask("POST", "/jobs", {"name": names.job(name or folder.name), "files": texts, "again": again})

    def jobs(self, limit: int) -> tuple[list[dict[str, Any]], int]:
        """(the newest, how many there are)."""
        answer = self._ask("GET", f"/jobs?limit={limit}")
        return answer["jobs"], answer["cursor"]["total_count"]

    def show(self, job: str, after: int = 0) -> dict[str, Any]:
        return self._ask("GET", f"/jobs/{names.job(job)}?after={after}")

    def cancel(self, job: str) -> dict[str, Any]:
        return self._ask("POST", f"/jobs/{names.job(job)}/cancel")

    def resume(self, job: str) -> dict[str, Any]:
        return self._ask("POST", f"/jobs/{names.job(job)}/resume")

    def usage(self, starting_on: datetime, ending_before: datetime) -> list[dict[str, Any]]:
        """What was used in each hour between two full hours."""
        window = {"starting_on": starting_on.isoformat(), "ending_before": ending_before.isoformat()}
        found: list[dict[str, Any]] = self._ask("GET", f"/billing/usage/events?{urlencode(window)}")["data"]
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
            detail = str(said.get("detail", said))
            if answer.status_code == NotFound.status:
                raise NotFound(detail)
            if answer.status_code in _LATER or answer.status_code >= 500:
                raise Unavailable(detail)
            raise UserError(detail)
        return said


def lines(told: dict[str, Any]) -> Iterator[str]:
    """A line a step."""
    for step in told.get("metrics", []):
        shown = "  ".join(f"{name} {step[name]:.4g}" for name in _METRICS if name in step)
        yield f"step {step['step']:>4}{_of(told)}  {shown}"


def doing(told: dict[str, Any], *, counts: bool = True) -> str:
    """What a job does now, empty if nothing; `counts`: with how much of it is done, and for how long it does that."""
    if told["state"] == "waiting":
        return str(told["reason"] or "waiting")
    if not (activity := told.get("activity")):
        return ""
    step, of = activity["step"], activity["of"]
    if step is None:
        text = str(activity["phase"])
    elif activity["phase"] == "evaluating":
        text = f"evaluating after step {step}{_of(told)}" if step else "evaluating before step 1"
    else:
        text = f"{activity['phase']} step {step}{_of(told)}"
    if not counts:
        return text
    if of is not None:
        text += f": {of} rows" if activity["done"] is None else f": {activity['done']} of {of} prompts"
    return f"{text}, for {clock(activity['seconds'])}" + (f"; {told['reason']}" if told["reason"] else "")


def timing(told: dict[str, Any]) -> str:
    """When the job may end, empty if nobody can tell yet."""
    left_s = told.get("seconds_left")
    return "" if left_s is None else f"ends in about {clock(left_s)}"


def summary(told: dict[str, Any]) -> Iterator[str]:
    """What became of a job, or is becoming."""
    took = f", {clock(told['elapsed_seconds'])}" if "elapsed_seconds" in told else ""
    yield f"{told['job']}: {told['state']}, step {told['step']}{_of(told)}{took}"
    if told.get("activity"):
        yield f"{doing(told)}; {timing(told) or 'its first step will tell when it may end'}"
    elif told["reason"]:
        yield told["reason"]
    if adapts := told.get("adapts"):
        more = "" if "unembed" in adapts else "; not unembed, as the SDK's default does: `lora: {train_unembed: true}`"
        yield f"adapts {', '.join(adapts)}{more}"
    evaluation = told.get("evaluation") or {}
    for when in ("before", "after"):
        if evaluation.get(when):
            yield f"{when:6}  " + "  ".join(f"{name} {value:.4g}" for name, value in evaluation[when].items())
    if told.get("checkpoint"):
        yield f"adapter: {told['outputs']}adapter/, and {told['checkpoint']}"


def overview(jobs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line a job, if there is any."""
    rows = [
        (
            job["job"],
            job["kind"] or "-",
            job["state"],
            f"{job['step']}{_of(job)}",
            job["created_at"][:19],
            job["reason"],
        )
        for job in jobs
    ]
    if rows:
        yield from table(("JOB", "KIND", "STATE", "STEP", "CREATED", ""), rows)


def used(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sums of each run, or session, and model, in the order of their names."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for each in events:
        told = each["event_info"]
        about, model = told.get("training_run_id") or each["session_id"] or "-", each["base_model"]
        row = found.setdefault((about, model), {"about": about, "base_model": model})
        for name in ("token_count", "device_seconds", "count"):
            if (column := _USED.get((told["type"], name))) is not None:
                row[column] = row.get(column, 0) + told.get(name, 0)
    return [row for _, row in sorted(found.items())]


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
