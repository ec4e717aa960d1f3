"""A folder like a checkout, a home of its own, and the server that docs/quickstart.md starts: there blocks are run."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.documents.pages import ROOT, block
from tests.engine.tiny import tiny_model

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the pages' name, here of a tiny model in the folder
_PAGES_URL = "http://127.0.0.1:8000"
_CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "


@dataclass(frozen=True)
class Place:
    """`banner`: what the server printed when it was ready, the first line with its address."""

    folder: Path
    environment: dict[str, str]
    banner: list[str]

    @property
    def url(self) -> str:
        return self.banner[0].split()[1]

    def begin(self, script: str) -> "subprocess.Popen[str]":
        """Bash, on a script that knows nothing of the server's real port; stops at the first command that fails."""
        text = script.replace(_PAGES_URL, self.url)
        command = ["bash", "-euo", "pipefail", "-c", text]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self, script: str) -> str:
        """What the script printed."""
        with self.begin(script) as process:
            said, wrong = process.communicate(timeout=100)
        assert process.returncode == 0, f"{script}\n{said}\n{wrong}"
        return said

    def python(self, program: str) -> str:
        (self.folder / "program.py").write_text(program.replace(_PAGES_URL, self.url), encoding="utf-8")
        return self.run(".venv/bin/python program.py")


@contextmanager
def opened(folder: Path) -> Iterator[Place]:
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "examples").symlink_to(ROOT / "examples")
    (tiny_model(folder / MODEL) / "chat_template.jinja").write_text(_CHAT)
    environment = {
        "HOME": str(folder / "home"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0",
        "KNAPPER_PORT": "0", "KNAPPER_DTYPE": "float32",
    }  # fmt: skip
    command = f"exec {block('docs/quickstart.md', '.venv/bin/knapper up').text}"
    with (
        (folder / "up.log").open("w", encoding="utf-8") as log,
        subprocess.Popen(
            ["bash", "-c", command], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        ) as server,
    ):
        try:
            yield Place(folder, environment, _banner(server, folder / "up.log"))
        finally:
            server.send_signal(signal.SIGINT)


def _banner(server: "subprocess.Popen[str]", log: Path) -> list[str]:
    assert server.stdout is not None
    lines: list[str] = []
    for line in server.stdout:
        if lines or line.startswith("ready: "):
            lines.append(line.rstrip())
        if re.match(r"  stop\b", line):
            return lines
    raise AssertionError(f"knapper up ended before it was ready: {log.read_text(encoding='utf-8')}")
