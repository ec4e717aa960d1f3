"""Logs: plain lines on stderr, `time level process: event key=value ...`, whether from structlog or from logging."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog


def configure(process_name: str, level: str) -> None:
    """Set up this process's logging, once, at its entry. Lines below `level` cost next to nothing."""
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.processors.format_exc_info,
            lambda _, __, event: line(process_name, event),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(
        stream=sys.stderr,
        level=max(number, logging.WARNING),  # libraries speak up only when something is wrong
        format=f"%(asctime)s %(levelname)-7s {process_name}: %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )


def line(process_name: str, event: MutableMapping[str, Any]) -> str:
    """One event as one line (and its traceback on those after it)."""
    head = f"{event.pop('timestamp')} {event.pop('level'):<7} {process_name}: {event.pop('event')}"
    exception = event.pop("exception", "")
    fields = "".join(
        f" {key}={value!r}" if isinstance(value, str) else f" {key}={value}" for key, value in event.items()
    )
    return head + fields + (f"\n{exception}" if exception else "")
