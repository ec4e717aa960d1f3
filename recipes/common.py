"""What the recipes share: clients of a running knapper, jobs by HTTP, curves, and the figures that a run leaves."""

import argparse
import io
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("TINKER_TELEMETRY", "0")  # before the SDK is imported

import httpx
import matplotlib
import tinker
import yaml
from matplotlib.figure import Figure
from tinker import types

URL = os.environ.get("TINKER_BASE_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("TINKER_API_KEY", "tml-local")
OUT = Path("out") / "recipes"

Cell = str | float


@dataclass(frozen=True)
class Table:
    """`rows` below `columns`; a number is shown with three digits."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *([_shown(cell) for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Result:
    """What a run came to: its figures, of which the overview shows the first row, its curves, and other tables."""

    recipe: str
    model: str
    options: Mapping[str, Any]
    figures: Table
    curves: Mapping[str, Sequence[float]]
    more: Mapping[str, Table] = field(default_factory=dict)


def _shown(cell: Cell) -> str:
    return cell if isinstance(cell, str) else f"{cell:.3g}"


def save(result: Result) -> None:
    """Print the figures and keep the result as out/recipes/NAME.json."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{result.recipe}.json"
    path.write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for each in (result.figures, *result.more.values()):
        print(each.markdown())


def options(kind: type[Any], about: str | None) -> Any:
    """A recipe's options, a flag for each of its dataclass's fields."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for each in fields(kind):
        default: Any = each.default
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=type(default), default=default, help=" ")
    return kind(**vars(parser.parse_args()))


class Curve:
    """A line for each curve, over the steps. A notebook shows it as SVG."""

    def __init__(self, curves: Mapping[str, Sequence[float]], label: str) -> None:
        self.figure = Figure(figsize=(6, 3), layout="constrained")
        axes = self.figure.subplots()
        for name, values in curves.items():
            axes.plot(range(1, len(values) + 1), values, marker=".", label=name)
        axes.set(xlabel="step", ylabel=label)
        if len(curves) > 1:
            axes.legend(fontsize="small")

    def _repr_svg_(self) -> str:
        out = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "knapper"}):  # text as text, ids that stay
            self.figure.savefig(out, format="svg", metadata={"Date": None})
        return out.getvalue()


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last tenth of the steps."""
    few = max(1, len(values) // 10)
    return sum(values[:few]) / few, sum(values[-few:]) / few


# By the SDK


def service() -> tinker.ServiceClient:
    logging.getLogger("tinker").setLevel(logging.ERROR)  # a server that starts from zero is no news
    return tinker.ServiceClient(base_url=URL, api_key=KEY)


def model_of(asked: str) -> str:
    """The served model that is asked for; with no name the first one."""
    answer = _http().get(f"{URL}/v1/models").raise_for_status().json()
    return chosen(asked, [str(each["id"]) for each in answer["data"]])


def chosen(asked: str, served: Sequence[str]) -> str:
    """Exits with what is served, if what is asked for is not."""
    if asked and asked not in served:
        raise SystemExit(
            f"--model {asked} is not served at {URL}; served: {', '.join(served)}; knapper up --model NAME"
        )
    return asked or served[0]


def answers(sampler: tinker.SamplingClient, tokenizer: Any, prompts: Sequence[str], max_tokens: int) -> list[str]:
    """The greedy first line after each prompt."""
    params = types.SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=["\n"])
    given = [types.ModelInput.from_ints(tokenizer.encode(prompt)) for prompt in prompts]
    futures = [sampler.sample(each, num_samples=1, sampling_params=params) for each in given]
    return [str(tokenizer.decode(future.result().sequences[0].tokens)).partition("\n")[0].strip() for future in futures]


def example(tokenizer: Any, prompt: str, completion: str) -> types.Datum:
    """A prompt and its completion: only the completion's tokens have weight."""
    given, wanted = tokenizer.encode(prompt), tokenizer.encode(completion)
    tokens = given + wanted
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [0.0] * (len(given) - 1) + [1.0] * len(wanted)},
    )


