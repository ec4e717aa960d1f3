"""A knapper that serves a tiny model, and the cookbook's commands against it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.conformance.cookbook import material
from tests.conformance.server import Server
from tests.engine.strange import strange_model
from tests.engine.tiny import tiny_model

COOKBOOK = Path(sys.prefix) / "tinker-cookbook"
CHECKS = COOKBOOK / "source" / "tests"  # scripts that only its source distribution has
# One that the cookbook's table of models has, as a base model: its renderer needs nothing of the tokenizer.
MODEL = "Qwen/Qwen3-8B-Base"
TEACHER = "Qwen/Qwen3-8B"  # another base model that it has
_RECIPES = "tinker_cookbook.recipes"
_context = 2048
_STOP_S = 30.0


class CommandFailed(AssertionError):
    """A command of the cookbook ended with an error: this one."""


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    directory: Path  # its log_path
    output: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return _lines(self.directory / "metrics.jsonl")

    def series(self, metric: str) -> list[float]:
        """The metric of each step that has it, in order of the steps."""
        return [row[metric] for row in self.rows if metric in row]

    @property
    def checkpoint(self) -> dict[str, Any]:
        """Its newest checkpoint."""
        return _lines(self.directory / "checkpoints.jsonl")[-1]


class Workplace:
    """Where the commands run: a directory with the model by its name, and with the material; see `opened`."""

    def __init__(self, directory: Path, server: Server) -> None:
        self.directory, self.server = directory, server
        self.runs = directory.parent / "runs"
        self.runs.mkdir()
        self._count = 0
        environment = {
            **os.environ,
            "PYTHONPATH": str(COOKBOOK),
            "HF_HOME": str(directory.parent / "hub"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TINKER_API_KEY": "tml-local",
            "TINKER_BASE_URL": server.url,
            "TINKER_COOKBOOK_RUNS_DIR": str(self.runs),
            "TINKER_TELEMETRY": "0",
            "https_proxy": "http://127.0.0.1:9",  # prices, which it asks for at every start: refused at once
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("process.py"))],
            cwd=directory, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def recipe(self, name: str, *, log: str | None = None, **options: Any) -> Ran:
        """Run a recipe to its end: `python -m tinker_cookbook.recipes.NAME key=value ...`. Raises CommandFailed.

        `log`: the name of the directory that it logs to, for one that goes on with it.
        """
        self._count += 1
        directory = self.runs / (log or f"{self._count:02d}-{name}")
        options = {"model_name": MODEL, "log_path": directory, "wandb_name": directory.name, **options}
        return self.run(f"{_RECIPES}.{name}", directory, **options)

    def run(self, target: str, directory: Path, document: str | None = None, **options: Any) -> Ran:
        """Run a module or script; what it would download is `document`. Raises CommandFailed."""
        output = directory.with_name(f"{directory.name}.txt")
        asked = {
            "target": target,
            "arguments": [f"{name.replace('__', '.')}={value}" for name, value in options.items()],
            "document": document,
            "output": str(output),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        said = output.read_text(encoding="utf-8", errors="replace") if output.exists() else ""
        if not answer:
            raise CommandFailed(f"{target}: the process ended.\n{said[-4000:]}")
        if error := json.loads(answer)["error"]:
            raise CommandFailed(f"{target}: {error[-6000:]}")
        return Ran(directory, said)

    @cached_property
    def taught(self) -> Ran:
        """The run that other loops start from: it was taught how an answer looks, and its digits are guesses."""
        return self.recipe(
            "chat_sl.train", dataset=self.directory / material.SUMS, batch_size=16, max_steps=12, lora_rank=8,
            learning_rate=5e-3, lr_schedule="constant", eval_every=0, save_every=0,
        )  # fmt: skip


def installed() -> bool:
    return (COOKBOOK / "tinker_cookbook").is_dir() and CHECKS.is_dir()


@contextmanager
def opened(directory: Path, *others: str, kind: str | None = None) -> Iterator[Workplace]:
    """A server over `directory`, and a workplace beside it. `others`: base models that it serves besides. `kind`: of
    tests.engine.strange, what the model is under its name; None: what the name says.
    """
    cache, here = directory / "models", directory / "work"
    for seed, name in enumerate((MODEL, *others)):
        place = cache / name.replace("/", "--")
        if kind is None:
            model = tiny_model(place, seed=seed, kind="qwen3", context=_context)
        else:
            model = strange_model(place, kind, seed=seed, max_position_embeddings=_context)
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).symlink_to(model)
    material.lay_out(here)
    settings = {"KNAPPER_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    flags = [flag for name in others for flag in ("--model", name)]
    with Server.start(Path(MODEL), directory / "data", *flags, settings=settings) as server:
        with Workplace(here, server) as at:
            yield at


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
