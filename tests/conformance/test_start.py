"""What `knapper up` cannot serve, it refuses before it serves anything."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.server import Server
from tests.engine.tiny import tiny_model

pytestmark = pytest.mark.timeout(100)


@pytest.fixture
def two_slashes() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    yield tiny_model(directory)
    shutil.rmtree(directory)


def test_a_model_directory_that_the_sdk_cannot_name_is_refused(tmp_path: Path, two_slashes: Path) -> None:
    """It would look for the tokenizer elsewhere."""
    assert str(two_slashes).count("/") == 2
    for directory in (two_slashes, tiny_model(tmp_path / "a" / "b:c")):
        said = f"(?s)did not start.*model is '{directory}'; allowed: a path without ':' and not with exactly two '/'"
        with pytest.raises(AssertionError, match=said):
            Server.start(directory, tmp_path / "data")


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a" / "nothing").mkdir(parents=True)
    with pytest.raises(AssertionError, match=r"(?s)did not start.*nothing"):
        Server.start(tmp_path / "a" / "nothing", tmp_path / "data")


def test_a_data_directory_serves_one_knapper_at_a_time(server: Server, model: Path) -> None:
    second = Server(model, server.data)
    second.log_path = server.data.with_name("second.log")
    with pytest.raises(AssertionError, match=r"(?s)did not start.*no other knapper uses"):
        second.up()