# As jobs


@dataclass(frozen=True)
class Job:
    """A job that has ended: its steps' metrics, its evaluations, its bill and its checkpoint."""

    name: str
    metrics: Sequence[dict[str, Any]]
    evaluation: dict[str, Any]
    trials: dict[str, Any] | None
    checkpoint: str
    seconds: float

    def curve(self, metric: str) -> list[float]:
        return [float(step[metric]) for step in self.metrics]


def _http() -> httpx.Client:
    headers = {"X-API-Key": KEY, "Authorization": f"Bearer {KEY}"}
    return httpx.Client(base_url=f"{URL}/api/v1/", headers=headers, timeout=300)


def job(path: Path, model: str, changes: Mapping[str, Any]) -> str:
    """A job.yaml with some of its fields changed, of the served model that is asked for."""
    return changed(path, {"base_model": model_of(model), **changes})


def changed(path: Path, changes: Mapping[str, Any]) -> str:
    """A job.yaml with other values of some fields, by their dotted names."""
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        part, *inner = name.split(".")
        at = content
        for each in inner:
            at, part = at.setdefault(part, {}), each
        at[part] = value
    return yaml.safe_dump(content, sort_keys=False)


def train(name: str, files: Mapping[str, str]) -> Job:
    """Start the job, anew if there was one of its name, print each step, and return once it has ended."""
    began = time.monotonic()
    with _http() as http:
        _expect_taken(http.post("jobs", json={"name": name, "files": dict(files), "again": True}))
        metrics, told = list[dict[str, Any]](), 0
        while True:
            now = http.get(f"jobs/{name}", params={"after": len(metrics)}).raise_for_status().json()
            for step in now.get("metrics", []):
                metrics.append(step)
                print(_step(name, step, now["steps"]), flush=True)
            if now.get("trials"):
                ended = [trial for trial in now["trials"]["trials"] if trial["state"] != "running"]
                for trial in ended[told:]:
                    print(f"{trial['job']}  {trial['state']}  {trial['value']}", flush=True)
                told = max(told, len(ended))
            if now["state"] not in ("running", "waiting"):
                break
            time.sleep(0.3)
    if now["state"] != "completed":
        raise RuntimeError(f"{name} is {now['state']}: {now['reason']}")
    return Job(
        name, metrics, now.get("evaluation") or {}, now.get("trials"), now.get("checkpoint") or "",
        time.monotonic() - began,
    )  # fmt: skip


def _expect_taken(answer: httpx.Response) -> None:
    if answer.status_code >= 400:
        raise RuntimeError(f"the job was refused: {answer.json().get('detail', answer.text)}")


def _step(name: str, step: Mapping[str, Any], steps: int) -> str:
    shown = "  ".join(f"{key} {step[key]:.3f}" for key in ("reward/mean", "loss/mean", "accuracy/mean") if key in step)
    return f"{name} {step['step']:3}/{steps}  {shown}"


def rollouts(name: str, what: str) -> list[dict[str, Any]]:
    """The completions of a step (`step-3`) or of an evaluation (`evaluation-0`)."""
    with _http() as http:
        text = http.get(f"jobs/{name}/files/rollouts/{what}.jsonl").raise_for_status().text
    return [json.loads(line) for line in text.splitlines()]


def shown(name: str) -> dict[str, Any]:
    """What the server says of a job."""
    with _http() as http:
        answer: dict[str, Any] = http.get(f"jobs/{name}").raise_for_status().json()
    return answer


def chat(model: str, question: str, max_tokens: int) -> tuple[str, bool]:
    """The greedy answer by OpenAI's protocol, and whether it ended by itself. `model`: a base model, or a job."""
    asked = {
        "model": model, "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "temperature": 0,
    }  # fmt: skip
    with _http() as http:
        answer = http.post(f"{URL}/v1/chat/completions", json=asked).raise_for_status().json()
    (choice,) = answer["choices"]
    return choice["message"]["content"].strip(), choice["finish_reason"] == "stop"


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
