"""Logs for people and for machines say the same."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys, structlog
from knapper.observability import logs
logs.configure("engine", "info", sys.argv[1])
log = structlog.get_logger()
with structlog.contextvars.bound_contextvars(run="ses:train:0"):
    log.info("claimed", epoch=3)
    log.debug("not said")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("broken")
    logging.getLogger("library").warning("odd %s", "thing", exc_info=True)
"""


def said(form: str) -> str:
    command = [sys.executable, "-c", PROGRAM, form]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_json_is_an_object_a_line_with_the_fields_that_services_look_for() -> None:
    claimed, broken, odd = [json.loads(line) for line in said("json").splitlines()]
    assert (claimed["severity"], claimed["message"], claimed["process"]) == ("INFO", "claimed", "engine")
    assert (claimed["run"], claimed["epoch"]) == ("ses:train:0", 3)
    assert claimed["time"].endswith("Z")
    assert (broken["severity"], "ZeroDivisionError" in broken["exception"]) == ("ERROR", True)
    assert (odd["logger"], odd["message"], odd["severity"]) == ("library", "odd thing", "WARNING")
    assert "ZeroDivisionError" in odd["exception"]


@pytest.mark.parametrize(
    "part", ["engine: claimed epoch=3 run='ses:train:0'\n", "engine: broken\n  Traceback", "library: odd thing"]
)
def test_text_is_a_line_for_people(part: str) -> None:
    assert part in said("text")
