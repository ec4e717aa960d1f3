"""Files appear whole, under names that cannot be guessed, and no link leads out of a directory."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from knapper.store import files


def test_a_replaced_file_is_new_private_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    with files.directory(tmp_path) as folder:
        files.replace(folder, "a", b"one")
        first = (tmp_path / "a").stat()
        files.replace(folder, "a", b"two", mode=0o644)
    assert (tmp_path / "a").read_bytes() == b"two"
    assert (tmp_path / "a").stat().st_ino != first.st_ino
    assert (first.st_mode & 0o777, (tmp_path / "a").stat().st_mode & 0o777) == (0o600, 0o644)
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_link_that_lies_at_the_name_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    with files.directory(tmp_path) as folder:
        files.replace(folder, "a", b"ours")
    assert not (tmp_path / "a").is_symlink()
    assert ((tmp_path / "a").read_text(), (tmp_path / "victim").read_text()) == ("ours", "precious")


@pytest.mark.parametrize("whole", [True, False], ids=["to a file", "to nothing"])
def test_a_link_that_lies_in_wait_under_a_temporary_name_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """As if the name had been guessed: even then it must be new."""
    victim = tmp_path / "victim"
    if whole:
        victim.write_text("precious")
    monkeypatch.setattr(files, "random_name", lambda prefix="": f"{prefix}guessed")
    (tmp_path / ".guessed").symlink_to(victim)
    with files.directory(tmp_path) as folder, pytest.raises(FileExistsError):
        files.replace(folder, "a", b"ours")
    with pytest.raises(FileExistsError), files.create_locked(tmp_path / ".guessed"):
        pass
    assert (victim.read_text() if whole else victim.exists()) == ("precious" if whole else False)
    with pytest.raises(OSError, match="symbolic links"):
        files.open_or_create(tmp_path / ".guessed")


def test_a_link_under_a_name_that_can_be_guessed_is_not_written_through(tmp_path: Path) -> None:
    """Downloads and exports go into folders of the user's choice, under names that tell how to go on with them."""
    victim, link = tmp_path / "victim", tmp_path / ".model.safetensors.part"
    victim.write_text("precious")
    link.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        files.append(link)
    with files.create(link) as file:
        file.write(b"ours")
    with files.append(link) as file:
        file.write(b", more")
    assert (link.read_text(), victim.read_text(), link.is_symlink()) == ("ours, more", "precious", False)
    os.umask(mask := os.umask(0o077))
    assert link.stat().st_mode & 0o777 == 0o666 & ~mask


def test_names_of_files_under_way_never_come_again() -> None:
    assert len({files.random_name("x") for _ in range(1000)}) == 1000


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with files.directory(tmp_path) as folder, pytest.raises(IsADirectoryError):
        files.replace(folder, "a", b"ours")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_folders_are_made_for_this_account_alone_and_links_among_them_refused(tmp_path: Path) -> None:
    with files.below(tmp_path, ["a", "b"], make=True) as folder:
        files.replace(folder, "c", b"x")
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"x"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    (tmp_path / "a" / "out").symlink_to(tmp_path)
    with pytest.raises(files.UnexpectedSymlink), files.below(tmp_path, ["a", "out", "a"], make=True):
        pass
    with pytest.raises(FileNotFoundError), files.below(tmp_path, ["none", "b"]):
        pass


_SWAP = """
import os, sys
os.chdir(sys.argv[1])
os.makedirs("real/b")
while True:
    for _ in range(20):
        os.rename("real", "root/a")
        os.rename("root/a", "real")
        os.symlink("../outside", "root/a")
        os.unlink("root/a")
"""


def test_a_folder_that_turns_into_a_link_and_back_never_leads_out(tmp_path: Path) -> None:
    """The race that looking first, and opening afterwards, loses."""
    (tmp_path / "outside" / "b").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    outcomes: Counter[str] = Counter()
    with subprocess.Popen([sys.executable, "-c", _SWAP, str(tmp_path)]) as swapping:
        try:
            while outcomes["written"] < 100 or outcomes[files.UnexpectedSymlink.__name__] < 100:
                try:
                    with files.below(tmp_path / "root", ["a", "b"]) as folder:
                        files.replace(folder, str(outcomes.total()), b"ours")
                    outcomes["written"] += 1
                except OSError as error:
                    outcomes[type(error).__name__] += 1
        finally:
            swapping.kill()
    assert list((tmp_path / "outside" / "b").iterdir()) == []


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "whole")
    (tmp_path / "whole").write_bytes(b"x")
    with files.directory(tmp_path) as folder:
        with files.read(folder, "whole") as file:
            assert file.read() == b"x"
        for name, refused in (
            ("pipe", IsADirectoryError),
            ("folder", IsADirectoryError),
            ("link", files.UnexpectedSymlink),
        ):
            with pytest.raises(refused):
                files.read(folder, name)
