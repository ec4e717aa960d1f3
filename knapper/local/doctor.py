"""Finds problems of the `knapper up` of a data directory."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx

from knapper.catalogue import servable
from knapper.catalogue.served_models import Catalogue
from knapper.cluster.findings import Finding
from knapper.errors import KnapperError
from knapper.local.state import ENGINES
from knapper.settings import Settings
from knapper.store.factory import open_store
from knapper.text.sizes import sized

_ANSWER_S = 10.0
_PART = re.compile(r'^knapper_memory_bytes\{part="(\w+)"\} (\S+)$', re.MULTILINE)


def running(settings: Settings) -> int | None:
    """The gateway's port, while a server runs over the data directory."""
    try:
        roles = json.loads((settings.run_directory / "processes.json").read_text(encoding="utf-8"))
        pid, port = int(roles["supervisor"]["pid"]), int(roles["gateway"]["port"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return port if Path(f"/proc/{pid}").exists() or not Path("/proc/self").exists() else None


async def examine(settings: Settings, port: int) -> list[Finding]:
    """Check the server, its engine's last reported state, and the models' files."""
    models = await Catalogue(open_store(settings)).models()
    files = [_files(model.name, Path(model.directory)) for model in models]
    return [*_server(port), *files, *_memory(settings.run_directory)]


def _server(port: int) -> Iterator[Finding]:
    url = f"http://127.0.0.1:{port}"
    try:
        answer = httpx.get(f"{url}/api/v1/healthz", timeout=_ANSWER_S, trust_env=False)
        refusals = answer.raise_for_status().json().get("unservable", [])
    except httpx.HTTPError as error:
        yield Finding("knapper up", "wrong", f"{url} does not answer: {error!r}", "see its log; start it again")
        return
    yield Finding("knapper up", "good", f"answers at {url}")
    for reason in refusals:
        yield Finding(
            "engine", "wrong", reason, "fix that, and it continues by itself; or restart with another --model"
        )


def _memory(run_directory: Path) -> Iterator[Finding]:
    """The account of memory of each engine that runs now."""
    try:
        roles = json.loads((run_directory / "processes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    for role, process in roles.items():
        name = role.partition(":")[0]
        if name not in ("engine", *ENGINES) or "port" not in process or "loading_since" in process:
            continue
        function = ENGINES[0] if name == "engine" else name
        url = f"http://127.0.0.1:{process['port']}/{function}/metrics"
        try:
            text = httpx.get(url, timeout=_ANSWER_S, trust_env=False).raise_for_status().text
        except httpx.HTTPError as error:
            yield Finding(f"memory of {role}", "unknown", f"{url} does not answer: {error!r}", "look again later")
            continue
        parts = {part: int(float(size)) for part, size in _PART.findall(text)}
        if parts:  # vLLM accounts for its own
            shown = ", ".join(f"{part} {sized(size)}" for part, size in parts.items() if size)
            yield Finding(f"memory of {role}", "good", shown)


def _files(name: str, directory: Path) -> Finding:
    try:
        servable.expect_files(directory)
    except KnapperError as error:
        return Finding(f"model {name}", "wrong", str(error), "fix the directory, or restart with another --model")
    return Finding(f"model {name}", "good", f"its files in {directory} are whole")
