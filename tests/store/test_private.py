"""Only the server's account can read the data directory, also one that an earlier release made."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from knapper.catalogue.download import _alone
from knapper.errors import InvalidField
from knapper.exchange.directory import DirectoryExchange
from knapper.local.state import ProcessTable, locked
from knapper.store import private
from knapper.store.directory import DirectoryStore
from tests.state.accounts import as_other, mode, opened


def earlier(data: Path) -> None:
    """As versions before this one left it, under the usual umask."""
    for folder in ("store/secrets", "run", "jobs/local", "inbox/local"):
        (data / folder).mkdir(parents=True)
    for path in (data, *data.rglob("*")):
        path.chmod(0o755)
    (data / "store/secrets/tokens").write_bytes(b"the secret")
    (data / "store/secrets/tokens").chmod(0o644)


def serve_once(data: Path) -> None:
    """What `knapper up` and the processes that it starts do to the directories."""
    with locked(data, data / "run"):
        DirectoryStore(data / "store")
        DirectoryExchange(data)


def test_a_new_data_directory_is_for_this_account_alone(tmp_path: Path) -> None:
    was = os.umask(0)
    try:
        serve_once(tmp_path / "data")
    finally:
        os.umask(was)
    data = tmp_path / "data"
    assert {path.name: mode(path) for path in (data, *data.iterdir())} == dict.fromkeys(
        ("data", "store", "run", "jobs", "inbox", "uploads"), 0o700
    )
    assert mode(data / "run" / "lock") == 0o600


def test_a_command_that_comes_first_leaves_nothing_open(tmp_path: Path) -> None:
    """`knapper key create`, before the server was ever started: the directories above the store are new as well."""
    data = tmp_path / "share" / "knapper"
    DirectoryStore(data / "store")
    assert [mode(each) for each in (data.parent, data, data / "store")] == [0o700] * 3
    with capture_logs() as lines:
        serve_once(data)
    assert lines == []


def test_one_of_an_earlier_version_is_closed_and_a_line_says_so(tmp_path: Path) -> None:
    data = tmp_path / "data"
    earlier(data)
    with capture_logs() as lines:
        serve_once(data)
        closed = [(Path(line["directory"]).name, line["was"], line["mode"]) for line in lines]
        assert closed == [(name, "755", "700") for name in ("data", "run", "store", "jobs")]
        serve_once(data)
    assert len(lines) == 4, "once it is closed there is nothing to say"
    assert [mode(data / name) for name in (".", "run", "store", "jobs")] == [0o700] * 4
    assert (data / "store/secrets/tokens").read_bytes() == b"the secret"


def test_another_account_cannot_read_the_secret_that_signs_tokens(tmp_path: Path) -> None:
    data = tmp_path / "data"
    earlier(data)
    opened(data / "store")
    read = "sys.stdout.write(open(sys.argv[1]).read())"
    secret = str(data / "store/secrets/tokens")
    assert as_other(read, secret).stdout == "the secret", "as it was: the test can fail"
    serve_once(data)
    for closed in (data, data / "store"):
        done = as_other(read, secret)
        assert (done.stdout, done.stderr.splitlines()[-1][:15]) == ("", "PermissionError")
        closed.chmod(0o711)  # the store is closed by itself, whatever lies around it


def test_an_inbox_that_others_write_to_stays_theirs(tmp_path: Path) -> None:
    data = tmp_path / "data"
    earlier(data)
    opened(data / "inbox")
    (data / "inbox/local").chmod(0o777)
    data.chmod(0o755)
    serve_once(data)
    assert mode(data) == 0o711, "they go through it, and see nothing"
    assert [mode(data / name) for name in ("run", "store", "jobs")] == [0o700] * 3
    put = "os.mkdir(sys.argv[1] + '/job'); open(sys.argv[1] + '/job/job.yaml', 'w').write('kind: rl')"
    done = as_other(put, str(data / "inbox/local"))
    assert done.returncode == 0, done.stderr
    exchange = DirectoryExchange(data)
    blob = asyncio.run(exchange.read("inbox/local/job/job.yaml", 100))
    assert blob is not None
    assert blob.data == b"kind: rl"
    asyncio.run(exchange.publish("inbox/local/job/job.error", b"kind is 'rl'"))
    said = as_other("sys.stdout.write(open(sys.argv[1]).read())", str(data / "inbox/local/job/job.error"))
    assert said.stdout == "kind is 'rl'", "who brought the job reads what is wrong with it"


def test_what_is_published_where_nobody_else_looks_is_private(tmp_path: Path) -> None:
    exchange = DirectoryExchange(tmp_path)
    asyncio.run(exchange.publish("jobs/local/job/status.json", b"{}"))
    asyncio.run(exchange.publish("inbox/local/job/job.error", b"x"))
    for name in ("jobs/local/job/status.json", "inbox/local/job/job.error"):
        assert (mode(tmp_path / name), mode((tmp_path / name).parent)) == (0o600, 0o700)


def test_a_directory_of_another_account_is_refused_with_what_to_do(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a directory of another account needs root")
    data = tmp_path / "data"
    earlier(data)
    opened(data)
    first = "import traceback; from pathlib import Path; from knapper.store import private"
    done = as_other("private.make(Path(sys.argv[1]))", str(data), first=first)
    assert done.returncode != 0
    assert "It belongs to the account 0; make it yours with `chown` and `chmod 700`" in done.stderr
    assert mode(data) == 0o755


def test_a_file_system_that_keeps_no_modes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FAT, and some mounts of other systems: chmod says yes, and nothing changes."""
    tmp_path.chmod(0o777)
    monkeypatch.setattr(os, "fchmod", lambda *_: None)
    with pytest.raises(InvalidField, match=r"Its mode is 777, and its file system keeps no other"):
        private.make(tmp_path)


def test_links_in_the_run_directory_and_the_cache_lead_nowhere(tmp_path: Path) -> None:
    """Under each name that is the same every time."""
    victim = tmp_path / "authorized_keys"
    victim.write_text("precious")
    run, cache = tmp_path / "data" / "run", tmp_path / "cache"
    for place in (run, cache):
        place.mkdir(parents=True)
    for link in (run / "processes.tmp", run / "processes.json", cache / ".lock"):
        link.symlink_to(victim)
    with locked(tmp_path / "data", run):
        ProcessTable(run).set("gateway", 1, 2)
    assert json.loads((run / "processes.json").read_bytes()) == {"gateway": {"pid": 1, "port": 2}}
    with pytest.raises(OSError, match=r"symbolic links"), _alone(cache, print):
        pass
    (run / "lock").unlink()
    (run / "lock").symlink_to(victim)
    with pytest.raises(InvalidField, match=r"symbolic links"), locked(tmp_path / "data", run):
        pass
    assert victim.read_text() == "precious"
