"""A client of a gateway's jobs, and of what they and others used, as the command line is one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
_SUBMIT_TIMEOUT = httpx.Timeout(300.0, connect=5.0)  # all rows are looked at before the answer
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


class JobsClient:
    """`url`: the gateway's; `key`: the user's."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/")
        self._http = httpx.Client(base_url=f"{self._url}/api/v1/", headers={"X-API-Key": key}, timeout=_TIMEOUT)

    def close(self) -> None:
        self._http.close()

    def submit(self, job_yaml: Path, name: str | None, *, again: bool = False) -> dict[str, Any]:
        """Send job.yaml and the files that it names, which lie beside it. Raises UserError before anything is sent."""
        folder = job_yaml.resolve().parent
        yaml = jobs_transfer.checked(job_yaml)
        files = {each: jobs_transfer.checked(folder / each) for each in spec.parse(yaml.path.read_bytes()).job.files}
        size = yaml.size + sum(file.size for file in files.values())
        if size > limits.job_upload_bytes_max:
            raise InvalidField(
                "the files' size in bytes", size, f"at most {limits.job_upload_bytes_max} in all",
                "Leave rows out, or copy the folder into the server's inbox",
            )  # fmt: skip
        large = {name: file for name, file in files.items() if file.size and size > limits.upload_part_bytes}
        small = {names.JOB_YAML: yaml, **{name: file for name, file in files.items() if name not in large}}
        asked = {
            "name": names.job(name or folder.name),
            "files": {each: file.path.read_text(encoding="utf-8") for each, file in small.items()},
            "again": again,
        }
        if large:
            asked["uploads"] = {each: {"sha256": file.sha256, "size": file.size} for each, file in large.items()}
            for each, file in large.items():
                jobs_transfer.send(self, each, file)
        return self.ask("POST", "/jobs", asked, _SUBMIT_TIMEOUT)

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
        """What the job has published."""
        found: list[dict[str, Any]] = self.ask("GET", f"/jobs/{names.job(job)}/files")["files"]
        return found

    def usage(self, starting_on: datetime, ending_before: datetime) -> list[dict[str, Any]]:
        """What was used in each hour between two full hours."""
        window = {"starting_on": starting_on.isoformat(), "ending_before": ending_before.isoformat()}
        found: list[dict[str, Any]] = self.ask("GET", f"/billing/usage/events?{urlencode(window)}")["data"]
        return found

    def ask(self, method: str, path: str, body: object = None, timeout: httpx.Timeout = _TIMEOUT) -> dict[str, Any]:
        """Raises UserError, as the server has it, or Unavailable where it does not answer, or not now."""
        with self._told():
            answer = self._http.request(method, path, json=body, timeout=timeout)
        return self._said(answer)

    def put(self, path: str, content: bytes, headers: Mapping[str, str]) -> None:
        """Raises what `ask` does."""
        with self._told():
            answer = self._http.put(path, content=content, headers=dict(headers))
        self._said(answer)

    def put_signed(self, url: str, content: bytes, headers: Mapping[str, str]) -> None:
        """To whoever the URL is of, without the key. Raises Unavailable."""
        with self._told():
            answer = httpx.put(url, content=content, headers=dict(headers), timeout=_TIMEOUT)
        if answer.status_code >= 300:
            raise Unavailable(f"a part was not taken: {answer.status_code} {answer.text[:300]}")

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """A file's answer, its bytes not read yet. A redirect is followed without the key: it is signed.

        Raises what `ask` does, also from within.
        """
        with self._told():
            with self._http.stream("GET", path, headers=dict(headers)) as answer:
                if answer.status_code != 307:
                    if answer.status_code >= 300:
                        answer.read()
                        self._said(answer)
                    yield answer
                    return
                url = answer.headers["location"]
            asked = {name: value for name, value in headers.items() if name != "If-Range"}  # of our names for versions
            with httpx.stream("GET", url, headers=asked, timeout=_TIMEOUT) as answer:
                if answer.status_code >= 300:
                    raise Unavailable(f"{path} is not answered by the bucket: {answer.status_code}")
                yield answer

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as error:
            raise Unavailable(
                f"{self._url} does not answer ({error}); start `knapper up`, or set TINKER_BASE_URL to your server"
            ) from error

    def _said(self, answer: httpx.Response) -> dict[str, Any]:
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
    """The sums of each job, run, or session, and model, in the order of their names."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for each in events:
        told = each["event_info"]
        about = each.get("job") or told.get("training_run_id") or each["session_id"] or "-"
        model = each["base_model"]
        row = found.setdefault((about, model), {"about": about, "base_model": model})
        for name in ("token_count", "device_seconds", "count"):
            if (column := _USED.get((told["type"], name))) is not None:
                row[column] = row.get(column, 0) + told.get(name, 0)
    return [row for _, row in sorted(found.items())]


def _of(told: dict[str, Any]) -> str:
    return f"/{told['steps']}" if told["steps"] is not None else ""
