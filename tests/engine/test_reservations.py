"""Engines of one machine plan with what the others leave."""

import os
import subprocess
import sys
from pathlib import Path

from knapper.engine.reservations import Reservations

MIB = 2**20


def other(directory: Path, total: int) -> "subprocess.Popen[str]":
    """An engine in a process of its own, which has planned for `total` bytes; it ends with its input."""
    code = (
        "import sys; from pathlib import Path; from knapper.engine.reservations import Reservations\n"
        "Reservations(Path(sys.argv[1])).write(int(sys.argv[2])); print('done', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(directory), str(total)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "done\n"
    return process


def test_what_others_have_planned_and_not_taken_is_not_free_until_they_end(tmp_path: Path) -> None:
    mine = Reservations(tmp_path / "run")
    mine.write(10**15)
    with mine.turn() as planned:
        assert planned == 0, "one's own plan is no other's"
    (tmp_path / "run" / "memory-1").write_text("17 1000000000000")  # of a process that had this number before
    with other(tmp_path / "run", 4096 * MIB) as greedy, other(tmp_path / "run", 1) as modest:
        with mine.turn() as planned:
            assert 4096 * MIB - planned in range(MIB, 1024 * MIB), "less what it has taken: its interpreter"
        for process in (greedy, modest):
            process.communicate()
    with mine.turn() as planned:
        assert planned == 0
    assert [path.name for path in (tmp_path / "run").glob("memory-*")] == [f"memory-{os.getpid()}"]


def test_one_engine_loads_at_a_time(tmp_path: Path) -> None:
    mine = Reservations(tmp_path)
    code = (
        "import sys; from pathlib import Path; from knapper.engine.reservations import Reservations\n"
        "print('asks', flush=True)\nwith Reservations(Path(sys.argv[1])).turn(): print('has it', flush=True)"
    )
    with mine.turn():
        second = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert second.stdout.readline() == "asks\n"
        waiting = Path(f"/proc/{second.pid}/wchan") if Path("/proc/self/wchan").exists() else None
        assert second.poll() is None, waiting
    assert second.stdout.readline() == "has it\n"
    second.communicate()
