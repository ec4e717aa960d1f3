"""Where each record of a run lies."""

from knapper.ids import RunId, number, run_prefix


def operation(run: RunId, seq: int) -> str:
    return f"{operations(run)}{number(seq)}"


def operations(run: RunId) -> str:
    return f"{run_prefix(run)}in/"


def commit(run: RunId, n: int) -> str:
    return f"{commits(run)}{number(n)}"


def commits(run: RunId) -> str:
    return f"{run_prefix(run)}out/"


def manifest(run: RunId, n: int) -> str:
    return f"{manifests(run)}{number(n)}"


def manifests(run: RunId) -> str:
    return f"{run_prefix(run)}manifest/"


def snapshots(run: RunId) -> str:
    return f"{run_prefix(run)}snap/"


def snapshot(run: RunId, seq: int, epoch: int) -> str:
    return f"{snapshots(run)}{number(seq)}-{number(epoch)}/"


def parse_snapshot(prefix: str) -> tuple[int, int]:
    """(seq, epoch) of a `snapshot`."""
    seq, _, epoch = prefix.rstrip("/").rpartition("/")[2].partition("-")
    return int(seq), int(epoch)


def ends(run: RunId) -> str:
    return f"{run_prefix(run)}end/"


def last_number(name: str) -> int:
    return int(name.rpartition("/")[2])
