"""A client of a gateway's jobs and usage, for the command line."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx

from knapper import limits
from knapper.cli import jobs_transfer
from knapper.cli.tables import table
from knapper.errors import InvalidField, NotFound, Unavailable, UserError
from knapper.jobs import names, spec
from knapper.text.durations import clock
from knapper.text.sizes import sized

_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
_SUBMIT_TIMEOUT = httpx.Timeout(300.0, connect=5.0)  # the server checks all rows before it answers
_LATER = (408, 425, 429)
METRICS = ("reward/mean", "loss/mean", "accuracy/mean", "tokens/mean", "grad_norm", "wall_seconds")
_USED = {
    ("training", "token_count"): "tokens_trained",
    ("training", "device_seconds"): "training_device_seconds",
    ("sampling_prefill", "token_count"): "prompt_tokens",
    ("sampling_sample", "token_count"): "tokens_sampled",
    ("sampling_sample", "device_seconds"): "sampling_device_seconds",
    ("checkpoint", "count"): "checkpoints",
}
_QUOTA = {
    "runs": "runs open",
    "bytes": "in checkpoints",
    "tokens_a_day": "tokens used today",
    "samples_in_flight": "samples in flight",
}
ENDED = ("completed", "failed", "cancelled", "refused")


class JobsClient:
    """`url`: the gateway's; `key`: the user's."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=f"{self.url}/api/v1/", headers={"X-API-Key": key}, timeout=_TIMEOUT)

    def close(self) -> None:
        self._http.close()

    def submit(self, job_yaml: Path, name: str | None, *, again: bool = False) -> dict[str, Any]:
        """Send job.yaml, which may be given by its folder, and the files that it names, which lie beside it.

        Raises UserError before anything is sent.
        """
        if job_yaml.is_dir():
            job_yaml /= "job.yaml"
        folder = job_yaml.resolve().parent
        yaml = jobs_transfer.checked(job_yaml)
        files = {each: jobs_transfer.checked(folder / each) for each in spec.parse(yaml.path.read_bytes()).files}
        size = yaml.size + sum(file.size for file in files.values())
        if size > limits.job_upload_bytes_max:
            raise InvalidField(
                "the files' size in bytes", size, f"at most {limits.job_upload_bytes_max} in all",
                "Leave rows out, or copy the folder into the server's inbox",
            )  # fmt: skip
        large = {name: file for name, file in files.items() if file.size and size > limits.upload_part_bytes}
        small = {names.JOB_YAML: yaml, **{name: file for name, file in files.items() if name not in large}}
        request: dict[str, Any] = {
            "name": names.chosen(name or folder.name),
            "files": {each: file.path.read_text(encoding="utf-8") for each, file in small.items()},
            "again": again,
        }
        if large:
            request["uploads"] = {each: {"sha256": file.sha256, "size": file.size} for each, file in large.items()}
            for each, file in large.items():
                jobs_transfer.send(self, each, file)
        return self.ask("POST", "/jobs", request, _SUBMIT_TIMEOUT)

    def jobs(self, limit: int) -> tuple[list[dict[str, Any]], int]:
        """(the newest, how many there are)."""
        answer = self.ask("GET", f"/jobs?limit={limit}")
        return answer["jobs"], answer["cursor"]["total_count"]

    def show(self, job: str, after: int = 0) -> dict[str, Any]:
        return self.ask("GET", f"/jobs/{names.job(job)}?after={after}")

    def cancel(self, job: str) -> dict[str, Any]:
        return self.ask("POST", f"/jobs/{names.job(job)}/cancel")

    def resume(self, job: str) -> dict[str, Any]:
        return self.ask("POST", f"/jobs/{names.job(job)}/resume")

    def delete(self, job: str) -> dict[str, Any]:
        return self.ask("DELETE", f"/jobs/{names.job(job)}")

    def files(self, job: str) -> list[dict[str, Any]]:
        """The files that the job has published."""
        files: list[dict[str, Any]] = self.ask("GET", f"/jobs/{names.job(job)}/files")["files"]
        return files

    def usage(self, starting_on: datetime, ending_before: datetime) -> dict[str, Any]:
        """`data`: usage in each hour between two full hours; its `total_cost` and `currency` if there are prices."""
        window = {"starting_on": starting_on.isoformat(), "ending_before": ending_before.isoformat()}
        return self.ask("GET", f"/billing/usage/events?{urlencode(window)}")

    def captured(self) -> dict[str, Any]:
        """`cursor`, with how many captured episodes there are, and `limits`."""
        return self.ask("GET", "/captures?limit=1")

    def storage(self) -> list[dict[str, Any]]:
        """What is stored now, by project."""
        rows: list[dict[str, Any]] = self.ask("GET", "/billing/usage/checkpoints/current")["data"]
        return rows

    def quota(self) -> dict[str, Any]:
        """The quota of the key's tenant, and what it has used of it."""
        return self.ask("GET", "/quota")

    def ask(self, method: str, path: str, body: object = None, timeout: httpx.Timeout = _TIMEOUT) -> dict[str, Any]:
        """Raises the server's UserError, or Unavailable if it does not answer, or not now."""
        with self._reachable():
            answer = self._http.request(method, path, json=body, timeout=timeout)
        return self._decoded(answer)

    def put(self, path: str, content: bytes, headers: Mapping[str, str]) -> None:
        """Raises what `ask` does."""
        with self._reachable():
            answer = self._http.put(path, content=content, headers=dict(headers))
        self._decoded(answer)

    def put_signed(self, url: str, content: bytes, headers: Mapping[str, str]) -> None:
        """Send to a signed URL, without the key. Raises Unavailable."""
        with self._reachable():
            answer = httpx.put(url, content=content, headers=dict(headers), timeout=_TIMEOUT)
        if answer.status_code >= 300:
            raise Unavailable(f"a part was not taken: {answer.status_code} {answer.text[:300]}")

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """A file's answer, its bytes not read yet. A redirect is followed without the key: it is signed.

        Raises what `ask` does, also from within.
        """
        with self._reachable():
            with self._http.stream("GET", path, headers=dict(headers)) as answer:
                if answer.status_code != 307:
                    if answer.status_code >= 300:
                        answer.read()
                        self._decoded(answer)
                    yield answer
                    return
                url = answer.headers["location"]
            forwarded = {
                name: value for name, value in headers.items() if name != "If-Range"
            }  # its value is our own name for the version
            with httpx.stream("GET", url, headers=forwarded, timeout=_TIMEOUT) as answer:
                if answer.status_code >= 300:
                    raise Unavailable(f"{path} is not answered by the bucket: {answer.status_code}")
                yield answer

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            raise Unavailable(
                f"{self.url} does not answer ({error}); start `knapper up`, or set TINKER_BASE_URL to your server"
            ) from error

    def _decoded(self, answer: httpx.Response) -> dict[str, Any]:
        try:
            body: dict[str, Any] = answer.json()
        except ValueError as error:
            raise Unavailable(
                f"{self.url} answered {answer.status_code} without JSON; is it a knapper gateway?"
            ) from error
        if answer.status_code >= 400:
            detail = str(body.get("detail", body))
            if answer.status_code == NotFound.status:
                raise NotFound(detail)
            if answer.status_code in _LATER or answer.status_code >= 500:
                raise Unavailable(detail)
            raise UserError(detail)
        return body


