"""Logs, from structlog and logging alike: `time level process: event key=value ...` for people, or JSON objects."""

import json
import logging
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog

from knapper.observability import traces
from knapper.settings import Settings
from knapper.text.printable import printable

Event = MutableMapping[str, Any]


def begin(process_name: str, settings: Settings) -> None:
    """Configure this process's logs and traces from its settings; once, at its entry."""
    configure(process_name, settings.log_level, settings.log_format)
    traces.configure(process_name, settings.traces)


def configure(process_name: str, level: str, form: str = "text") -> None:
    """Set up this process's logging, once, at its entry. Lines below `level` cost next to nothing."""
    number = logging.getLevelNamesMapping()[level.upper()]
    render: Callable[[str, Event], str] = record if form == "json" else line
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso" if form == "json" else "%H:%M:%S", utc=form == "json"),
            structlog.processors.format_exc_info,
            lambda _, __, event: render(process_name, event),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(
        stream=sys.stderr,
        level=max(number, logging.WARNING),  # libraries log only warnings and errors
        force=True,
    )
    own = _Json(process_name) if form == "json" else _Text(process_name)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(own)


def record(process_name: str, event: Event) -> str:
    """One event as one JSON object, with the fields that log services look for."""
    own = {
        "severity": event.pop("level").upper(),
        "time": event.pop("timestamp"),
        "message": event.pop("event"),
        "process": process_name,
    }
    return json.dumps({**event, **own}, default=str)


class _Json(logging.Formatter):
    """Formats libraries' log records in the same form."""

    def __init__(self, process_name: str) -> None:
        super().__init__(datefmt="%Y-%m-%dT%H:%M:%S")
        self._process_name = process_name

    def format(self, entry: logging.LogRecord) -> str:
        event = {"level": entry.levelname, "timestamp": self.formatTime(entry, self.datefmt), "logger": entry.name}
        if entry.exc_info:
            event["exception"] = self.formatException(entry.exc_info)
        return record(self._process_name, {**event, "event": entry.getMessage()})


class _Text(logging.Formatter):
    """Formats libraries' log records for people."""

    def __init__(self, process_name: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {process_name}: %(name)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return _traceback(super().formatException(ei))


def line(process_name: str, event: Event) -> str:
    """One event as one line (and its traceback on those after it)."""
    head = f"{event.pop('timestamp')} {event.pop('level'):<7} {process_name}: {event.pop('event')}"
    exception = event.pop("exception", "")
    fields = "".join(
        f" {key}={value!r}" if isinstance(value, str) else f" {key}={value}" for key, value in event.items()
    )
    return printable(head + fields) + (f"\n{_traceback(exception)}" if exception else "")


def _traceback(text: str) -> str:
    """Indented, so that no line of a traceback looks like an event."""
    return "\n".join(f"  {line}" for line in printable(text, "\n\t").split("\n"))
