"""Equality of what SQL queries give. Runs in a cell: SQLite computes whatever the text says."""

import sqlite3
import time
from collections import Counter
from typing import Any

_rows_max = 10_000
_sql_text_max = 10_000_000  # bytes of one value
_steps_between_looks = 10_000


def sql(arguments: dict[str, Any], _link: int) -> dict[str, Any]:
    """Rows of the completion's query and of the answer's, each on a database of its own."""
    script, wanted = arguments["script"], arguments["answer"]
    deadline = time.monotonic() + 0.8 * arguments["timeout_s"]
    try:
        expected = _rows(script, wanted, deadline) if isinstance(wanted, str) else [tuple(row) for row in wanted]
    except (sqlite3.Error, sqlite3.Warning, TypeError, OverflowError) as error:
        return {"error": f"the database's script or the answer's query fails: {str(error)[:200]}"}
    try:
        rows = _rows(script, arguments["text"], deadline)
    except (sqlite3.Error, sqlite3.Warning, OverflowError, ValueError, MemoryError):
        return {"value": 0.0}
    given, expected = [_comparable(row) for row in rows], [_comparable(row) for row in expected]
    same = given == expected if arguments["ordered"] else Counter(given) == Counter(expected)
    return {"value": float(same)}


def _rows(script: str, query: str, deadline: float) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(":memory:")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _sql_text_max)
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.executescript(script)
    connection.commit()
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _steps_between_looks)
    connection.set_authorizer(_reads_only)
    rows = connection.execute(query).fetchmany(_rows_max + 1)
    if len(rows) > _rows_max:
        raise sqlite3.DataError(f"over {_rows_max} rows")
    return rows


def _reads_only(action: int, *_: object) -> int:
    allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
    return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY


def _comparable(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(float(f"{value:.9g}") if isinstance(value, float) else value for value in row)