def lines(job: dict[str, Any]) -> Iterator[str]:
    """One line per step."""
    for step in job.get("metrics", []):
        shown = "  ".join(f"{name} {step[name]:.4g}" for name in METRICS if name in step)
        yield f"step {step['step']:>4}{_of(job)}  {shown}"


def doing(job: dict[str, Any], *, counts: bool = True) -> str:
    """A job's current activity, empty if none; `counts`: with its progress and duration."""
    if job["state"] == "waiting":
        return str(job["reason"] or "waiting")
    if not (activity := job.get("activity")):
        return ""
    step, of = activity["step"], activity["of"]
    if step is None:
        text = str(activity["phase"])
    elif activity["phase"] == "evaluating":
        text = f"evaluating after step {step}{_of(job)}" if step else "evaluating before step 1"
    else:
        text = f"{activity['phase']} step {step}{_of(job)}"
    if not counts:
        return text
    if of is not None:
        text += f": {of} rows" if activity["done"] is None else f": {activity['done']} of {of} prompts"
    return f"{text}, for {clock(activity['seconds'])}" + (f"; {job['reason']}" if job["reason"] else "")


def timing(job: dict[str, Any]) -> str:
    """When the job may end, empty while there is no estimate."""
    left_s = job.get("seconds_left")
    return "" if left_s is None else f"ends in about {clock(left_s)}"


