"""The deployables are found in a checkout and in a wheel."""

from pathlib import Path

import pytest

from knapper.errors import NotFound
from knapper.local.package_root import deployables


def _deployables(root: Path) -> Path:
    (root / "functions").mkdir(parents=True)
    (root / "gateway").mkdir()
    (root / "gateway" / "app.py").touch()
    return root


def test_beside_the_library_in_a_checkout(tmp_path: Path) -> None:
    _deployables(tmp_path)
    assert deployables(tmp_path / "knapper") == tmp_path


def test_inside_the_library_in_a_wheel(tmp_path: Path) -> None:
    root = _deployables(tmp_path / "knapper" / "_deployables")
    _deployables(tmp_path)  # some stranger's gateway/ in site-packages is not ours
    assert deployables(tmp_path / "knapper") == root


def test_nowhere_is_an_error_that_says_where_was_looked(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"_deployables or .*reinstall"):
        deployables(tmp_path / "knapper")
