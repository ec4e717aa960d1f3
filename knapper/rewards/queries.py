"""Equality of what SQL queries give. Runs in a cell: SQLite computes whatever the text says."""

import sqlite3
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from knapper import limits

_steps_between_looks = 10_000


def sql(arguments: dict[str, Any], _link: int) -> dict[str, Any]:
    """Rows of the completion's query and of the answer's, each on a database of its own."""
    script, wanted = arguments["script"], arguments["answer"]
    deadline = time.monotonic() + 0.8 * arguments["timeout_s"]
    try:
        expected = _Rows.of(_database(script, deadline), wanted)
    except Exception as error:  # noqa: BLE001  whatever it is, no completion had a part in it
        return {"error": f"the database's script or the answer's query fails: {str(error)[:200]}"}
    connection = _database(script, deadline)
    try:
        given = _Rows.of(connection, arguments["text"])
    except Exception as error:  # noqa: BLE001  the same, of the completion
        return {"value": 0.0, "reason": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"value": float(given.equal(expected, ordered=arguments["ordered"]))}


@dataclass(frozen=True)
class _Rows:
    """`columns`: how many; None for a list of rows without any, which does not tell."""

    columns: int | None
    rows: list[tuple[Any, ...]]

    @staticmethod
    def of(connection: sqlite3.Connection, wanted: str | list[list[Any]]) -> "_Rows":
        """Of a query, or as they are. Raises whatever SQLite and its binding raise."""
        if not isinstance(wanted, str):
            listed = [_comparable(tuple(row)) for row in wanted]
            return _Rows(len(listed[0]) if Counter(listed) else None, listed)  # it raises for what no row can hold
        cursor = connection.execute(wanted)
        if cursor.description is None:  # nothing, or a comment: else it would equal any query without rows
            raise sqlite3.DataError("it is no query")
        rows = cursor.fetchmany(limits.query_rows_max + 1)
        if len(rows) > limits.query_rows_max:
            raise sqlite3.DataError(f"over {limits.query_rows_max} rows")
        return _Rows(len(cursor.description), [_comparable(row) for row in rows])

    def equal(self, other: "_Rows", *, ordered: bool) -> bool:
        if None not in (self.columns, other.columns) and self.columns != other.columns:
            return False
        return self.rows == other.rows if ordered else Counter(self.rows) == Counter(other.rows)


def _database(script: str, deadline: float) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limits.query_value_bytes_max)
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.executescript(script)
    connection.commit()
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _steps_between_looks)
    connection.set_authorizer(_reads_only)
    return connection


def _reads_only(action: int, *_: object) -> int:
    allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
    return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY


def _comparable(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(float(f"{value:.9g}") if isinstance(value, float) else value for value in row)