def summary(job: dict[str, Any]) -> Iterator[str]:
    """The state of a job."""
    took = f", {clock(job['elapsed_seconds'])}" if "elapsed_seconds" in job else ""
    what = f"{job['step']}{_of(job)} trials" if job.get("sweep") else f"step {job['step']}{_of(job)}"
    yield f"{job['job']}: {job['state']}, {what}{took}"
    if job.get("activity"):
        yield f"{doing(job)}; {timing(job) or 'no estimate before its first step'}"
    elif job["reason"]:
        yield job["reason"]
    for alarm in reversed(job.get("alarms", [])):
        yield f"alarm {alarm['name']}: {alarm['message']}"
    if adapts := job.get("adapts"):
        more = "" if "unembed" in adapts else "; not unembed, as the SDK's default does: `lora: {train_unembed: true}`"
        yield f"adapts {', '.join(adapts)}{more}"
    evaluation = job.get("evaluation") or {}
    for when in ("before", "after"):
        if evaluation.get(when):
            yield f"{when:6}  " + "  ".join(f"{name} {value:.4g}" for name, value in evaluation[when].items())
    if job.get("checkpoint"):
        yield f"adapter: {job['outputs']}adapter/, and {job['checkpoint']}"


def overview(jobs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table with one line per job; nothing without jobs."""
    rows = [
        (
            job["job"],
            job["kind"] or "-",
            job["state"],
            f"{job['step']}{_of(job)}" + (" trials" if job.get("sweep") else ""),
            job["created_at"][:19],
            job["reason"],
        )
        for job in jobs
    ]
    if rows:
        yield from table(("JOB", "KIND", "STATE", "STEP", "CREATED", ""), rows)


def used(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums by job, run or session, and by model, in the order of their names."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events:
        info = event["event_info"]
        about = event.get("job") or info.get("training_run_id") or event["session_id"] or "-"
        model = event["base_model"]
        row = rows.setdefault((about, model), {"about": about, "base_model": model})
        for name in ("token_count", "device_seconds", "count"):
            if (column := _USED.get((info["type"], name))) is not None:
                row[column] = row.get(column, 0) + info.get(name, 0)
        if event.get("cost") is not None:
            row["cost"] = row.get("cost", 0.0) + event["cost"]
    return [row for _, row in sorted(rows.items())]


def quota_lines(quota: dict[str, Any]) -> Iterator[str]:
    """What is used of each limit; nothing for fields without one."""
    forms: dict[str, Callable[[int], str]] = {"bytes": sized}
    for name, words in _QUOTA.items():
        field, form = quota[name], forms.get(name, str)
        if field["quota"] is not None:
            yield f"quota: {form(field['used'])} of {form(field['quota'])} {words}"
    if quota["rank"]["quota"] is not None:
        yield f"quota: rank up to {quota['rank']['quota']}"
    if quota["tokens_a_day"]["quota"] is not None:
        yield f"the next day begins at 00:00 UTC, in {clock(quota['seconds_left'])}"


def captured_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    """How many captured episodes there are; nothing without any."""
    if count := answer["cursor"]["total_count"]:
        yield f"captured: {count} of {answer['limits']['episodes']} episodes"


def _of(job: dict[str, Any]) -> str:
    return f"/{job['steps']}" if job["steps"] is not None else ""
