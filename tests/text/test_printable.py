"""Nothing that anybody sends reaches a terminal as anything but text: by logs, by errors, by what commands print."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from knapper.errors import KnapperError, NotFound
from knapper.exchange.directory import DirectoryExchange
from knapper.jobs.notifications import Notifier
from knapper.jobs.services import JobServices
from knapper.rewards.scorer import RewardFailed
from knapper.state import dead_letters
from knapper.state.dead_letters import DeadLetter
from knapper.store.directory import DirectoryStore
from knapper.store.memory import MemoryStore
from knapper.text.printable import printable
from tests.gateway.running import gateway
from tests.gateway.test_jobs import DoorbellLog

# A title, a colour, C1's CSI, a bell, a backspace, a forged line, text that runs backwards, half a pair, a tag.
ODD = "\x1b]0;owned\x07\x1b[31m\x9b2J\x07\x08\r\n12:00:00 info up: forged\u2028\u202eabc\u2066\u200f\ud800\U000e0041"
FORBIDDEN = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)

LOGS = """
import json, logging, sys, structlog
from knapper.observability import logs
from knapper.errors import UserError
logs.configure("up", "info", sys.argv[1])
odd = json.loads(sys.argv[2])
log = structlog.get_logger()
log.warning(odd, text=odd, error=UserError(odd), plain=ValueError(odd), list=[odd], map={odd: odd},
            object=type("X", (), {"__repr__": lambda _: odd})())
logging.getLogger("library" + odd).warning("odd %s", odd)
try:
    raise KeyError(odd)
except KeyError:
    log.exception("broken")
try:
    raise type("Odd", (Exception,), {"__str__": lambda _: odd})()
except Exception:
    log.exception("broken")
    logging.getLogger("library").warning("odd", exc_info=True)
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_log_line_holds_what_a_terminal_would_obey(form: str) -> None:
    command = [sys.executable, "-c", LOGS, form, json.dumps(ODD)]
    said = subprocess.run(command, capture_output=True, check=True).stderr.decode()
    assert FORBIDDEN.search(said) is None
    first, second = said.splitlines()[:2]
    assert first.count("forged") >= 6  # only a traceback has several lines, and they are indented
    assert re.search(r"^12:00:00 info up", said, re.MULTILINE) is None
    assert second.count("forged") == 2


def test_every_error_is_one_line_of_text() -> None:
    for error in (KnapperError(ODD), NotFound(ODD), RewardFailed(ODD, ODD)):
        assert FORBIDDEN.search(str(error)) is None
        assert "\n" not in str(error)
        assert "\\x1b]0;owned\\x07" in str(error)


def test_what_is_printable_stays_as_it_is() -> None:
    for text in ("", "plain", "Größe 東京 🙂 a\\b 'x'"):
        assert printable(text) == text
    assert printable("a\tb\nc\x1b", "\n\t") == "a\tb\nc\\x1b"
    assert printable(ODD).encode().decode() == printable(ODD)


def knapper(*arguments: str, **environment: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-m", "knapper", *arguments],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=60,
    )
    return (ran.stdout + ran.stderr).decode()


def test_commands_print_text(tmp_path: Path) -> None:
    yaml = 'kind: rl\n"\\e]0;owned\\x07\\u202E\\r\\n": 1\n'
    store = MemoryStore()
    notifier = Notifier(DoorbellLog().post, lambda: 0.0)
    with gateway(
        store, job_services=JobServices(store, DirectoryExchange(tmp_path), notifier, iter(range(10**6)).__next__)
    ) as running:
        running.post("jobs", {"name": "odd", "files": {"job.yaml": yaml}})
        for command in (["list"], ["show", "odd"], ["cancel", "odd"]):
            said = knapper("jobs", *command, TINKER_BASE_URL=running.url, TINKER_API_KEY="tml-local")
            assert FORBIDDEN.search(said) is None
            assert command[0] == "cancel" or "\\x1b]0;owned\\x07\\u202e\\r\\n is 1" in said
    (tmp_path / "job.yaml").write_text(yaml)
    said = knapper("submit", str(tmp_path / "job.yaml"), TINKER_BASE_URL="http://127.0.0.1:9")
    assert "owned" in said
    assert FORBIDDEN.search(said) is None


def test_dead_letters_are_printed_as_text(tmp_path: Path) -> None:
    odd = ODD.replace("\ud800", "")
    why = {"type": odd, "subject": odd, "id": odd, "knativeerrordest": odd, "knativeerrordata": odd}
    asyncio.run(dead_letters.keep(DirectoryStore(tmp_path / "store"), DeadLetter(why, b"", 0.0)))
    said = knapper("dead-letters", "--data", str(tmp_path))
    assert said.count("owned") == 5
    assert FORBIDDEN.search(said) is None
    assert len(said.splitlines()) == 2
    told = knapper("dead-letters", "--json", "--data", str(tmp_path))
    assert FORBIDDEN.search(told) is None
    assert json.loads(told) == [{"kept_at": "1970-01-01T00:00:00Z", **why}]
